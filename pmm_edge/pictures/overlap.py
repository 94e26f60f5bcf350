"""How little the maps of a network's stages overlap: one number for each pair of stages."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, eq=False)
class Overlap:
    """The overlap of a network's stages on N images, in 0..1. Fewer than two stages have no pair and no figure."""

    stages: tuple[str, ...]
    """Such as I, II, III."""
    per_image: NDArray[np.float64]
    """(N, pairs); NaN where one of the two maps is empty."""
    chance: float | None
    """The mean over the same pairs, but with the second map of another image: what overlaps in any case, because
    people stand in the middle of their crops. None for a single image."""
    empty: int
    """Images with a map that is 0 everywhere: no evidence for the class."""

    @property
    def images(self) -> int:
        return len(self.per_image)

    @property
    def pairs(self) -> tuple[str, ...]:
        """I-II, I-III, II-III: the columns of `per_image`."""
        return tuple(f"{first}-{second}" for first, second in combinations(self.stages, 2))

    @property
    def pair_means(self) -> dict[str, float | None]:
        """The mean over the images, for each pair."""
        return {pair: _mean(column) for pair, column in zip(self.pairs, self.per_image.T, strict=True)}

    @property
    def mean(self) -> float | None:
        """The mean of the pairs' means; None where there is no pair or no map."""
        means = list(self.pair_means.values())
        known = [value for value in means if value is not None]
        return float(np.mean(known)) if known and len(known) == len(means) else None

    def to_json(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "pairs": self.pair_means,
            "mean": self.mean,
            "chance": self.chance,
            "empty": self.empty,
        }


def overlap(maps: ArrayLike, stages: tuple[str, ...]) -> Overlap:
    """Histogram intersection of each pair of stages: the share of their attention that lies in the same places.

    With p = a / sum(a) and q = b / sum(b), it is sum over positions of min(p, q) = 1 - |p - q|_1 / 2: 1 for maps
    that are equal up to a factor, 0 for maps with no position in common (Swain and Ballard, Color Indexing, 1991).
    It has no threshold to choose, and does not depend on how strong a map is, only on where it is strong.

    Args:
        maps: (N, S, h, w), not negative, one for each stage; N >= 1.
        stages: the S names.
    """
    shares, filled = _shares(np.asarray(maps, dtype=np.float64))
    pairs = list(combinations(range(len(stages)), 2))
    # Half of the images away: neighbours in a data set are often the same person.
    moved = np.roll(np.arange(len(shares)), -(len(shares) // 2))
    same = [_intersection(shares[:, first], shares[:, second]) for first, second in pairs]
    other = [_intersection(shares[:, first], shares[moved, second]) for first, second in pairs]
    return Overlap(
        stages,
        np.stack(same, axis=1) if pairs else np.empty((len(shares), 0)),
        _mean(np.stack(other)) if pairs and len(shares) > 1 else None,
        int((~filled).any(axis=1).sum()),
    )


def _shares(maps: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(N, S, h, w) -> (N, S, h * w) that sum to 1, NaN for an empty map; (N, S) whether it is not empty."""
    flat = maps.reshape(*maps.shape[:2], -1)
    sums = flat.sum(axis=2, keepdims=True)
    return np.divide(flat, sums, out=np.full_like(flat, np.nan), where=sums > 0), sums[..., 0] > 0


def _intersection(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    shared: NDArray[np.float64] = np.minimum(first, second).sum(axis=1)
    return shared


def _mean(values: NDArray[np.float64]) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None
