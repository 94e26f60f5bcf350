"""How much two runs of the same bench may differ: what `pmm bench --compare` takes for noise.

Measured things differ from run to run; computed things (mAP on the same images) only where something changed, but
a change may be within what the choice of queries does. docs/regressions.md says the same for users.
"""

from __future__ import annotations

import math

from pmm_edge.bench.figures import Change, Gates, Latency

LEAST_LATENCY = 0.05
"""Two runs on a quiet machine agree within this share, whatever their own spread says."""
LEAST_P90 = 0.10
"""The same of a 90th percentile, which one run in ten makes."""
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
# Of the way from the median to p90, down to the 77th percentile: 1.96 sqrt(0.9 * 0.1 / 20) below the 90th.
_BELOW_P90 = 0.13 / 0.4


def latency_noise(old: Latency, new: Latency) -> float:
    """The share that a median may move by: both medians' 95 % intervals, at least `LEAST_LATENCY`.

    The wider of two estimates for each: from the spread of single runs, and from the interval of the ratio to the
    reference, which is over turns and so knows of drift.
    """
    return max(LEAST_LATENCY, math.hypot(*(max(_of_runs(one), _of_ratio(one)) for one in (old, new))))


def ratio_noise(old: Latency, new: Latency) -> float:
    """The share that a ratio to the reference may move by: both ratios' intervals, at least `LEAST_LATENCY`."""
    return max(LEAST_LATENCY, math.hypot(_of_ratio(old), _of_ratio(new)))


def p90_noise(old: Latency, new: Latency) -> float:
    """The share that a 90th percentile may move by, at least `LEAST_P90`.

    Runs of one turn are not independent of each other: 50 runs or 5,000 are 10 to 20 turns. Of so many draws the 95 %
    interval of a 90th percentile reaches from about the 77th percentile (binomial) to beyond the largest, for which p99
    stands: that of the lower report upwards, that of the higher one downwards. And it is at least both spreads, for of
    n = 10 to 20 normal draws 1.96 standard errors of a 90th percentile, 1.709 s / sqrt(n), come to 0.7 to 1.1 s.
    """
    low, high = sorted((old, new), key=lambda one: one.p90_ms)
    if not low.p90_ms > 0:
        return LEAST_P90
    above, below = low.p99_ms - low.p90_ms, _BELOW_P90 * (high.p90_ms - high.median_ms)
    spreads = math.hypot(_known(old.variation), _known(new.variation))
    return max(LEAST_P90, spreads, math.hypot(_known(above), _known(below)) / low.p90_ms)


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
