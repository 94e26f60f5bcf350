"""Parity: how far a model's embeddings and its retrieval are from the reference, and whether its gates allow that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pmm_edge.bench.report import (
    QUANTILES,
    Change,
    Closeness,
    Failure,
    FailureKind,
    Gates,
    Parity,
    RetrievalChange,
)
from pmm_edge.errors import PmmError
from pmm_edge.retrieval import RetrievalResult
from pmm_edge.retrieval.distances import cosines, finite_rows
from pmm_edge.runtime.embedder import Embeddings

DEFAULT_GATES = {
    "fp32": Gates(),
    "fp16": Gates(min_cosine=0.999, max_map_drop=0.1, min_mean_cosine=0.9999, max_stretch=1.01),
    "int8": Gates(min_cosine=0.95, max_map_drop=0.5, min_mean_cosine=0.99, max_stretch=1.1),
}
"""By precision. Rounding to 8 bits moves single embeddings, so INT8 is judged by the mean cosine and mAP."""


@dataclass(frozen=True)
class GateOverrides:
    """Gates for all models; None keeps the default of each model's precision. Raises PmmError for impossible values."""

    min_cosine: float | None = None
    min_mean_cosine: float | None = None
    max_map_drop: float | None = None
    max_stretch: float | None = None

    def __post_init__(self) -> None:
        ranges = {"min_cosine": (-1, 1), "min_mean_cosine": (-1, 1), "max_map_drop": (0, 100), "max_stretch": (1, 1e6)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise PmmError(f"the gate {name} is {value:g}", f"Choose a value from {low:g} to {high:g}")

    def gates(self, precision: str) -> Gates:
        """Return the gates of a model of this precision."""
        return replace(DEFAULT_GATES[precision], **{k: v for k, v in vars(self).items() if v is not None})


# Closeness of embeddings


def compare(
    reference: Embeddings,
    candidate: Embeddings,
    paths: Sequence[Path],
    stages: Mapping[str, tuple[int, int]] | None = None,
) -> Parity:
    """Compare two models' embeddings of the same images, both (N, D) float32 with N >= 1.

    The reference is finite; rows of the candidate that are not have cosine 0, and length ratio 1, as rows of zeros do.
    `stages` are slices [start, stop) of the embedding; a single stage is not reported separately.
    """
    expected, actual = (np.linalg.norm(rows.astype(np.float64), axis=1) for rows in (reference, candidate))
    valid = finite_rows(candidate) & (expected > 0) & (actual > 0)
    stretch = np.divide(actual, expected, out=np.ones(len(paths)), where=valid)
    quantiles = np.quantile(cosines(reference, candidate), np.linspace(0, 1, QUANTILES))
    slices = stages if stages and len(stages) > 1 else {}
    return Parity(
        whole=_closeness(reference, candidate, paths),
        stages={
            name: _closeness(reference[:, start:stop], candidate[:, start:stop], paths)
            for name, (start, stop) in slices.items()
        },
        cosine_quantiles=quantiles.tolist(),
        shortest=float(stretch.min()),
        longest=float(stretch.max()),
        stretched_image=str(paths[int(np.abs(np.log(stretch)).argmax())]),
    )


def _closeness(reference: Embeddings, candidate: Embeddings, paths: Sequence[Path]) -> Closeness:
    cosine, relative = cosines(reference, candidate), float(relative_differences(reference, candidate).max())
    return Closeness(
        cosine_min=float(cosine.min()),
        cosine_p1=float(np.percentile(cosine, 1)),
        cosine_mean=float(cosine.mean()),
        largest_relative=relative if math.isfinite(relative) else None,
        worst_image=str(paths[int(cosine.argmin())]),
    )


def relative_differences(reference: Embeddings, candidate: Embeddings) -> NDArray[np.float64]:
    """Return each row's largest difference relative to the row's largest reference value.

    Both are (N, D); the result is (N,), infinite where either row is not finite, absolute where the reference is zero.
    """
    expected, actual = reference.astype(np.float64), candidate.astype(np.float64)
    finite = finite_rows(actual) & finite_rows(expected)
    expected, actual = (np.where(finite[:, None], rows, 0.0) for rows in (expected, actual))
    difference = np.where(finite, np.abs(actual - expected).max(axis=1), np.inf)
    largest = np.abs(expected).max(axis=1)
    return np.divide(difference, largest, out=difference.copy(), where=largest > 0)


def parity_failures(parity: Parity, gates: Gates) -> list[Failure]:
    """Return the gates on cosine and length that a model fails.

    Cosine does not depend on the length of an embedding, but Euclidean distances and thresholds on them do.
    """
    whole, failures = parity.whole, []
    if not whole.cosine_min >= gates.min_cosine:
        failures.append(Failure(FailureKind.COSINE, whole.cosine_min, gates.min_cosine, whole.worst_image))
    if not whole.cosine_mean >= gates.min_mean_cosine:
        failures.append(Failure(FailureKind.MEAN_COSINE, whole.cosine_mean, gates.min_mean_cosine))
    if not 1 / gates.max_stretch <= parity.shortest <= parity.longest <= gates.max_stretch:
        worst = parity.longest if parity.longest * parity.shortest >= 1 else parity.shortest
        failures.append(Failure(FailureKind.LENGTH, worst, gates.max_stretch, parity.stretched_image))
    return failures


# Change of retrieval, and how certain it is

RESAMPLES = 2000
SEED = 0
"""Fixed, so that the same embeddings give the same interval."""
_RESAMPLES_AT_ONCE = 100  # 10 MB for 11,659 queries, the largest public data set


def retrieval_change(reference: RetrievalResult, candidate: RetrievalResult) -> RetrievalChange:
    """Compare a model's retrieval with the reference, query by query."""
    before, now = (
        np.stack([one.first_match_rank == 1, one.average_precision, one.inverse_penalty], axis=1)
        for one in (reference, candidate)
    )
    valid = reference.first_match_rank > 0
    rank1, mean_ap, mean_inp = paired_changes((now - before)[valid])
    return RetrievalChange(rank1, mean_ap, mean_inp, reference.valid_queries)


def paired_changes(differences: NDArray[np.float64]) -> list[Change]:
    """Return the mean of each column with its 95 % percentile interval of a bootstrap over rows (Efron, 1979).

    `differences` is (queries, figures). A row is the difference between two models on one query, so that the difficulty
    of the query cancels out; the same rows are drawn for all columns.
    """
    random, count = np.random.default_rng(SEED), len(differences)
    means = []
    for start in range(0, RESAMPLES, _RESAMPLES_AT_ONCE):
        rows = random.integers(0, count, (min(_RESAMPLES_AT_ONCE, RESAMPLES - start), count), dtype=np.int32)
        means.append(np.stack([column[rows].mean(axis=1) for column in differences.T], axis=1))
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5), axis=0)
    return [Change(*map(float, figures)) for figures in zip(differences.mean(axis=0), low, high, strict=True)]


def map_failure(change: RetrievalChange, gates: Gates) -> Failure | None:
    """Return the failure of the mAP gate, or None. Few queries must not make a model pass: the interval is ignored."""
    drop = -100 * change.mAP.difference
    failed = drop > gates.max_map_drop
    return Failure(FailureKind.MAP_DROP, drop, gates.max_map_drop, change=change.mAP) if failed else None
