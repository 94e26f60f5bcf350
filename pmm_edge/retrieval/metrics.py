"""CMC, mAP and mINP from the ranks of the matches; `evaluate` from embeddings to figures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pmm_edge.errors import DataError
from pmm_edge.progress import Report, silent
from pmm_edge.retrieval.distances import checked_pair, distance_blocks
from pmm_edge.retrieval.protocol import Ranks, add_ranks, checked_labels, empty_ranks
from pmm_edge.retrieval.reranking import rerank_distances
from pmm_edge.spec import RetrievalFigures

PAPER_CUTOFF = 50
"""The paper's released evaluation cuts rankings here before it computes the average precision."""


@dataclass(frozen=True, eq=False)
class RetrievalResult:
    """Retrieval figures, fractions in 0..1, over the queries that have a match in the gallery."""

    mAP: float  # noqa: N815  the field's own spelling
    """Mean average precision, over the whole ranking unless a cut-off was asked for."""
    mAP_at_50: float  # noqa: N815
    """Mean average precision of rankings cut at 50, as in the paper's figures."""
    mINP: float  # noqa: N815
    """Mean over queries of (number of matches) / (rank of the last match)."""
    cmc: NDArray[np.float64]
    """(max_rank,): `cmc[k - 1]` is the share of queries with a match among the first k."""
    valid_queries: int
    """How many queries have a match; the others do not count."""
    average_precision: NDArray[np.float64]
    """(Q,): what mAP is the mean of; NaN for queries without a match."""
    inverse_penalty: NDArray[np.float64]
    """(Q,): what mINP is the mean of; NaN for queries without a match."""
    first_match_rank: NDArray[np.int64]
    """(Q,): the rank, from 1, of each query's first match; 0 for queries without one."""
    top1: NDArray[np.int64]
    """(Q,): gallery index of the image ranked first; -1 where no gallery image counts."""

    def rank(self, k: int) -> float:
        """Rank-k: the share of queries with a match among the first k.

        Raises:
            DataError: k is not in 1..max_rank.
        """
        if not 1 <= k <= len(self.cmc):
            raise DataError(f"Rank-{k} is not in 1..{len(self.cmc)}", "Evaluate with a larger max_rank")
        return float(self.cmc[k - 1])

    def figures(self) -> RetrievalFigures:
        """The four figures that a spec carries and reports tell."""
        return RetrievalFigures(self.rank(1), self.mAP, self.mINP, self.mAP_at_50)


def evaluate(
    query_features: ArrayLike,
    gallery_features: ArrayLike,
    query_pids: ArrayLike,
    gallery_pids: ArrayLike,
    query_camids: ArrayLike,
    gallery_camids: ArrayLike,
    max_rank: int = 50,
    ap_cutoff: int | None = None,
    rerank: bool = False,
    report: Report = silent,
) -> RetrievalResult:
    """Retrieval figures of embeddings under the Market-1501 protocol, Euclidean distance.

    For each query, gallery images of its own identity and camera are left out. Junk (pid -1) is dropped, also
    from re-ranking; distractors (Market-1501: pid 0, which no query has) stay as wrong answers. Queries without
    a match do not count.

    Args:
        query_features: (Q, D) real numbers.
        gallery_features: (G, D) real numbers.
        query_pids: (Q,) integer identities.
        gallery_pids: (G,) integer identities.
        query_camids: (Q,) integer cameras.
        gallery_camids: (G,) integer cameras.
        max_rank: length of the CMC.
        ap_cutoff: cut rankings here for the average precision; 50 gives what the paper calls mAP.
        rerank: rank by k-reciprocal re-ranked distances (k1 20, k2 6, lambda 0.3) instead.
        report: told how many queries are ranked, or with `rerank` how many images have their neighbours.

    Raises:
        DataError: shapes that do not fit, NaN or infinity, or no query with a match.
    """
    query, gallery = checked_pair(query_features, gallery_features)
    shape = (len(query), len(gallery))
    labels = checked_labels(query_pids, gallery_pids, query_camids, gallery_camids, shape)
    _check_ranks(max_rank, ap_cutoff)
    ranks = empty_ranks(len(query))
    if labels.kept is not None:
        # Junk goes before distances are computed: it costs time, and must not be a neighbour in re-ranking.
        gallery = gallery[labels.kept]
    without_junk = labels.without_junk()
    if rerank:
        add_ranks(ranks, rerank_distances(query, gallery, report=report), without_junk)
    else:
        for start, block in distance_blocks(query, gallery):
            add_ranks(ranks, block, without_junk, start)
            report("ranking", start + len(block), len(query))
    if labels.kept is not None:
        ranks.top1[:] = np.where(ranks.top1 >= 0, labels.kept[ranks.top1], -1)
    return _figures(ranks, max_rank, ap_cutoff)


def evaluate_distances(
    distances: ArrayLike,
    query_pids: ArrayLike,
    gallery_pids: ArrayLike,
    query_camids: ArrayLike,
    gallery_camids: ArrayLike,
    max_rank: int = 50,
    ap_cutoff: int | None = None,
) -> RetrievalResult:
    """Retrieval figures of (Q, G) distances, smaller is nearer; otherwise as `evaluate`.

    Raises:
        DataError: shapes that do not fit, NaN or infinity, or no query with a match.
    """
    array = np.asarray(distances)
    if array.ndim != 2 or 0 in array.shape:
        raise DataError(f"distances have shape {array.shape}", "Pass a (queries, gallery images) array")
    if not np.issubdtype(array.dtype, np.floating):
        if not np.issubdtype(array.dtype, np.integer):
            raise DataError(f"distances hold {array.dtype}", "Pass real numbers, e.g. float32")
        array = array.astype(np.float64)
    if array.dtype == np.float16:
        array = array.astype(np.float32)  # the same values, and numpy compares them much faster
    queries, gallery = array.shape
    labels = checked_labels(query_pids, gallery_pids, query_camids, gallery_camids, (queries, gallery))
    _check_ranks(max_rank, ap_cutoff)
    ranks = empty_ranks(queries)
    add_ranks(ranks, array, labels)
    return _figures(ranks, max_rank, ap_cutoff)


def _check_ranks(max_rank: int, ap_cutoff: int | None) -> None:
    for name, value in (("max_rank", max_rank), ("ap_cutoff", ap_cutoff)):
        if value is not None and value < 1:
            raise DataError(f"{name} is {value}", f"Pass a {name} of 1 or more")


def _figures(ranks: Ranks, max_rank: int, ap_cutoff: int | None) -> RetrievalResult:
    counts = np.array([len(positions) for positions in ranks.matches])
    valid = np.flatnonzero(counts)
    if len(valid) == 0:
        raise DataError(
            f"none of {len(counts):,} queries has a match in the gallery from another camera",
            "Check that query and gallery share identities and that the camera ids differ",
        )
    positions = np.concatenate([ranks.matches[query] for query in valid])
    ends = np.cumsum(counts[valid])
    starts = ends - counts[valid]
    precision = (np.arange(len(positions)) - np.repeat(starts, counts[valid]) + 1) / positions

    def average_precision(cutoff: int | None) -> NDArray[np.float64]:
        # Divided by ALL matches, also with a cut-off: what lies beyond is lost, as in the released code.
        counted = precision if cutoff is None else precision * (positions <= cutoff)
        result = np.full(len(counts), np.nan)
        result[valid] = np.add.reduceat(counted, starts) / counts[valid]
        return result

    first = np.zeros(len(counts), np.int64)
    first[valid] = positions[starts]
    hits = np.bincount(first[valid], minlength=max_rank + 1)[1 : max_rank + 1]
    per_query = average_precision(ap_cutoff)
    inverse_penalty = np.full(len(counts), np.nan)
    inverse_penalty[valid] = counts[valid] / positions[ends - 1]
    return RetrievalResult(
        mAP=float(per_query[valid].mean()),
        mAP_at_50=float(average_precision(PAPER_CUTOFF)[valid].mean()),
        mINP=float(inverse_penalty[valid].mean()),
        cmc=np.cumsum(hits) / len(valid),
        valid_queries=len(valid),
        average_precision=per_query,
        inverse_penalty=inverse_penalty,
        first_match_rank=first,
        top1=ranks.top1,
    )
