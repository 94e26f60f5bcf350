"""Distances are exact to float32, also where the product form cancels."""

import numpy as np
import pytest

from pmm_edge.errors import DataError
from pmm_edge.retrieval import distances, pairwise_distances
from pmm_edge.retrieval.distances import cosines, unit_length


def direct_distances(query, gallery):
    """The norm of the differences in float64: nothing cancels."""
    return np.linalg.norm(query[:, None].astype(np.float64) - gallery[None], axis=2)


@pytest.mark.parametrize(("offset", "spread"), [(0, 1), (0, 5000), (4000, 100), (4000, 0.5), (0, 1e-4)])
def test_exact_to_float32(offset, spread):
    rng = np.random.default_rng(0)
    query = (offset + spread * rng.standard_normal((20, 256))).astype(np.float32)
    gallery = (offset + spread * rng.standard_normal((30, 256))).astype(np.float32)
    np.testing.assert_allclose(pairwise_distances(query, gallery), direct_distances(query, gallery), rtol=1e-6)


@pytest.mark.parametrize("norm", [1e-3, 1, 5000, 1e6])
def test_identical_embeddings_have_distance_0(norm):
    features = np.random.default_rng(1).standard_normal((64, 1536))
    features = (norm * features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    result = pairwise_distances(features, features)
    assert (result.diagonal() == 0).all()
    assert (result[~np.eye(64, dtype=bool)] > norm / 2).all()


def test_nearly_identical_embeddings_keep_their_distance():
    query = np.full((1, 1536), 130, np.float32)  # norm 5,095
    gallery = query.copy()
    gallery[0, 7] += 0.01
    np.testing.assert_allclose(pairwise_distances(query, gallery), direct_distances(query, gallery), rtol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_cosine_distances_are_one_minus_cosine(seed):
    rng = np.random.default_rng(seed)
    query, gallery = (
        (10.0 ** rng.uniform(-15, 15, (count, 1)) * rng.standard_normal((count, 64))).astype(np.float32)
        for count in (20, 30)
    )
    expected = 1 - np.array([cosines(np.tile(one, (30, 1)), gallery) for one in query])
    result = pairwise_distances(query, gallery, "cosine")
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("norm", [1e-300, 1e-3, 5000, 1e300])
def test_embeddings_of_one_direction_have_cosine_distance_0(norm):
    features = np.random.default_rng(1).standard_normal((64, 1536))
    result = pairwise_distances(features, norm * features, "cosine")
    assert (result.diagonal() == 0).all()
    assert (result[~np.eye(64, dtype=bool)] > 0.5).all()
    np.testing.assert_allclose(pairwise_distances(features, -features, "cosine").diagonal(), 2, rtol=1e-6)


def test_nearly_equal_directions_keep_their_cosine_distance():
    query, gallery = np.array([[1, 0]], np.float32), np.array([[1, 1e-5]], np.float32)
    np.testing.assert_allclose(pairwise_distances(query, gallery, "cosine"), 5e-11, rtol=1e-4)


def test_memory_is_bounded_by_blocks(monkeypatch):
    rng = np.random.default_rng(2)
    query, gallery = rng.standard_normal((10, 4)), rng.standard_normal((7, 4))
    whole = pairwise_distances(query, gallery)
    monkeypatch.setattr(distances, "BLOCK_BYTES", 3 * 7 * 8)
    blocks = list(distances.distance_blocks(query, gallery))
    assert [start for start, _ in blocks] == [0, 3, 6, 9]
    np.testing.assert_allclose(np.concatenate([block for _, block in blocks]), whole, rtol=1e-6)


def test_other_dtypes():
    for dtype in (np.float16, np.int8):
        features = np.random.default_rng(3).integers(-100, 100, (6, 50)).astype(dtype)
        expected = direct_distances(features, features)
        np.testing.assert_allclose(pairwise_distances(features, features), expected, rtol=1e-6)
    large = np.full((2, 100), 60000, np.float16)  # the float16 sum of a row is infinite, the row is not
    assert (pairwise_distances(large, large) == 0).all()


def test_wrong_features_are_refused():
    ones = np.ones((2, 3))
    for query, gallery in ((ones, np.ones((2, 4))), (np.ones(3), ones), (ones, np.ones((0, 3))), (ones, ones * 1j)):
        with pytest.raises(DataError):
            pairwise_distances(query, gallery)
    with pytest.raises(DataError, match=r"gallery features .* row 1"):
        pairwise_distances(ones, [[1, 2, 3], [np.inf, 2, 3], [1, np.nan, 3]])
    with pytest.raises(DataError, match=r"query features .* row 2"):
        pairwise_distances([[1, 2, 3], [0, 0, 1e-30], [0, 0, 0]], ones, "cosine")
    with pytest.raises(DataError, match="manhattan"):
        pairwise_distances(ones, ones, "manhattan")


def test_cosines_and_unit_length():
    rows = np.array([[3, 4], [1, 0], [0, 0], [0, 0], [1, 1]], np.float32)
    others = np.array([[6, 8], [0, 2], [0, 0], [1, 0], [np.nan, 1]], np.float32)
    np.testing.assert_allclose(cosines(rows, others), [1, 0, 1, 0, 0])
    np.testing.assert_allclose(unit_length(rows)[:3], [[0.6, 0.8], [1, 0], [0, 0]], rtol=1e-6)
