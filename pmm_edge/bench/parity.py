"""How far a model's embeddings depart from its reference's: of the whole embedding, and of each stage's slice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pmm_edge.bench.report import QUANTILES, Change, Closeness, FirstHit, Gates, Parity, RetrievalChange
from pmm_edge.console import Report, about, silent
from pmm_edge.data.dataset import ReidDataset
from pmm_edge.retrieval import RetrievalResult
from pmm_edge.retrieval.distances import cosines, finite_rows
from pmm_edge.runtime.embed_files import EmbeddedDataset
from pmm_edge.runtime.embedder import Embeddings


def compare(
    reference: Embeddings,
    candidate: Embeddings,
    paths: Sequence[Path],
    stages: Mapping[str, tuple[int, int]] | None = None,
) -> Parity:
    """Compare two models' embeddings of the same images.

    Args:
        reference: (N, D), finite, N >= 1.
        candidate: (N, D).
        paths: of the N images.
        stages: the slice [start, stop) of the embedding that each stage fills; of one stage the whole says it all.
    """
    whole, stretch = cosines(reference, candidate), _stretch(reference, candidate)
    slices = stages if stages and len(stages) > 1 else {}
    return Parity(
        images=len(paths),
        whole=closeness(reference, candidate, paths),
        stages={
            name: closeness(reference[:, start:stop], candidate[:, start:stop], paths)
            for name, (start, stop) in slices.items()
        },
        cosine_quantiles=[float(value) for value in np.quantile(whole, np.linspace(0, 1, QUANTILES))],
        shortest=float(stretch.min()),
        longest=float(stretch.max()),
        stretched_image=str(paths[int(np.abs(np.log(stretch)).argmax())]),
    )


def closeness(reference: Embeddings, candidate: Embeddings, paths: Sequence[Path]) -> Closeness:
    """The figures of one slice; arguments as of `compare`."""
    cosine = cosines(reference, candidate)
    difference, relative = _differences(reference.astype(np.float64), candidate.astype(np.float64))
    return Closeness(
        cosine_min=float(cosine.min()),
        cosine_p1=float(np.percentile(cosine, 1)),
        cosine_mean=float(cosine.mean()),
        largest_difference=float(difference.max()),
        largest_relative=float(relative.max()),
        worst_image=str(paths[int(cosine.argmin())]),
    )


def relative_differences(reference: Embeddings, candidate: Embeddings) -> NDArray[np.float64]:
    """Of each row the largest difference as a share of the reference row's largest value, (N, D), (N, D) -> (N,).

    Infinite where one of the two is not finite.
    """
    return _differences(reference.astype(np.float64), candidate.astype(np.float64))[1]


def _stretch(reference: Embeddings, candidate: Embeddings) -> NDArray[np.float64]:
    """Of each row its length over the reference row's, (N, D), (N, D) -> (N,); 1 where either has none."""
    rows = finite_rows(candidate)
    expected, actual = (np.linalg.norm(rows_.astype(np.float64), axis=1) for rows_ in (reference, candidate))
    there = rows & (expected > 0) & (actual > 0)
    return np.divide(actual, expected, out=np.ones(len(rows)), where=there)


def _differences(
    expected: NDArray[np.float64], actual: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The largest of each row, and its share of the largest expected value of the row; infinite where not finite."""
    finite = finite_rows(actual) & finite_rows(expected)
    expected, actual = (np.where(finite[:, None], rows, 0.0) for rows in (expected, actual))
    difference = np.where(finite, np.abs(actual - expected).max(axis=1), np.inf)
    largest = np.abs(expected).max(axis=1)
    return difference, np.divide(difference, largest, out=difference.copy(), where=largest > 0)


@dataclass(frozen=True, eq=False)
class Row:
    """One way of using a model at test time, and its figures."""

    flip: bool
    rerank: bool
    result: RetrievalResult

    @property
    def name(self) -> str:
        """`plain`, `flip`, `re-ranking` or `flip + re-ranking`."""
        return _name(self.flip, self.rerank)


def judge(embedded: EmbeddedDataset, rerank: bool = False, report: Report = silent) -> list[Row]:
    """Judge the ranking under the Market-1501 protocol.

    The plain embeddings come first, then those with mirror images where there are any; with `rerank` both once more,
    k-reciprocally re-ranked.

    Raises:
        DataError: the embeddings hold NaN or infinity, or no query has a match.
    """
    rows = []
    for reranked in (False, True) if rerank else (False,):
        for flip in (False,) if embedded.flipped is None else (False, True):
            told = about(_name(flip, rerank=False), report)
            rows.append(Row(flip, reranked, embedded.evaluate(rerank=reranked, flip=flip, report=told)))
    return rows


def evaluate_embeddings(embeddings: Embeddings, dataset: ReidDataset) -> RetrievalResult:
    """Evaluate embeddings of the queries followed by the gallery, (queries + gallery images, D)."""
    return EmbeddedDataset(dataset, embeddings).evaluate()


def _name(flip: bool, rerank: bool) -> str:
    return " + ".join(["flip"] * flip + ["re-ranking"] * rerank) or "plain"


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
