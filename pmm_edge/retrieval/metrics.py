"""Retrieval metrics under the Market-1501 protocol: CMC, mAP and mINP.

For each query, gallery images of its own identity and camera are excluded, junk is dropped, and the others are ranked
by distance. The metrics depend on the ranks of the matches: the remaining images of the query's identity.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pmm_edge.console import Report, silent
from pmm_edge.errors import DataError
from pmm_edge.retrieval.distances import check_matrix, check_pair, distance_blocks, first_not_finite, rows_per_block
from pmm_edge.retrieval.reranking import rerank_distances
from pmm_edge.spec import RetrievalFigures

JUNK_PID = -1
"""Market-1501's label of images that are neither a person nor a distractor. They are dropped from the gallery."""
PAPER_CUTOFF = 50
"""The evaluation code that the paper's authors released cuts rankings here before the average precision."""

_SORT_FROM = 64
"""With more matches than this, sorting the row is faster than two passes over the row for each match."""

Blocks = Iterable[tuple[int, NDArray[Any]]]
"""`(first query, (rows, G) distances)`, block after block."""


@dataclass(frozen=True, eq=False)
class RetrievalResult:
    """Retrieval figures, as fractions in 0..1, over the queries that have a match in the gallery."""

    mAP: float  # noqa: N815  the usual spelling
    """Mean average precision, of the whole ranking or up to `ap_cutoff`."""
    mAP_at_50: float  # noqa: N815
    """Mean average precision of rankings cut at 50, which the paper calls mAP."""
    mINP: float  # noqa: N815
    """Mean inverse negative penalty: the number of matches divided by the rank of the last one (Ye et al., 2021)."""
    cmc: NDArray[np.float64]
    """(max_rank,): `cmc[k - 1]` is the fraction of queries with a match among the first k."""
    valid_queries: int
    average_precision: NDArray[np.float64]
    """(Q,), NaN for a query without a match."""
    inverse_penalty: NDArray[np.float64]
    """(Q,), NaN for a query without a match."""
    first_match_rank: NDArray[np.int64]
    """(Q,): the rank of each query's first match, starting at 1; 0 without a match."""
    top1: NDArray[np.int64]
    """(Q,): the gallery index of the image ranked first; -1 if all images are excluded."""

    def rank(self, k: int) -> float:
        """Rank-k: the fraction of queries with a match among the first k, at most `max_rank`."""
        if not 1 <= k <= len(self.cmc):
            raise DataError(f"Rank-{k} is not in 1..{len(self.cmc)}", "Evaluate with a larger max_rank")
        return float(self.cmc[k - 1])

    def figures(self) -> RetrievalFigures:
        """The four figures that model specs and reports contain."""
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
    """Evaluate embeddings by Euclidean distance under the Market-1501 protocol.

    Gallery images of a query's own identity and camera are excluded. Junk (pid -1) is dropped, also from re-ranking;
    distractors (pid 0 in Market-1501, which no query has) count as wrong answers. Queries without a match do not count.

    Raises DataError for wrong shapes, NaN or infinity, or if no query has a match.

    Args:
        query_features, gallery_features: (Q, D) and (G, D) real numbers.
        query_pids, gallery_pids: (Q,) and (G,) integer identities.
        query_camids, gallery_camids: (Q,) and (G,) integer cameras.
        max_rank: length of the CMC.
        ap_cutoff: cut rankings here for the average precision; 50 gives what the paper calls mAP.
        rerank: rank by k-reciprocal re-ranked distances (k1 20, k2 6, lambda 0.3).
        report: called with the number of ranked queries, or of images with known neighbors if `rerank`.

    Example:
        >>> result = pmm.evaluate([[0.0, 1.0]], [[0.0, 1.1], [3.0, 1.0]], [7], [7, 8], [1], [2, 2])
        >>> result.rank(1), result.mAP
        (1.0, 1.0)
    """
    query, gallery = check_pair(query_features, gallery_features)
    labels = check_labels(query_pids, gallery_pids, query_camids, gallery_camids, (len(query), len(gallery)))
    if len(labels.kept) < len(gallery):
        # Before computing distances: junk costs time, and it must not be a neighbor in re-ranking.
        gallery = gallery[labels.kept]
    if rerank:
        return _figures([(0, rerank_distances(query, gallery, report=report))], labels, max_rank, ap_cutoff)
    return _figures(distance_blocks(query, gallery), labels, max_rank, ap_cutoff, report)


def evaluate_distances(
    distances: ArrayLike,
    query_pids: ArrayLike,
    gallery_pids: ArrayLike,
    query_camids: ArrayLike,
    gallery_camids: ArrayLike,
    max_rank: int = 50,
    ap_cutoff: int | None = None,
) -> RetrievalResult:
    """Evaluate (Q, G) distances, where smaller is nearer. Everything else is as in `evaluate`."""
    array = check_matrix(distances, "distances", "Pass a (queries, gallery images) array")
    if array.dtype == np.float16:
        array = array.astype(np.float32)  # the same values; numpy compares them much faster
    queries, gallery = array.shape
    labels = check_labels(query_pids, gallery_pids, query_camids, gallery_camids, (queries, gallery))
    step = rows_per_block(gallery)
    blocks = ((start, array[start : start + step]) for start in range(0, queries, step))
    if len(labels.kept) < gallery:
        blocks = ((start, np.take(block, labels.kept, axis=1)) for start, block in blocks)
    return _figures(blocks, labels, max_rank, ap_cutoff)


@dataclass(frozen=True)
class ProtocolLabels:
    """Which gallery images match a query; the gallery is grouped by identity."""

    kept: NDArray[np.intp]
    """Indices of the gallery images that are not junk, ascending. Positions below are positions in this array."""
    query_camids: NDArray[np.int64]
    gallery_camids: NDArray[np.int64]  # without junk
    by_pid: NDArray[np.intp]
    """Positions grouped by identity, ascending within each."""
    group: NDArray[np.intp]
    """(Q, 2): start and stop of the query's identity in `by_pid`."""

    def matches(self, query: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Positions of the query's identity: the matches, from other cameras, and the images that are excluded."""
        start, stop = self.group[query]
        own = self.by_pid[start:stop]
        same_camera = self.gallery_camids[own] == self.query_camids[query]
        return own[~same_camera], own[same_camera]


def check_labels(
    query_pids: ArrayLike,
    gallery_pids: ArrayLike,
    query_camids: ArrayLike,
    gallery_camids: ArrayLike,
    shape: tuple[int, int],
) -> ProtocolLabels:
    """Check the labels of `shape` = (Q, G) images and group the gallery by identity.

    Raises DataError unless there is an integer for each image, and a gallery image that is not junk.
    """
    queries, gallery = shape
    all_pids = _checked_labels(gallery_pids, "gallery pids", gallery)
    pids = _checked_labels(query_pids, "query pids", queries)
    kept = np.flatnonzero(all_pids != JUNK_PID)
    if len(kept) == 0:
        raise DataError(f"all {gallery:,} gallery images are junk (pid {JUNK_PID})", "Check the labels")
    by_pid = np.argsort(all_pids[kept], kind="stable")
    in_order = all_pids[kept][by_pid]
    return ProtocolLabels(
        kept=kept,
        query_camids=_checked_labels(query_camids, "query camids", queries),
        gallery_camids=_checked_labels(gallery_camids, "gallery camids", gallery)[kept],
        by_pid=by_pid,
        group=np.stack([np.searchsorted(in_order, pids, side) for side in ("left", "right")], axis=1),
    )


def _checked_labels(values: ArrayLike, name: str, count: int) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.shape != (count,):
        raise DataError(f"{name} have shape {array.shape}, expected ({count},)", "Pass one for each image")
    if not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"{name} have dtype {array.dtype}", "Pass integers")
    return array.astype(np.int64)


def _figures(
    blocks: Blocks, labels: ProtocolLabels, max_rank: int, ap_cutoff: int | None, report: Report = silent
) -> RetrievalResult:
    """Rank the queries of all blocks and average. The blocks have the columns `labels.kept`."""
    for name, value in (("max_rank", max_rank), ("ap_cutoff", ap_cutoff)):
        if value is not None and value < 1:
            raise DataError(f"{name} is {value}", f"Pass a {name} of 1 or more")
    ranks, top1 = _rank(blocks, labels, report)
    counts = np.array([len(matches) for matches in ranks])
    valid = np.flatnonzero(counts)
    if len(valid) == 0:
        problem = f"none of {len(counts):,} queries has a match in the gallery from another camera"
        raise DataError(problem, "Check that query and gallery share identities and that their camera ids differ")
    positions = np.concatenate([ranks[query] for query in valid])
    ends = np.cumsum(counts[valid])
    starts = ends - counts[valid]
    precision = (np.arange(len(positions)) - np.repeat(starts, counts[valid]) + 1) / positions

    def per_query(values: NDArray[Any]) -> NDArray[np.float64]:
        result = np.full(len(counts), np.nan)
        result[valid] = values
        return result

    def average_precision(cutoff: int | None) -> NDArray[np.float64]:
        # Divided by ALL matches even with a cutoff: matches beyond it are lost, as in the released code.
        counted = precision if cutoff is None else precision * (positions <= cutoff)
        return np.asarray(np.add.reduceat(counted, starts) / counts[valid])

    first = np.zeros(len(counts), np.int64)
    first[valid] = positions[starts]
    hits = np.bincount(first[valid], minlength=max_rank + 1)[1 : max_rank + 1]
    precisions, inverse_penalties = average_precision(ap_cutoff), counts[valid] / positions[ends - 1]
    return RetrievalResult(
        mAP=float(precisions.mean()),
        mAP_at_50=float(average_precision(PAPER_CUTOFF).mean()),
        mINP=float(inverse_penalties.mean()),
        cmc=np.cumsum(hits) / len(valid),
        valid_queries=len(valid),
        average_precision=per_query(precisions),
        inverse_penalty=per_query(inverse_penalties),
        first_match_rank=first,
        top1=top1,
    )


def _rank(blocks: Blocks, labels: ProtocolLabels, report: Report) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
    """Return the ranks of each query's matches, ascending from 1, and the gallery index of its nearest image.

    Equal distances rank by gallery index, as in a stable sort: a model that maps all images to one point gets no
    credit. One thread, because the steps are short and hold the GIL: two threads were often slower.
    """
    queries = len(labels.query_camids)
    ranks: list[NDArray[np.int64]] = []
    top1 = np.full(queries, -1, np.int64)
    for start, block in blocks:
        if (row := first_not_finite(block)) is not None:
            problem = f"the distances of query {start + row} contain NaN or infinity"
            raise DataError(problem, "Check the embeddings that they were computed from")
        ranked = np.empty(len(labels.kept), block.dtype)
        for query, distances in enumerate(block, start):
            matches, excluded = labels.matches(query)
            np.copyto(ranked, distances)
            ranked[excluded] = np.inf
            nearest = ranked.argmin()
            if ranked[nearest] < np.inf:
                top1[query] = labels.kept[nearest]
            ranks.append(np.sort(_positions(ranked, matches)) + 1 if len(matches) else np.empty(0, np.int64))
        report("ranking", start + len(block), queries)
    return ranks, top1


def _positions(row: NDArray[Any], matches: NDArray[np.intp]) -> NDArray[np.int64]:
    """Find the positions of the matches, starting at 0, in a stable sort of the row."""
    values = row[matches]
    up_to_last = row <= values.max()
    # Images beyond the last match do not change a position, and a trained model leaves few before it.
    near = row[np.flatnonzero(up_to_last)] if np.count_nonzero(up_to_last) * 4 < len(row) else row
    tied = np.empty(0, np.intp)
    if len(matches) > _SORT_FROM:
        in_order = np.sort(near)
        positions = np.searchsorted(in_order, values, "left")
        tied = np.flatnonzero(np.searchsorted(in_order, values, "right") - positions > 1)
    else:
        mask = near <= values[:, None]
        positions = np.array([np.count_nonzero(up_to) for up_to in mask]) - 1
        np.less(near, values[:, None], out=mask)
        if np.count_nonzero(mask) != positions.sum():
            positions, tied = mask.sum(axis=1), np.arange(len(matches))
    for slot in tied:  # equal distances rank by gallery index
        positions[slot] += np.count_nonzero(row[: matches[slot]] == values[slot])
    return positions
