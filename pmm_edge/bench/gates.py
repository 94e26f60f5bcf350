"""The gates that decide whether a model ships: what each precision must hold, and the sentence where it does not."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from pmm_edge.bench.figures import Closeness, Gates, Parity, RetrievalChange
from pmm_edge.errors import PmmError

LOWER_PRECISION = {
    "fp16": Gates(min_cosine=0.999, max_map_drop=0.1, min_mean_cosine=0.9999, max_stretch=1.01),
    "int8": Gates(min_cosine=0.95, max_map_drop=0.5, min_mean_cosine=0.99, max_stretch=1.1),
}
"""What is asked of a model in a lower precision where nothing else is: rounding to 8 bits moves single embeddings."""


@dataclass(frozen=True)
class AskedGates:
    """What a user asks of all models; None leaves it to the model's precision.

    Raises:
        PmmError: a gate that is no number that could be held.
    """

    min_cosine: float | None = None
    min_mean_cosine: float | None = None
    max_map_drop: float | None = None
    max_stretch: float | None = None

    def __post_init__(self) -> None:
        for name in ("min_cosine", "min_mean_cosine"):
            value = getattr(self, name)
            if value is not None and not -1 <= value <= 1:
                raise PmmError(f"{name} {value:g} is no cosine", "Choose -1 to 1, such as 0.999")
        if self.max_map_drop is not None and not 0 <= self.max_map_drop < math.inf:
            raise PmmError(f"max_map_drop {self.max_map_drop:g} is no loss", "Choose points of mAP, such as 0.5")
        if self.max_stretch is not None and not 1 <= self.max_stretch < math.inf:
            raise PmmError(f"max_stretch {self.max_stretch:g} is no ratio of lengths", "Choose 1 or more, such as 1.05")

    def of(self, precision: str) -> Gates:
        """The gates of a model of this precision."""
        usual = LOWER_PRECISION.get(precision, Gates())
        return replace(usual, **{name: asked for name, asked in vars(self).items() if asked is not None})


def cosine_failures(whole: Closeness, gates: Gates) -> list[str]:
    """A sentence for each gate on cosine that a model fails."""
    failures = []
    if not whole.cosine_min >= gates.min_cosine:
        failures.append(
            f"cosine {whole.cosine_min:.6f} is {gates.min_cosine - whole.cosine_min:.2g} below the least allowed"
            f" {gates.min_cosine:g}, on {whole.worst_image} (mean {whole.cosine_mean:.6f})"
        )
    if not whole.cosine_mean >= gates.min_mean_cosine:
        failures.append(
            f"mean cosine {whole.cosine_mean:.6f} is {gates.min_mean_cosine - whole.cosine_mean:.2g} below the least"
            f" allowed {gates.min_mean_cosine:g}"
        )
    return failures


def length_failure(parity: Parity, gates: Gates) -> str | None:
    """The sentence where an embedding points the right way but is longer or shorter than its reference's.

    Cosine does not see it; Euclidean distances, and every threshold on them, do.
    """
    shortest, longest, most = parity.shortest, parity.longest, gates.max_stretch
    if shortest is None or longest is None or 1 / most <= shortest <= longest <= most:
        return None
    worst = longest if longest * shortest >= 1 else shortest
    return (
        f"the embedding of {parity.stretched_image} is {worst:.4g} times as long as the reference's (all of them"
        f" {shortest:.4g} to {longest:.4g}), {1 / most:.4g} to {most:.4g} are allowed: distances and every threshold on"
        " them change"
    )


def map_failure(reference: float, candidate: float, change: RetrievalChange, gates: Gates) -> str | None:
    """The sentence of the mAP gate, from mAP in 0..1; None where the model passes."""
    drop = 100 * (reference - candidate)
    if drop <= gates.max_map_drop:
        return None
    return (
        f"mAP {100 * candidate:.2f} is {drop:.2f} points (95 % interval {-100 * change.mAP.high:.2f} to"
        f" {-100 * change.mAP.low:.2f}) below the reference's {100 * reference:.2f}, {gates.max_map_drop:g} are allowed"
    )
