"""The Market-1501 protocol: which gallery images count for a query, and at which rank its matches stand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pmm_edge.console import Report, silent
from pmm_edge.errors import DataError
from pmm_edge.retrieval.distances import checked_pair, describe_not_finite, distance_blocks
from pmm_edge.retrieval.reranking import rerank_distances
from pmm_edge.spec import RetrievalFigures

JUNK_PID = -1
"""Market-1501 marks so what shows neither a person nor a clean distractor: neither right nor wrong, it is dropped."""

_SORT_FROM = 64
"""Above this many matches one sort of the row is cheaper than two passes over the row for each match."""
_FEW = 4
"""Taking out the part of a row that matters pays where it is less than one in so many."""


@dataclass(frozen=True)
class Labels:
    """Who matches whom: the cameras of Q queries and of the gallery, and the gallery grouped by identity."""

    query_camids: NDArray[np.int64]
    gallery_camids: NDArray[np.int64]
    """Of the kept gallery."""
    kept: NDArray[np.intp] | None
    """The gallery indices that are no junk, ascending; None where all are kept."""
    by_pid: NDArray[np.intp]
    """Positions in the kept gallery, grouped by identity, ascending within each."""
    group: NDArray[np.intp]
    """(Q, 2): the slice [start, stop) of `by_pid` that holds the query's identity."""

    @property
    def gallery_size(self) -> int:
        """How many gallery images are kept."""
        return len(self.by_pid)

    def without_junk(self) -> Labels:
        """The labels of a gallery that its junk has been taken out of."""
        return replace(self, kept=None)

    def matches_and_left_out(self, query: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Positions of the query's identity in the kept gallery: from other cameras, and from its own."""
        start, stop = self.group[query]
        own = self.by_pid[start:stop]
        same_camera = self.gallery_camids[own] == self.query_camids[query]
        return own[~same_camera], own[same_camera]


@dataclass(frozen=True)
class Ranks:
    """Where the matches of Q queries stand, filled row block by row block.

    `matches[q]` holds the ranks (from 1, ascending, int64) of query q's matches among the gallery images that
    count for it; empty where it has none.
    """

    matches: list[NDArray[np.int64]]
    top1: NDArray[np.int64]
    """(Q,): gallery index of the nearest image that counts; -1 where none is left."""


def _checked_labels(values: ArrayLike, name: str, count: int) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.shape != (count,):
        raise DataError(f"{name} have shape {array.shape}, expected ({count},)", "Pass one for each image")
    if not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"{name} hold {array.dtype}", "Pass integers")
    return array.astype(np.int64)


def checked_labels(
    query_pids: ArrayLike,
    gallery_pids: ArrayLike,
    query_camids: ArrayLike,
    gallery_camids: ArrayLike,
    shape: tuple[int, int],
) -> Labels:
    """Check the labels of `shape` = (Q, G) images and group the gallery by identity.

    Raises:
        DataError: a wrong number of labels, labels that are no integers, a gallery of nothing but junk.
    """
    queries, gallery = shape
    all_pids = _checked_labels(gallery_pids, "gallery pids", gallery)
    all_camids = _checked_labels(gallery_camids, "gallery camids", gallery)
    pids = _checked_labels(query_pids, "query pids", queries)
    kept = np.flatnonzero(all_pids != JUNK_PID)
    if len(kept) == 0:
        raise DataError(f"all {gallery:,} gallery images are junk (pid {JUNK_PID})", "Check the labels")
    kept_pids = all_pids[kept]
    by_pid = np.argsort(kept_pids, kind="stable")
    in_order = kept_pids[by_pid]
    sides = [np.searchsorted(in_order, pids, "left"), np.searchsorted(in_order, pids, "right")]
    return Labels(
        query_camids=_checked_labels(query_camids, "query camids", queries),
        gallery_camids=all_camids[kept],
        kept=None if len(kept) == gallery else kept,
        by_pid=by_pid,
        group=np.stack(sides, axis=1),
    )


def empty_ranks(queries: int) -> Ranks:
    """Ranks of no query yet."""
    return Ranks([np.empty(0, np.int64)] * queries, np.full(queries, -1, np.int64))


def add_ranks(ranks: Ranks, distances: NDArray[Any], labels: Labels, first_query: int = 0) -> None:
    """Fill in the ranks of the queries `first_query` and on, from their (rows, G) distances.

    Equal distances rank by gallery index, as a stable sort would: a model that puts all images in one place
    gets no credit for it.

    Raises:
        DataError: NaN or infinity among the distances.
    """
    if bad := describe_not_finite(distances):
        raise DataError(f"distances: {bad}", "Check the embeddings they were computed from")
    # One thread: the steps are short and take Python's lock in turn; two measured no faster, often slower.
    row = np.empty(labels.gallery_size, distances.dtype)
    for i in range(len(distances)):
        _rank_query(ranks, distances[i], labels, first_query + i, row)


def _rank_query(ranks: Ranks, distances: NDArray[Any], labels: Labels, query: int, row: NDArray[Any]) -> None:
    """Rank one query; `row` is (kept gallery,) scratch space."""
    matches, left_out = labels.matches_and_left_out(query)
    if labels.kept is None:
        np.copyto(row, distances)
    else:
        np.take(distances, labels.kept, out=row, mode="clip")  # "raise" would buffer; the indices are ours
    row[left_out] = np.inf
    nearest = int(row.argmin())
    if row[nearest] < np.inf:
        ranks.top1[query] = nearest if labels.kept is None else labels.kept[nearest]
    if len(matches):
        ranks.matches[query] = np.sort(_positions(row, matches)) + 1


def _positions(row: NDArray[Any], matches: NDArray[np.intp]) -> NDArray[np.int64]:
    """Find the matches' positions (from 0) in a stable sort of the row."""
    up_to_last = row <= row[matches].max()
    if np.count_nonzero(up_to_last) * _FEW < len(row):
        # What lies behind the last match changes no position; a trained model leaves little before it.
        near = np.flatnonzero(up_to_last)
        row, matches = row[near], np.searchsorted(near, matches)
    return (_positions_by_sort if len(matches) > _SORT_FROM else _positions_by_count)(row, matches)


def _positions_by_count(row: NDArray[Any], matches: NDArray[np.intp]) -> NDArray[np.int64]:
    """Find the positions by counting what is smaller than each match."""
    values = row[matches]
    mask = row <= values[:, None]
    positions = np.array([np.count_nonzero(up_to) for up_to in mask], np.int64) - 1
    np.less(row, values[:, None], out=mask)
    if np.count_nonzero(mask) != positions.sum():  # something ties with a match
        for slot, below in enumerate(mask):
            positions[slot] = np.count_nonzero(below) + _equal_before(row, matches[slot])
    return positions


def _positions_by_sort(row: NDArray[Any], matches: NDArray[np.intp]) -> NDArray[np.int64]:
    """Find the positions by sorting the values, which is much faster than sorting indices."""
    values = row[matches]
    in_order = np.sort(row)
    positions = np.searchsorted(in_order, values, "left").astype(np.int64)
    tied = np.searchsorted(in_order, values, "right") - positions > 1
    for slot in np.flatnonzero(tied):
        positions[slot] += _equal_before(row, matches[slot])
    return positions


def _equal_before(row: NDArray[Any], index: np.intp) -> int:
    return int(np.count_nonzero(row[:index] == row[index]))


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
