"""Euclidean distances are exact to float32, also where the product form cancels."""

import numpy as np
import pytest

from pmm_edge.errors import DataError
from pmm_edge.retrieval import distances, euclidean_distances
from pmm_edge.retrieval.distances import cosines, unit_length


def direct_distances(query, gallery):
    """The norm of the differences in float64: nothing cancels."""
    return np.linalg.norm(query[:, None].astype(np.float64) - gallery[None], axis=2)


@pytest.mark.parametrize(("offset", "spread"), [(0, 1), (0, 5000), (4000, 100), (4000, 0.5), (0, 1e-4)])
def test_exact_to_float32(offset, spread):
    rng = np.random.default_rng(0)
    query = (offset + spread * rng.standard_normal((20, 256))).astype(np.float32)
    gallery = (offset + spread * rng.standard_normal((30, 256))).astype(np.float32)
    np.testing.assert_allclose(euclidean_distances(query, gallery), direct_distances(query, gallery), rtol=1e-6)


@pytest.mark.parametrize("norm", [1e-3, 1, 5000, 1e6])
def test_identical_embeddings_have_distance_0(norm):
    features = np.random.default_rng(1).standard_normal((64, 1536))
    features = (norm * features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    result = euclidean_distances(features, features)
    assert (result.diagonal() == 0).all()
    assert (result[~np.eye(64, dtype=bool)] > norm / 2).all()


def test_nearly_identical_embeddings_keep_their_distance():
    query = np.full((1, 1536), 130, np.float32)  # norm 5,095
    gallery = query.copy()
    gallery[0, 7] += 0.01
    np.testing.assert_allclose(euclidean_distances(query, gallery), direct_distances(query, gallery), rtol=1e-4)


def test_memory_is_bounded_by_blocks(monkeypatch):
    rng = np.random.default_rng(2)
    query, gallery = rng.standard_normal((10, 4)), rng.standard_normal((7, 4))
    whole = euclidean_distances(query, gallery)
    monkeypatch.setattr(distances, "BLOCK_BYTES", 3 * 7 * 8)
    blocks = list(distances.distance_blocks(query, gallery))
    assert [start for start, _ in blocks] == [0, 3, 6, 9]
    np.testing.assert_allclose(np.concatenate([block for _, block in blocks]), whole, rtol=1e-6)


def test_other_dtypes():
    for dtype in (np.float16, np.int8):
        features = np.random.default_rng(3).integers(-100, 100, (6, 50)).astype(dtype)
        expected = direct_distances(features, features)
        np.testing.assert_allclose(euclidean_distances(features, features), expected, rtol=1e-6)
    large = np.full((2, 100), 60000, np.float16)  # the float16 sum of a row is infinite, the row is not
    assert (euclidean_distances(large, large) == 0).all()


def test_wrong_features_are_refused():
    ones = np.ones((2, 3))
    for query, gallery in ((ones, np.ones((2, 4))), (np.ones(3), ones), (ones, np.ones((0, 3))), (ones, ones * 1j)):
        with pytest.raises(DataError):
            euclidean_distances(query, gallery)
    with pytest.raises(DataError, match=r"gallery features .* row 1"):
        euclidean_distances(ones, [[1, 2, 3], [np.inf, 2, 3], [1, np.nan, 3]])


def test_cosines_and_unit_length():
    rows = np.array([[3, 4], [1, 0], [0, 0], [0, 0], [1, 1]], np.float32)
    others = np.array([[6, 8], [0, 2], [0, 0], [1, 0], [np.nan, 1]], np.float32)
    np.testing.assert_allclose(cosines(rows, others), [1, 0, 1, 0, 0])
    np.testing.assert_allclose(unit_length(rows)[:3], [[0.6, 0.8], [1, 0], [0, 0]], rtol=1e-6)
