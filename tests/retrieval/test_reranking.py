"""k-reciprocal re-ranking: golden figures, a slow reference with sets, and degenerate inputs."""

from math import exp
from pathlib import Path

import numpy as np
import pytest

from pmm_edge.retrieval import distances, rerank_distances, reranking

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "retrieval_metrics.npz")


def slow_rerank(query, gallery, k1, k2, lambda_value):
    """Equations 5 to 12 of Zhong et al., with sets and dense rows."""
    images = np.concatenate([query, gallery]).astype(np.float64)
    total = len(images)
    squared = ((images[:, None] - images) ** 2).sum(axis=2)
    squared /= squared.max(axis=1, keepdims=True)
    order = np.argsort(squared, axis=1, kind="stable").tolist()

    def reciprocal(image, k):
        return {other for other in order[image][: k + 1] if image in order[other][: k + 1]}

    encoding = np.zeros((total, total))
    for image in range(total):
        own = reciprocal(image, k1)
        joined = set(own)
        for member in own:
            theirs = reciprocal(member, round(k1 / 2))
            if 3 * len(theirs & own) > 2 * len(theirs):
                joined |= theirs
        for member in joined:
            encoding[image, member] = exp(-squared[image, member])
        encoding[image] /= encoding[image].sum()
    encoding = np.stack([encoding[order[image][:k2]].mean(axis=0) for image in range(total)])
    of_query, of_gallery = encoding[: len(query), None], encoding[None, len(query) :]
    jaccard = 1 - np.minimum(of_query, of_gallery).sum(axis=2) / np.maximum(of_query, of_gallery).sum(axis=2)
    return (1 - lambda_value) * jaccard + lambda_value * squared[: len(query), len(query) :]


def clustered(seed):
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((10, 6))
    images = centers[rng.integers(0, 10, 105)] + 0.5 * rng.standard_normal((105, 6))
    return images[:15], images[15:]


def test_golden_distances():
    result = rerank_distances(GOLDEN["query_features"], GOLDEN["gallery_features"])
    assert result.shape == (120, 900) and result.dtype == np.float32
    np.testing.assert_allclose(result[:8], GOLDEN["reranked_distance_first_rows"], atol=1e-6)


@pytest.mark.parametrize(("k1", "k2", "lambda_value"), [(20, 6, 0.3), (7, 1, 0.0), (5, 3, 0.8), (200, 2, 0.3)])
def test_distances_are_those_of_the_slow_reference(monkeypatch, k1, k2, lambda_value):
    for name, value in (("K1", k1), ("K2", k2), ("LAMBDA", lambda_value)):
        monkeypatch.setattr(reranking, name, value)
    # Parts that do not divide the number of images evenly.
    monkeypatch.setattr(reranking, "_IMAGES_PER_PART", 16)
    monkeypatch.setattr(distances, "BLOCK_BYTES", 8 * 105 * 7)
    query, gallery = clustered(k1)
    result = rerank_distances(query, gallery)
    np.testing.assert_allclose(result, slow_rerank(query, gallery, k1, k2, lambda_value), atol=1e-6)


def test_cosine_is_the_euclidean_distance_of_unit_vectors():
    query, gallery = clustered(2)
    result = rerank_distances(query, gallery, "cosine")
    units = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (query, gallery))
    np.testing.assert_allclose(result, slow_rerank(*units, reranking.K1, reranking.K2, reranking.LAMBDA), atol=1e-6)


def test_degenerate_inputs():
    result = rerank_distances(np.ones((3, 4)), np.ones((60, 4)))
    assert np.isfinite(result).all() and (result >= 0).all() and (result <= 1).all()
    np.testing.assert_allclose(rerank_distances([[0.0]], [[2.0]]), [[0.3]], atol=1e-6)


def test_float16_embeddings_do_not_overflow():
    query, gallery = (np.round(side * 500).astype(np.float16) for side in clustered(1))
    wide = rerank_distances(query.astype(np.float64), gallery.astype(np.float64))
    np.testing.assert_allclose(rerank_distances(query, gallery), wide, atol=1e-6)
