"""How far a model's embeddings depart from its reference's: of the whole embedding, and of each stage's slice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pmm_edge.bench.figures import QUANTILES, Closeness, Parity
from pmm_edge.retrieval.distances import cosines, finite_rows
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
