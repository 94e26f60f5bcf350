"""How far a model's embeddings depart from its reference's, and the gates it must pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pmm_edge.runtime.embedder import Embeddings
from pmm_edge.spec import RetrievalFigures


@dataclass(frozen=True)
class Gates:
    """What a model must hold to pass."""

    min_cosine: float = 0.9999
    """Least cosine similarity of any image's embedding to the reference's."""
    max_map_drop: float = 0.1
    """Largest loss of mAP, in points of 100."""
    min_mean_cosine: float = 0.0
    """Least mean of the cosines."""


LOWER_PRECISION = {
    "fp16": Gates(min_cosine=0.999, max_map_drop=0.1, min_mean_cosine=0.9999),
    "int8": Gates(min_cosine=0.9, max_map_drop=0.5, min_mean_cosine=0.99),
}
"""What is asked of a model in a lower precision where nothing else is: rounding to 8 bits moves single embeddings."""


def gates_of(precision: str, asked: Gates | None) -> Gates:
    """The gates of a model: those that were asked for, else those of its precision."""
    return asked or LOWER_PRECISION.get(precision, Gates())


@dataclass(frozen=True)
class Parity:
    """A model's embeddings beside its reference's, over all images."""

    images: int
    cosine_min: float
    cosine_mean: float
    largest_difference: float
    """Of any value; infinite where one is not finite."""
    largest_relative: float
    """Of any value, as a share of the largest of its reference embedding."""
    worst_image: str
    """The one with the least cosine."""


def compare(reference: Embeddings, candidate: Embeddings, paths: Sequence[Path]) -> Parity:
    """Compare two models' embeddings of the same images.

    The cosine of a row that is not finite, or all zeros beside one that is not, is 0: nothing of the reference
    is left in it. Two rows of zeros are equal and have cosine 1.

    Args:
        reference: (N, D), finite, N >= 1.
        candidate: (N, D).
        paths: of the N images.
    """
    expected, actual = reference.astype(np.float64), candidate.astype(np.float64)
    finite = _finite_rows(actual)
    actual = np.where(finite[:, None], actual, 0.0)
    cosine = np.where(finite, _cosine(expected, actual), 0.0)
    difference = np.where(finite, np.abs(actual - expected).max(axis=1), np.inf)
    largest = np.abs(expected).max(axis=1)
    relative = np.divide(difference, largest, out=difference.copy(), where=largest > 0)
    return Parity(
        images=len(paths),
        cosine_min=float(cosine.min()),
        cosine_mean=float(cosine.mean()),
        largest_difference=float(difference.max()),
        largest_relative=float(relative.max()),
        worst_image=str(paths[int(cosine.argmin())]),
    )


def fault_of(embeddings: Embeddings, paths: Sequence[Path]) -> str | None:
    """What makes embeddings useless by themselves, in words that follow a model's name; None where nothing does."""
    finite = _finite_rows(embeddings)
    if not finite.all():
        first = paths[int(finite.argmin())]
        return f"gives NaN or infinity for {(~finite).sum()} of {len(paths)} images, first for {first}"
    zero = ~embeddings.any(axis=1)
    if zero.any():
        return f"gives all zeros for {zero.sum()} of {len(paths)} images, first for {paths[int(zero.argmax())]}"
    if len(paths) > 1 and (embeddings == embeddings[0]).all():
        return f"gives one and the same embedding for all {len(paths)} images"
    return None


def cosine_failure(parity: Parity, gates: Gates) -> str | None:
    """The sentence of the cosine gate; None where the model passes."""
    if parity.cosine_min >= gates.min_cosine:
        if parity.cosine_mean >= gates.min_mean_cosine:
            return None
        return f"mean cosine {parity.cosine_mean:.6f} is below the least allowed {gates.min_mean_cosine:g}"
    return (
        f"cosine {parity.cosine_min:.6f} is {gates.min_cosine - parity.cosine_min:.2g} below the least allowed"
        f" {gates.min_cosine:g}, on {parity.worst_image} (mean {parity.cosine_mean:.6f})"
    )


def map_failure(reference: RetrievalFigures, candidate: RetrievalFigures, gates: Gates) -> str | None:
    """The sentence of the mAP gate; None where the model passes."""
    drop = 100 * (reference.mAP - candidate.mAP)
    if drop <= gates.max_map_drop:
        return None
    return (
        f"mAP {100 * candidate.mAP:.2f} is {drop:.2f} points below the reference's {100 * reference.mAP:.2f},"
        f" {gates.max_map_drop:g} are allowed"
    )


def _finite_rows(embeddings: NDArray[np.floating]) -> NDArray[np.bool_]:
    return np.asarray(np.isfinite(embeddings).all(axis=1))


def _cosine(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, D), (N, D) -> (N,). 1 for two rows of zeros, 0 for one beside another."""
    norms = np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=1)
    product = norms[0] * norms[1]
    equal = ((norms[0] == 0) & (norms[1] == 0)).astype(np.float64)
    return np.minimum(np.divide((first * second).sum(axis=1), product, out=equal, where=product > 0), 1.0)
