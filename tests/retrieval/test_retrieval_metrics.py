"""CMC, mAP and mINP: golden figures, a slow reference of the protocol, and errors."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pmm_edge as pmm
from pmm_edge.errors import DataError
from pmm_edge.retrieval import distances, evaluate, evaluate_distances, metrics

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "retrieval_metrics.npz")
GOLDEN_INPUTS = [GOLDEN[f"{side}_{what}"] for what in ("features", "pids", "camids") for side in ("query", "gallery")]


def slow_evaluate(distances, query_pids, gallery_pids, query_camids, gallery_camids, max_rank=50, ap_cutoff=None):
    """The protocol from its definition: one query after the other, one rank after the other."""
    result, penalties = SimpleNamespace(average_precision=[], first_match_rank=[], top1=[]), []
    for query, row in enumerate(distances):
        own = (gallery_pids == query_pids[query]) & (gallery_camids == query_camids[query])
        counted = sorted(np.flatnonzero((gallery_pids != -1) & ~own), key=lambda g: (row[g], g))
        ranks = [rank for rank, g in enumerate(counted, 1) if gallery_pids[g] == query_pids[query]]
        result.top1.append(counted[0] if counted else -1)
        result.first_match_rank.append(ranks[0] if ranks else 0)
        precisions = [hits / rank for hits, rank in enumerate(ranks, 1) if ap_cutoff is None or rank <= ap_cutoff]
        result.average_precision.append(sum(precisions) / len(ranks) if ranks else float("nan"))
        penalties += [len(ranks) / ranks[-1]] if ranks else []
    result.valid_queries = len(penalties)
    result.mINP = sum(penalties) / len(penalties)
    result.mAP = np.nansum(result.average_precision) / len(penalties)
    firsts = [rank for rank in result.first_match_rank if rank]
    result.cmc = [sum(rank <= k for rank in firsts) / len(firsts) for k in range(1, max_rank + 1)]
    return result


def random_case(seed, queries=40, gallery=300, levels=None):
    """Random distances with junk, distractors and a query identity that the gallery lacks; `levels` makes ties."""
    rng = np.random.default_rng(seed)
    distances = rng.random((queries, gallery))
    if levels:
        distances = np.floor(distances * levels)
    query_pids = rng.integers(1, 14, queries)
    gallery_pids = rng.integers(-1, 13, gallery)
    return distances, query_pids, gallery_pids, rng.integers(0, 3, queries), rng.integers(0, 3, gallery)


def assert_same_figures(result, slow):
    for name in ("valid_queries", "first_match_rank", "top1"):
        np.testing.assert_array_equal(getattr(result, name), getattr(slow, name))
    for name in ("average_precision", "cmc", "mAP", "mINP"):
        np.testing.assert_allclose(getattr(result, name), getattr(slow, name), rtol=1e-12)


def test_golden_figures():
    result = evaluate(*GOLDEN_INPUTS)
    np.testing.assert_allclose(result.cmc, GOLDEN["cmc"], atol=1e-7)
    np.testing.assert_allclose([result.mAP, result.mAP_at_50], [GOLDEN["mAP"], GOLDEN["mAP_at_50"]], atol=1e-7)
    assert result.rank(1) == result.cmc[0] == pytest.approx(0.35, abs=1e-7) and result.valid_queries == 120
    assert evaluate(*GOLDEN_INPUTS, ap_cutoff=50).mAP == result.mAP_at_50
    reranked = evaluate(*GOLDEN_INPUTS, rerank=True)
    np.testing.assert_allclose(reranked.cmc, GOLDEN["reranked_cmc"], atol=1e-7)
    assert reranked.mAP == pytest.approx(float(GOLDEN["reranked_mAP"]), abs=1e-6)


@pytest.mark.parametrize("levels", [None, 200, 7, 1], ids=lambda levels: f"{levels} levels")
@pytest.mark.parametrize(("ap_cutoff", "count_from"), [(None, 0), (20, 1000)], ids=["by count", "by sort"])
def test_figures_are_those_of_the_slow_reference(monkeypatch, levels, ap_cutoff, count_from):
    monkeypatch.setattr(metrics, "_COUNT_FROM", count_from)
    monkeypatch.setattr(distances, "BLOCK_BYTES", 8 * 300 * 7)  # blocks of seven queries
    for seed in range(4):
        case = random_case(seed, levels=levels)
        result = evaluate_distances(*case, max_rank=30, ap_cutoff=ap_cutoff)
        assert result.valid_queries < 40  # the case has queries without a match
        assert_same_figures(result, slow_evaluate(*case, max_rank=30, ap_cutoff=ap_cutoff))


def test_any_real_dtype_of_distances():
    values, *labels = random_case(5, levels=100)
    for dtype in (np.float16, np.float32, np.int32):
        assert_same_figures(evaluate_distances(values.astype(dtype), *labels), slow_evaluate(values, *labels))


def test_embeddings_give_the_figures_of_their_distances_without_junk():
    rng = np.random.default_rng(3)
    query, gallery = rng.standard_normal((30, 8)), rng.standard_normal((200, 8))
    labels = random_case(3, 30, 200)[1:]
    expected = np.linalg.norm(query[:, None] - gallery, axis=2)
    assert_same_figures(evaluate(query, gallery, *labels), slow_evaluate(expected, *labels))
    kept, reranked = labels[1] != -1, evaluate(query, gallery, *labels, rerank=True)
    without_junk = (labels[0], labels[1][kept], labels[2], labels[3][kept])
    assert reranked.mAP == evaluate(query, gallery[kept], *without_junk, rerank=True).mAP


@pytest.mark.parametrize("rerank", [False, True])
def test_by_cosine_the_length_of_an_embedding_does_not_matter(rerank):
    rng = np.random.default_rng(3)
    _, *labels = random_case(3)
    units = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in rng.standard_normal((2, 300, 16))]
    units[0] = units[0][:40]
    scaled = (side * rng.uniform(0.1, 10, (len(side), 1)) for side in units)
    result = evaluate(*scaled, *labels, rerank=rerank, distance="cosine")
    assert_same_figures(result, evaluate(*units, *labels, rerank=rerank))
    with pytest.raises(DataError, match=r"gallery features .* row 7"):
        units[1][7] = 0
        evaluate(*units, *labels, rerank=rerank, distance="cosine")


def test_a_model_that_maps_all_images_to_one_point_gets_no_credit():
    pids, camids, features = np.repeat(np.arange(1, 51), 4), np.tile([0, 1, 2, 3], 50), np.full((200, 16), 3.7)
    result = evaluate(features[::4], features, pids[::4], pids, camids[::4], camids)
    assert result.rank(1) == 0.02 and result.mAP < 0.1  # the first query alone: its images come first in the gallery


def test_cmc_has_max_rank_values_for_a_shorter_gallery():
    result = evaluate_distances([[0.2, 0.1]], [1], [1, 2], [0], [1, 1], max_rank=5)
    np.testing.assert_array_equal(result.cmc, [0, 1, 1, 1, 1])
    assert (result.mAP, result.mINP, result.rank(1), result.rank(2)) == (0.5, 0.5, 0.0, 1.0)
    with pytest.raises(DataError):
        result.rank(6)
    result = evaluate_distances([[0.5], [0.5]], [1, 1], [1], [0, 1], [0])  # no image is left for the first query
    assert (result.top1.tolist(), result.valid_queries) == ([-1, 0], 1)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_tensors_with_gradients_and_of_any_precision(dtype):
    query, gallery = (torch.eye(4)[[0, 1]].to(getattr(torch, dtype)) for _ in range(2))
    labels = [torch.tensor(values) for values in ([1, 2], [1, 2], [0, 0], [1, 1])]
    assert evaluate(query.requires_grad_(), gallery.requires_grad_(), *labels).mAP == 1
    with pytest.raises(DataError):
        evaluate([query[0], query[1]], gallery.to_sparse(), *labels)


GOOD = {
    "distances": np.ones((2, 3)),
    "query_pids": [1, 2],
    "gallery_pids": [1, 2, 0],
    "query_camids": [0, 0],
    "gallery_camids": [1, 1, 1],
}
CHANGES = (
    *({"distances": np.ones(3)}, {"distances": np.ones((0, 3))}, {"distances": np.full((2, 3), "a")}),
    *({"distances": [[1, 2, 3], [1, np.nan, 3]]}, {"distances": [[1, np.inf, 3], [1, -np.inf, 3]]}),
    *({"query_pids": [1]}, {"query_pids": [7, 8]}, {"gallery_pids": [1.0, 2.0, 0.0]}, {"gallery_pids": [-1, -1, -1]}),
    *({"gallery_camids": [1, 1]}, {"gallery_camids": [0, 0, 0]}),
)


@pytest.mark.parametrize("change", CHANGES, ids=repr)
def test_wrong_input_is_refused(change):
    with pytest.raises(DataError):
        evaluate_distances(*{**GOOD, **change}.values())


def test_the_error_names_the_query_or_the_setting(monkeypatch):
    monkeypatch.setattr(distances, "BLOCK_BYTES", 1)  # a query is a block
    for settings, named in (({}, "query 1 "), ({"max_rank": 0}, "max_rank"), ({"ap_cutoff": 0}, "ap_cutoff")):
        with pytest.raises(DataError, match=named):
            evaluate_distances([[1, 2, 3], [1, np.nan, 3]], *[*GOOD.values()][1:], **settings)


def test_evaluation_needs_no_torch():
    code = "import sys, pmm_edge; pmm_edge.evaluate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0 and pmm.evaluate is evaluate
