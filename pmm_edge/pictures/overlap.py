"""Overlap of the attention maps of a network's stages. Runs without torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Overlap:
    """Overlap of the stages' attention on N images, in 0..1."""

    images: int
    pairs: dict[str, float | None]
    """Mean over the images for each pair of stages, such as I-II; None if every map of the pair is empty."""
    mean: float | None
    """Mean over the pairs; None for fewer than two stages or if a pair is None."""
    chance: float | None
    """Mean over the same pairs with the second map taken from another image: the overlap to expect, because people
    stand in the middle of their crops. None for a single image."""
    empty: int
    """Images with a map that is zero everywhere, that is, without evidence for the class."""


def overlap(maps: ArrayLike, stages: tuple[str, ...]) -> Overlap:
    """Histogram intersection of each pair of stages: the share of their attention that lies in the same places.

    With p = a / sum(a) and q = b / sum(b), it is the sum over positions of min(p, q) = 1 - |p - q|_1 / 2: 1 for maps
    that are equal up to a factor, 0 for disjoint maps (Swain and Ballard, Color Indexing, 1991). It needs no threshold
    and does not depend on the strength of a map.

    `maps` are (N, S, h, w), not negative, of N >= 1 images; `stages` names the S stages.
    """
    array = np.asarray(maps, dtype=np.float64)
    flat = array.reshape(*array.shape[:2], -1)
    sums = flat.sum(axis=2, keepdims=True)
    shares = np.divide(flat, sums, out=np.full_like(flat, np.nan), where=sums > 0)
    moved = np.roll(np.arange(len(shares)), -(len(shares) // 2))  # neighbors in a data set often show the same person
    pairs: dict[str, float | None] = {}
    chances = []
    for first, second in combinations(range(len(stages)), 2):
        same = np.minimum(shares[:, first], shares[:, second]).sum(axis=1)
        pairs[f"{stages[first]}-{stages[second]}"] = _mean(same)
        chances.append(np.minimum(shares[:, first], shares[moved, second]).sum(axis=1))
    known = [value for value in pairs.values() if value is not None]
    mean = float(np.mean(known)) if known and len(known) == len(pairs) else None
    chance = _mean(np.stack(chances)) if chances and len(shares) > 1 else None
    return Overlap(len(shares), pairs, mean, chance, int((sums[..., 0] <= 0).any(axis=1).sum()))


def _mean(values: NDArray[np.float64]) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None
