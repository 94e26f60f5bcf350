"""Euclidean distances: exact to float32, also where the product form cancels."""

import numpy as np
import pytest

from pmm_edge.errors import DataError
from pmm_edge.retrieval import distances, euclidean_distances


def directly(query, gallery):
    """Differences first, in float64: nothing cancels."""
    return np.linalg.norm(query[:, None].astype(np.float64) - gallery[None], axis=2)


@pytest.mark.parametrize(("offset", "spread"), [(0, 1), (0, 5000), (4000, 100), (4000, 0.5), (0, 1e-4)])
def test_exact_to_float32(offset, spread):
    rng = np.random.default_rng(0)
    query = (offset + spread * rng.standard_normal((20, 256))).astype(np.float32)
    gallery = (offset + spread * rng.standard_normal((30, 256))).astype(np.float32)
    result = euclidean_distances(query, gallery)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, directly(query, gallery), rtol=1e-6)


@pytest.mark.parametrize("norm", [1e-3, 1, 5000, 1e6])
def test_identical_embeddings_are_0_apart(norm):
    features = np.random.default_rng(1).standard_normal((64, 1536))
    features = (norm * features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    result = euclidean_distances(features, features)
    assert (result.diagonal() == 0).all()
    assert (result[~np.eye(64, dtype=bool)] > norm / 2).all()


def test_nearly_identical_embeddings_keep_their_distance():
    query = np.full((1, 1536), 130, np.float32)  # norm 5,095
    gallery = query.copy()
    gallery[0, 7] += 0.01
    np.testing.assert_allclose(euclidean_distances(query, gallery), directly(query, gallery), rtol=1e-4)


def test_blocks_are_the_whole(monkeypatch):
    rng = np.random.default_rng(2)
    query, gallery = rng.standard_normal((10, 4)), rng.standard_normal((7, 4))
    whole = euclidean_distances(query, gallery)
    monkeypatch.setattr(distances, "BLOCK_BYTES", 3 * 7 * 8)
    blocks = list(distances.distance_blocks(query, gallery))
    assert [start for start, _ in blocks] == [0, 3, 6, 9]
    np.testing.assert_allclose(np.concatenate([block for _, block in blocks]), whole, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.int8])
def test_other_dtypes(dtype):
    features = np.random.default_rng(3).integers(-100, 100, (6, 50)).astype(dtype)
    np.testing.assert_allclose(euclidean_distances(features, features), directly(features, features), rtol=1e-6)


@pytest.mark.parametrize(
    ("query", "gallery", "message"),
    [
        (np.ones((2, 3)), np.ones((2, 4)), "query embeddings have 3 values, gallery embeddings 4"),
        (np.ones(3), np.ones((2, 3)), r"query features have shape \(3,\)"),
        (np.ones((2, 3)), np.ones((0, 3)), r"gallery features have shape \(0, 3\)"),
        (np.ones((2, 3)), np.ones((2, 3), complex), "gallery features hold complex128"),
        (np.ones((2, 3)), [[1, 2, 3], [np.inf, 2, 3], [1, np.nan, 3]], "in 2 of 3 rows, the first is row 1"),
    ],
)
def test_errors_say_what_is_wrong(query, gallery, message):
    with pytest.raises(DataError, match=message):
        euclidean_distances(query, gallery)


def test_large_finite_float16_is_no_error():
    features = np.full((2, 100), 60000, np.float16)  # the row's float16 sum is infinite, the row is not
    assert (euclidean_distances(features, features) == 0).all()
