"""How much two runs of the same bench may differ: what `pmm bench --compare` takes for noise.

Measured things differ from run to run; computed things (mAP on the same images) only where something changed, but
a change may be within what the choice of queries does. docs/regressions.md says the same for users.
"""

from __future__ import annotations

import math

from pmm_edge.bench.figures import Change, Gates, Latency

LEAST_LATENCY = 0.05
"""Two runs on a quiet machine agree within this share, whatever their own spread says."""
COLD_START = 0.25
"""Share of the time to the first embedding: one process each, disk caches included."""
MEMORY = 0.10
ENERGY = 0.10
STREAM = 0.10
FILE_SIZE = 0.01
LEAST_POINTS = 0.01
"""Points of mAP, Rank-1 or mINP: what rounding moves on another version of the same engine."""
# 1.96 standard errors of a median, 1.2533 s / sqrt(n) for n draws of a normal distribution of spread s.
_MEDIAN_INTERVAL = 1.96 * 1.2533


def latency_noise(old: Latency, new: Latency) -> float:
    """The share that a median may move by: both medians' 95 % intervals, at least `LEAST_LATENCY`.

    The wider of two estimates for each: from the spread of single runs, and from the interval of the ratio to the
    reference, which is over turns and so knows of drift.
    """
    return max(LEAST_LATENCY, math.hypot(*(max(_of_runs(one), _of_ratio(one)) for one in (old, new))))


def ratio_noise(old: Latency, new: Latency) -> float:
    """The share that a ratio to the reference may move by: both ratios' intervals, at least `LEAST_LATENCY`."""
    return max(LEAST_LATENCY, math.hypot(_of_ratio(old), _of_ratio(new)))


def points_noise(old: Change | None, new: Change | None) -> float:
    """The points of 100 that a share may fall by on the same images.

    Both 95 % intervals of the paired bootstrap over queries, at least `LEAST_POINTS`. They are of a model less its
    reference, and of the model alone only where both have the same one. A reference has no interval; the loss that
    the usual gate allows stands in.
    """
    if old is None or new is None:
        return Gates().max_map_drop
    halves = [100 * _known((change.high - change.low) / 2) for change in (old, new)]
    return max(LEAST_POINTS, math.hypot(*halves))


def cosine_is_worse(old: float, new: float, gate: float) -> bool:
    """Whether an embedding departs more than rounding explains.

    1 - cosine more than doubled, and has come to more than a tenth of what the gate allows.
    """
    before, now = 1 - _known(old), 1 - _known(new)
    return now > 2 * before and now > (1 - gate) / 10


def _of_runs(latency: Latency) -> float:
    return _MEDIAN_INTERVAL * _known(latency.variation) / math.sqrt(latency.runs)


def _of_ratio(latency: Latency) -> float:
    return _known((latency.ratio_high - latency.ratio_low) / 2 / latency.ratio) if latency.ratio > 0 else 0.0


def _known(value: float) -> float:
    """0 for a figure that was not finite: no interval, and no cosine."""
    return value if math.isfinite(value) else 0.0
