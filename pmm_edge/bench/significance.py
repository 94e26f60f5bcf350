"""What a model's departures do to retrieval, and whether so few queries can show that it holds its gate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pmm_edge.bench.figures import Change, FirstHit, Gates, RetrievalChange
from pmm_edge.data.dataset import ReidDataset
from pmm_edge.retrieval import RetrievalResult

RESAMPLES = 2000
SEED = 0
"""Two runs on the same embeddings give the same interval."""
_AT_ONCE = 100  # resamples: of 11,659 queries, the largest public set, 10 MB


def retrieval_change(reference: RetrievalResult, candidate: RetrievalResult, dataset: ReidDataset) -> RetrievalChange:
    """A model's retrieval less its reference's, query by query."""
    rank1, mean_ap, mean_inp = paired_changes(
        np.stack([_per_query(candidate)[row] - _per_query(reference)[row] for row in range(3)], axis=1)
    )
    return RetrievalChange(
        rank1=rank1,
        mAP=mean_ap,
        mINP=mean_inp,
        queries=reference.valid_queries,
        first_hits=first_hits(reference, candidate, dataset),
    )


def paired_changes(differences: NDArray[np.float64]) -> list[Change]:
    """The mean of each column with a 95 % interval: percentiles of a bootstrap over rows (Efron, 1979).

    Rows are drawn with replacement, all columns with the same rows: the queries are the sample, and both models
    answered the same ones, so that how hard a query is cancels out.

    Args:
        differences: (queries, figures), finite, one query or more.
    """
    random = np.random.default_rng(SEED)
    count = len(differences)
    means = []
    for start in range(0, RESAMPLES, _AT_ONCE):
        rows = random.integers(0, count, (min(_AT_ONCE, RESAMPLES - start), count), dtype=np.int32)
        means.append(np.stack([column[rows].mean(axis=1) for column in differences.T], axis=1))
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5), axis=0)
    return [Change(*map(float, figures)) for figures in zip(differences.mean(axis=0), low, high, strict=True)]


def first_hits(reference: RetrievalResult, candidate: RetrievalResult, dataset: ReidDataset) -> list[FirstHit]:
    """The queries that another image comes first for: those that became wrong first, those that became right last."""
    query, gallery = dataset.query, dataset.gallery

    def hit(index: int, number: int) -> tuple[str, bool]:
        if index < 0:
            return "", False
        return str(gallery.paths[index]), bool(gallery.pids[index] == query.pids[number])

    changed = np.flatnonzero((reference.top1 != candidate.top1) & (reference.first_match_rank > 0))
    before, now = reference.top1.tolist(), candidate.top1.tolist()
    hits = [
        FirstHit(str(query.paths[number]), *hit(before[number], number), *hit(now[number], number))
        for number in changed.tolist()
    ]
    return sorted(hits, key=lambda one: int(one.model_right) - int(one.reference_right))


def few_queries(changes: Sequence[RetrievalChange], gates: Sequence[Gates] = ()) -> str | None:
    """A warning where a model holds its gate on mAP and the queries do not show that it would on others.

    Args:
        changes: of each model, all on the same queries.
        gates: those that each model had to hold; the usual ones where none are given.

    Returns:
        What was shown and what not; None where each interval of a model that passes lies within what its gate allows.
    """
    allowed = [one.max_map_drop for one in gates] or [Gates().max_map_drop] * len(changes)
    unsure = [
        (-100 * change.mAP.low, most)
        for change, most in zip(changes, allowed, strict=True)
        if -100 * change.mAP.difference <= most < -100 * change.mAP.low
    ]
    if not unsure:
        return None
    loss, most = max(unsure, key=lambda one: one[0] - one[1])
    whose = (
        f"mAP of {len(unsure)} of {len(changes)} models holds its gate" if len(changes) > 1 else "mAP holds its gate"
    )
    return (
        f"{whose} on these {changes[0].queries:,} queries, which are too few to show that it would on others: the loss"
        f" may be as large as {loss:.2f} points (95 % interval) where {most:g} are allowed; judge on more queries"
    )


def _per_query(result: RetrievalResult) -> NDArray[np.float64]:
    """(3, valid queries): whether the first hit is right, average precision, inverse negative penalty."""
    valid = result.first_match_rank > 0
    return np.stack([result.first_match_rank == 1, result.average_precision, result.inverse_penalty])[:, valid]
