"""Time several pieces of work in turns, so that drift of the machine hits all alike.

A turn of one piece begins with a run that is not counted: it brings its code and data back into the caches, and lets
the threads of the engine before come to rest, which spin for a while after their last task.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from pmm_edge.bench.clocks import Reading
from pmm_edge.progress import Report, silent

Clock = Callable[[], float]

MOST_TURNS = 20
RUNS_A_TURN = 5
"""At least, so that runs which are not counted are few beside those that are."""
MARGIN = 1.05
"""More than the seconds asked for, lest a run that became a little faster costs all a turn more."""
WARM_UP_SECONDS = 3.0
"""At most, and two windows of runs at least."""
WINDOW_RUNS = 3
WINDOW_SECONDS = 0.1
STABLE = 0.05
"""Medians of successive windows that differ by no more than this share are stable."""


@dataclass(frozen=True)
class Work:
    """What is timed."""

    run: Callable[[], object]
    gpu_milliseconds: Callable[[], float | None] = lambda: None
    """Asked once at the end of each turn."""
    reading: Callable[[], Reading] = Reading
    """Of the clocks, before that."""


@dataclass(frozen=True)
class Times:
    """What was timed of one piece of work."""

    turns: list[list[float]] = field(default_factory=list)
    """Seconds of each run, turn by turn; a turn in which it had nothing left to do is empty."""
    gpu_ms: list[float] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    """Of the clocks, at the end of each turn."""

    @property
    def seconds(self) -> list[float]:
        return [seconds for turn in self.turns for seconds in turn]


def time_in_turns(
    works: Sequence[Work],
    min_runs: int,
    min_seconds: float,
    report: Report = silent,
    what: str = "timing",
    clock: Clock = time.perf_counter,
) -> list[Times]:
    """Warm each piece of work up until it is stable, then time all in turns.

    A turn of fast work has more runs than one of slow work, so that all have enough after the same number of turns.

    Args:
        min_runs, min_seconds: of each, both reached.
        report: told after each turn, with how long it may still take.
        clock: seconds since whenever.
    """
    report(what, 0, 100, "warming up")
    usual = [warm_up(work.run, clock) for work in works]
    wanted = [max(min_runs, math.ceil(MARGIN * min_seconds / max(seconds, 1e-9))) for seconds in usual]
    turns = max(1, min(MOST_TURNS, min(wanted) // RUNS_A_TURN))
    runs = [math.ceil(number / turns) for number in wanted]
    times = [Times() for _ in works]
    start = clock()
    for turn in count(1):
        for work, taken, number in zip(works, times, runs, strict=True):
            taken.turns.append([])
            # A machine that became faster than in the warm-up asks for turns beyond those planned.
            if turn <= turns or not _enough(taken, min_runs, min_seconds):
                _take_turn(work, taken, number, clock)
        if turn >= turns and all(_enough(taken, min_runs, min_seconds) for taken in times):
            break
        left = (clock() - start) / turn * max(turns - turn, 1)
        report(what, min(100 * turn // turns, 99), 100, f"{left:.0f} s left")
    report(what, 100, 100)
    return times


def warm_up(run: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """Run until the medians of two successive windows agree, or `WARM_UP_SECONDS` are over.

    Returns:
        Median seconds of a run in the last window.
    """
    start = clock()
    before = math.inf
    while True:
        window = _window(run, clock)
        median = float(np.median(window))
        settled = abs(median - before) <= STABLE * median
        late = clock() - start >= WARM_UP_SECONDS and before != math.inf
        if settled or late:
            return median
        before = median


def _window(run: Callable[[], object], clock: Clock) -> list[float]:
    start, window = clock(), list[float]()
    while len(window) < WINDOW_RUNS or clock() - start < WINDOW_SECONDS:
        window.append(_timed(run, clock))
        if clock() - start >= WARM_UP_SECONDS / 2:
            break  # work of seconds is not worth three runs
    return window


def _take_turn(work: Work, taken: Times, runs: int, clock: Clock) -> None:
    work.run()
    taken.turns[-1].extend(_timed(work.run, clock) for _ in range(runs))
    taken.readings.append(work.reading())
    on_gpu = work.gpu_milliseconds()
    if on_gpu is not None:
        taken.gpu_ms.append(on_gpu)


def _enough(taken: Times, min_runs: int, min_seconds: float) -> bool:
    return len(taken.seconds) >= min_runs and sum(taken.seconds) >= min_seconds


def _timed(run: Callable[[], object], clock: Clock) -> float:
    start = clock()
    run()
    return clock() - start
