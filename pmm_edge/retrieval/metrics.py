"""Retrieval metrics under the Market-1501 protocol: CMC, mAP and mINP.

For each query, gallery images of its own identity and camera are excluded, junk is dropped, and the others are ranked
by distance. The metrics depend on the ranks of the matches: the remaining images of the query's identity.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pmm_edge.console import Report, silent
from pmm_edge.errors import DataError
from pmm_edge.retrieval.distances import as_array, check_matrix, check_pair, distance_blocks, rows_per_block
from pmm_edge.retrieval.reranking import rerank_distances
from pmm_edge.spec import Distance, RetrievalFigures

JUNK_PID, DISTRACTOR_PID = -1, 0
"""Market-1501's labels of gallery images that no query looks for. Junk is neither a person nor a distractor and is
dropped; distractors show people outside the query set and count as wrong answers."""
_COUNT_FROM = 64  # with more images than this for each match, counting is faster than sorting
PAPER_CUTOFF = 50  # the released evaluation code cuts rankings here before the average precision


@dataclass(frozen=True, eq=False)
class RetrievalResult:
    """Retrieval figures, as fractions in 0..1, over the queries that have a match in the gallery.

    `mAP` is the mean average precision of the whole ranking or up to `ap_cutoff`, `mAP_at_50` that of rankings cut at
    50, which the paper calls mAP. `mINP` is the mean inverse negative penalty: the number of matches divided by the
    rank of the last one (Ye et al., 2021). The values of (Q,) queries without a match are NaN and rank 0.
    """

    mAP: float  # noqa: N815  the usual spelling
    mAP_at_50: float  # noqa: N815
    mINP: float  # noqa: N815
    cmc: NDArray[np.float64]  # (max_rank,): `cmc[k - 1]` is the fraction of queries with a match among the first k
    valid_queries: int
    average_precision: NDArray[np.float64]  # (Q,)
    inverse_penalty: NDArray[np.float64]  # (Q,)
    first_match_rank: NDArray[np.int64]  # (Q,), from 1
    top1: NDArray[np.int64]  # (Q,): gallery index of the image ranked first; -1 if all images are excluded

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
    distance: Distance = "euclidean",
    report: Report = silent,
) -> RetrievalResult:
    """Evaluate embeddings by Euclidean or cosine distance under the Market-1501 protocol.

    Gallery images of a query's own identity and camera are excluded. Junk (pid -1) is dropped, also from re-ranking;
    distractors (pid 0 in Market-1501, which no query has) count as wrong answers. Queries without a match do not count.
    A query of pid 0 is taken for a person: `evaluate_dataset` leaves out such queries of a data set.

    Raises DataError for wrong shapes, NaN or infinity, if no query has a match, or if an embedding has no cosine
    because its length is 0.

    Args:
        query_features, gallery_features: (Q, D) and (G, D) real numbers; arrays, or tensors on any device.
        query_pids, gallery_pids, query_camids, gallery_camids: (Q,) and (G,) integer identities and cameras.
        max_rank: length of the CMC.
        ap_cutoff: cut rankings here for the average precision; 50 gives what the paper calls mAP.
        rerank: rank by k-reciprocal re-ranked distances (k1 20, k2 6, lambda 0.3).
        distance: `cosine` ranks by 1 - cosine, as most trackers match.
        report: called with the number of ranked queries, or of images with known neighbors if `rerank`.

    Example:
        >>> result = pmm.evaluate([[0.0, 1.0]], [[0.0, 1.1], [3.0, 1.0]], [7], [7, 8], [1], [2, 2])
        >>> result.rank(1), result.mAP
        (1.0, 1.0)
    """
    query, gallery = check_pair(query_features, gallery_features, distance)
    labels = check_labels((query_pids, gallery_pids, query_camids, gallery_camids), (len(query), len(gallery)))
    gallery = gallery[labels.kept]  # now: distances of junk cost time, and it must not be a neighbor in re-ranking
    if rerank:  # cosine distances: Euclidean ones of the unit vectors that the pair now holds
        return _figures([(0, rerank_distances(query, gallery, report=report))], labels, max_rank, ap_cutoff)
    return _figures(distance_blocks(query, gallery, distance), labels, max_rank, ap_cutoff, report)


def evaluate_distances(
    distances: ArrayLike, *labels: ArrayLike, max_rank: int = 50, ap_cutoff: int | None = None
) -> RetrievalResult:
    """Evaluate (Q, G) distances, where smaller is nearer. The labels and everything else are as in `evaluate`."""
    array = check_matrix(distances, "distances")
    if array.dtype == np.float16:
        array = array.astype(np.float32)  # the same values; numpy compares them much faster
    checked, step = check_labels(labels, array.shape), rows_per_block(array.shape[1])
    columns = checked.kept if len(checked.kept) < array.shape[1] else slice(None)
    blocks = ((start, array[start : start + step, columns]) for start in range(0, len(array), step))
    return _figures(blocks, checked, max_rank, ap_cutoff)


class ProtocolLabels(NamedTuple):
    """Checked labels of (Q,) queries and of the gallery images that are not junk."""

    kept: NDArray[np.intp]  # indices of these gallery images, ascending; positions below are in this array
    by_pid: NDArray[np.intp]  # positions grouped by identity, ascending within each
    group: NDArray[np.intp]  # (Q, 2): start and stop of the query's identity in `by_pid`
    query_camids: NDArray[np.int64]
    gallery_camids: NDArray[np.int64]

    def matches(self, query: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Positions of the query's identity: the matches, from other cameras, and the images that are excluded."""
        own = self.by_pid[slice(*self.group[query])]
        same_camera = self.gallery_camids[own] == self.query_camids[query]
        return own[~same_camera], own[same_camera]


def check_labels(labels: Sequence[ArrayLike], shape: tuple[int, ...]) -> ProtocolLabels:
    """Check the integer pids of Q queries and G gallery images, and their cameras; raise DataError if one is wrong."""
    checked = []
    names = "query pids", "gallery pids", "query camids", "gallery camids"
    for name, values, count in zip(names, labels, 2 * shape, strict=True):
        array = as_array(values, name)
        if array.shape != (count,):
            raise DataError(f"{name} have shape {array.shape}, expected ({count},)", "Pass one for each image")
        if not np.issubdtype(array.dtype, np.integer):
            raise DataError(f"{name} have dtype {array.dtype}", "Pass integers")
        checked.append(array.astype(np.int64))
    kept = np.flatnonzero(checked[1] != JUNK_PID)
    if not len(kept):
        raise DataError(f"all {shape[1]:,} gallery images are junk (pid {JUNK_PID})", "Check the labels")
    by_pid = np.argsort(checked[1][kept], kind="stable")
    in_order = checked[1][kept][by_pid]
    group = np.stack([np.searchsorted(in_order, checked[0], side) for side in ("left", "right")], axis=1)
    return ProtocolLabels(kept, by_pid, group, checked[2], checked[3][kept])


def _figures(
    blocks: Iterable[tuple[int, NDArray[Any]]],
    labels: ProtocolLabels,
    max_rank: int,
    ap_cutoff: int | None,
    report: Report = silent,
) -> RetrievalResult:
    """Rank all queries and average. A block is `(first query, (rows, len(labels.kept)) distances)`.

    Equal distances rank by gallery index, as in a stable sort: a model that maps all images to one point gets no
    credit. One thread, because the steps are short and hold the GIL: two threads were often slower.
    """
    for name, value in (("max_rank", max_rank), ("ap_cutoff", ap_cutoff)):
        if value is not None and value < 1:
            raise DataError(f"{name} is {value}", f"Pass a {name} of 1 or more")
    queries = len(labels.query_camids)
    ranks: list[NDArray[np.int64]] = []  # of each query's matches, ascending from 1
    top1 = np.full(queries, -1, np.int64)
    for start, block in blocks:
        with np.errstate(invalid="ignore", over="ignore"):
            finite = np.isfinite(block.sum(axis=1))
        if not finite.all():
            problem = f"the distances of query {start + finite.argmin()} contain NaN or infinity"
            raise DataError(problem, "Check the embeddings that they were computed from")
        for query, row in enumerate(block, start):
            (matches, excluded), distances = labels.matches(query), row.copy()
            distances[excluded] = np.inf
            nearest = distances.argmin()
            if distances[nearest] < np.inf:
                top1[query] = labels.kept[nearest]
            ranks.append(_ranks(distances, matches) if len(matches) else np.empty(0, np.int64))
        report("ranking", start + len(block), queries)

    counts = np.array([len(matches) for matches in ranks])
    valid = np.flatnonzero(counts)
    if not len(valid):
        problem = f"none of {queries:,} queries has a match in the gallery from another camera"
        raise DataError(problem, "Check that query and gallery share identities and that their camera ids differ")
    matches, counts = np.concatenate(ranks), counts[valid]
    ends = np.cumsum(counts)
    starts = ends - counts
    precision = (np.arange(len(matches)) - np.repeat(starts, counts) + 1) / matches

    def average_precision(cutoff: float) -> NDArray[np.float64]:
        # Divided by ALL matches even with a cutoff: matches beyond it are lost, as in the released code.
        return np.asarray(np.add.reduceat(precision * (matches <= cutoff), starts) / counts)

    first = np.zeros(queries, np.int64)
    first[valid] = matches[starts]
    precisions, penalties = np.full((2, queries), np.nan)
    precisions[valid], penalties[valid] = average_precision(ap_cutoff or np.inf), counts / matches[ends - 1]
    return RetrievalResult(
        mAP=float(precisions[valid].mean()),
        mAP_at_50=float(average_precision(PAPER_CUTOFF).mean()),
        mINP=float(penalties[valid].mean()),
        cmc=np.cumsum(np.bincount(first[valid], minlength=max_rank + 1)[1 : max_rank + 1]) / len(valid),
        valid_queries=len(valid),
        average_precision=precisions,
        inverse_penalty=penalties,
        first_match_rank=first,
        top1=top1,
    )


def _ranks(row: NDArray[Any], matches: NDArray[np.intp]) -> NDArray[np.int64]:
    """Find the ranks of the matches, ascending from 1, in a stable sort of the row."""
    values = row[matches]
    near = row <= values.max()  # images beyond the last match do not change a rank
    if np.count_nonzero(near) > _COUNT_FROM * len(values):  # a trained model leaves few
        compared = row < values[:, None]
        before = np.array([*map(np.count_nonzero, compared)])
        last = np.array([*map(np.count_nonzero, np.less_equal(row, values[:, None], out=compared))])
    else:
        in_order = np.sort(row[near])
        before, last = (np.searchsorted(in_order, values, side) for side in ("left", "right"))
    for slot in np.flatnonzero(last - before > 1):  # equal distances rank by gallery index
        before[slot] += np.count_nonzero(row[: matches[slot]] == values[slot])
    return np.sort(before) + 1
