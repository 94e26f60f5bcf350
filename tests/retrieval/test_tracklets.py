"""Pooling of tracklets: against a slow reference, and bad input."""

import numpy as np
import pytest

import pmm_edge
from pmm_edge.errors import DataError


def slow_pool(embeddings, track_ids, quality):
    ids = sorted(set(track_ids))
    rows = []
    for track in ids:
        members = [row for row, other in enumerate(track_ids) if other == track]
        total = sum(quality[row] for row in members)
        lengths = {row: float(np.sqrt((embeddings[row] ** 2).sum())) for row in members}
        mean = sum(quality[row] / total * embeddings[row] / lengths[row] for row in members)
        length = sum(quality[row] / total * lengths[row] for row in members)
        rows.append(mean / np.sqrt((mean**2).sum()) * length)
    return ids, np.array(rows)


@pytest.mark.parametrize("seed", range(8))
def test_pool_is_the_reference(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 40))
    embeddings = rng.normal(size=(count, 5)) * rng.uniform(0.1, 50, (count, 1))
    tracks = rng.integers(-3, 6, count)
    quality = rng.uniform(0.1, 1, count)
    for ids in (tracks, np.array([f"cam/{track}" for track in tracks])):
        for weights in (None, quality, 7 * quality):
            found, pooled = pmm_edge.pool(embeddings, ids, weights)
            expected = slow_pool(embeddings, ids.tolist(), np.ones(count) if weights is None else weights)
            assert found.tolist() == expected[0]
            assert pooled.dtype == np.float32
            np.testing.assert_allclose(pooled, expected[1], rtol=1e-5, atol=1e-5)


def test_one_image_or_equal_images_are_pooled_to_themselves():
    rows = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32) * 30
    found, pooled = pmm_edge.pool(np.repeat(rows, [1, 4, 2], axis=0), [5, 1, 1, 1, 1, 3, 3])
    assert found.tolist() == [1, 3, 5]
    np.testing.assert_allclose(pooled, rows[[1, 2, 0]], rtol=1e-6)


def test_an_image_of_quality_0_does_not_count_and_a_long_embedding_no_more_than_others():
    rows = np.array([[3.0, 0], [0, 1], [-5, 2]])
    np.testing.assert_allclose(pmm_edge.pool(rows, [0, 0, 0], [1, 1, 0])[1], [[2**0.5, 2**0.5]], rtol=1e-6)
    zeros = pmm_edge.pool(np.zeros((2, 3)), [0, 0])[1]  # of an untrained network
    np.testing.assert_array_equal(zeros, np.zeros((1, 3)))


@pytest.mark.parametrize(
    ("row", "tracks", "quality", "named"),
    [
        ([np.nan, 1], [0, 0, 0], None, "embedding 1"),
        ([np.inf, 1], [0, 0, 0], None, "embedding 1"),
        ([1, 1], [0, 0], None, "track ids"),
        ([1, 1], [[0], [0], [0]], None, "track ids"),
        ([1, 1], [0.0, 0.0, 1.0], None, "track ids"),
        ([1, 1], [0, 0, 0], [1, 1], "quality"),
        ([1, 1], [0, 0, 0], ["a", "b", "c"], "quality"),
        ([1, 1], [0, 0, 0], [1, -0.5, 1], "embedding 1"),
        ([1, 1], [0, 0, 0], [1, 1, np.nan], "embedding 2"),
        ([1, 1], [4, 7, 7], [1, 0, 0], "tracklet 7"),
    ],
)
def test_bad_input_is_named(row, tracks, quality, named):
    with pytest.raises(DataError, match=named):
        pmm_edge.pool([[1, 2], row, [3, 4]], tracks, quality)


def test_embeddings_must_be_a_matrix():
    for embeddings in ([1.0, 2.0], np.empty((0, 4)), [[[1.0]]], [["a", "b"]]):
        with pytest.raises(DataError, match="embeddings"):
            pmm_edge.pool(embeddings, [0] * len(embeddings))
