"""Time several pieces of work in turns, so that drift of the machine hits all alike.

A turn of one piece begins with a run that is not counted: it brings its code and data back into the caches, and lets
the threads of the engine before come to rest, which spin for a while after their last task.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from pmm_edge.bench.report import ColdStart, Latency, Scope
from pmm_edge.bench.resources import Gpu, Reading, clock_range, clock_reader, open_gpu
from pmm_edge.console import Report, silent
from pmm_edge.errors import ModelError, PmmError
from pmm_edge.images import Pixels
from pmm_edge.runtime.embed_files import embed_files
from pmm_edge.runtime.embedder import Embedder

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


MIN_RUNS = 50
MIN_SECONDS = 2.0


def measure_latency(
    embedders: Sequence[Embedder],
    images: Sequence[Pixels],
    batch: int,
    min_runs: int = MIN_RUNS,
    min_seconds: float = MIN_SECONDS,
    report: Report = silent,
    clock: Clock = time.perf_counter,
) -> list[Latency]:
    """Time embedders on one batch size, from uint8 crops of network size to embeddings in host memory.

    Each is warmed up until it is stable; then they take turns (`pmm_edge.bench.timing`).

    Args:
        embedders: the first is the reference of the ratios.
        images: for each embedder (N, height, width, 3) uint8 of its size, N >= 1, repeated to fill the batch.
        batch: images in a run.
        min_runs, min_seconds: of each embedder, both reached.
        clock: for tests.

    Returns:
        One for each embedder, of scope `model`.
    """
    batches = [np.resize(crops, (batch, *crops.shape[1:])) for crops in images]
    works = [
        Work(
            partial(embedder.embed_prepared, crops),
            partial(embedder.gpu_milliseconds, crops),
            clock_reader(embedder.device),
        )
        for embedder, crops in zip(embedders, batches, strict=True)
    ]
    times = time_in_turns(works, min_runs, min_seconds, report, f"timing batch {batch}", clock)
    return _latencies(embedders, times, batch, "model")


def measure_end_to_end(
    embedders: Sequence[Embedder],
    paths: Sequence[Path],
    batch: int,
    min_runs: int = MIN_RUNS,
    min_seconds: float = MIN_SECONDS,
    report: Report = silent,
) -> list[Latency]:
    """Time embedders on one batch of image files: decode and resize on threads, copy, infer, copy back.

    The files are in the system's cache after the warm-up: no disk is timed.

    Args:
        embedders: the first is the reference of the ratios.
        paths: at least one image file, repeated to fill the batch.
        batch: images in a run.

    Returns:
        One for each embedder, of scope `end to end`.

    Raises:
        DataError: an image is missing, truncated or no image.
        PmmError: there are no paths.
    """
    if not paths:
        raise PmmError("there are no images to time from file to embedding", "Name at least one")
    files = [paths[number % len(paths)] for number in range(batch)]
    works = [
        Work(partial(embed_files, embedder, files, batch=batch), reading=clock_reader(embedder.device))
        for embedder in embedders
    ]
    times = time_in_turns(works, min_runs, min_seconds, report, f"timing batch {batch} from files")
    return _latencies(embedders, times, batch, "end to end")


def without_cuda_graphs(embedder: Embedder) -> Embedder | None:
    """The same engine, enqueued layer by layer; None where it has no CUDA graphs to leave out.

    Raises:
        GpuError: the GPU has no memory for a second one.
    """
    if not embedder.cuda_graphs:
        return None
    from pmm_edge.runtime.tensorrt_backend import TensorRTEmbedder

    return TensorRTEmbedder(embedder.path, embedder.device, cuda_graphs=False)


def ratio_interval(
    turns: Sequence[Sequence[float]], reference: Sequence[Sequence[float]], resamples: int = 1000
) -> tuple[float, float, float]:
    """Ratio of the medians, and its 95 % interval by a bootstrap over turns.

    Whole turns are drawn, those of both at once: runs of one turn are no independent samples, and what the machine did
    in a turn hit both (Efron and Tibshirani 1993, chapter 8: the pair is the unit).

    Args:
        turns, reference: seconds of each run, turn by turn; pairs with an empty turn are left out.

    Returns:
        Ratio, low, high. With fewer than two pairs the interval is the ratio itself.
    """
    pairs = [(np.array(own), np.array(other)) for own, other in zip(turns, reference, strict=True) if own and other]
    random = np.random.default_rng(0)

    def ratio(chosen: Sequence[int]) -> float:
        own, other = (np.median(np.concatenate([pairs[turn][side] for turn in chosen])) for side in (0, 1))
        return float(own / other)

    drawn = [ratio(random.integers(0, len(pairs), len(pairs)).tolist()) for _ in range(resamples)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return ratio(range(len(pairs))), float(low), float(high)


def _latencies(embedders: Sequence[Embedder], times: Sequence[Times], batch: int, scope: Scope) -> list[Latency]:
    found = []
    for embedder, taken in zip(embedders, times, strict=True):
        seconds = np.array(taken.seconds)
        median, p90, p99 = (float(value) for value in np.percentile(seconds, [50, 90, 99]))
        ratio, low, high = ratio_interval(taken.turns, times[0].turns) if taken is not times[0] else (1.0, 1.0, 1.0)
        found.append(
            Latency(
                batch=batch,
                scope=scope,
                cuda_graph=embedder.cuda_graphs,
                runs=len(seconds),
                median_ms=1000 * median,
                p90_ms=1000 * p90,
                p99_ms=1000 * p99,
                variation=float(seconds.std() / seconds.mean()),
                images_per_second=batch / median,
                ratio=ratio,
                ratio_low=low,
                ratio_high=high,
                gpu_ms=float(np.median(taken.gpu_ms)) if taken.gpu_ms else None,
                cpu_clocks=clock_range(reading.cpu_mhz for reading in taken.readings),
                gpu_clocks=clock_range(reading.gpu_mhz for reading in taken.readings),
                slowed_by=list(dict.fromkeys(why for reading in taken.readings for why in reading.slowed_by)),
            )
        )
    return found


TIMEOUT = 600.0
_TICK = 0.01

# No module of pmm_edge.bench: importing the package would be timed. The paths are those of this process, for `-c`
# puts the working folder in front of them.
_CHILD = """
import json, sys, time
path, device, batch, sys.path[:] = json.loads(sys.argv[1])
import numpy
import pmm_edge
embedder = pmm_edge.load(path, device)
size = embedder.spec.input
crops = numpy.zeros((batch, size.height, size.width, 3), numpy.uint8)
embedder.embed(crops[:1])
first = time.monotonic()
embedder.embed(crops)
try:
    # Not getrusage: what a process begins with there is the size of the one that started it.
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024
except (OSError, StopIteration):
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
print(json.dumps([first, peak]))
"""


def measure_cold_start(path: Path, device: str | None, batch: int, timeout: float = TIMEOUT) -> ColdStart:
    """Start Python, load a model, embed one crop, then a batch of crops.

    The file is in the system's cache where it was read before; right after a boot the disk comes on top.

    Args:
        path: what `pmm_edge.load` loads.
        device: as of `pmm_edge.load`.
        batch: crops whose memory is measured.
        timeout: seconds after which the process is killed.

    Returns:
        Times and memory. That of the GPU is what all processes on it hold at most, less what they held before: None
        without an NVIDIA GPU, and a Jetson's is part of the process's own.

    Raises:
        ModelError: the process ended before it had embedded, or took too long.
        PmmError: `batch` is less than 1.
    """
    if batch < 1:
        raise PmmError(f"the memory of a batch of {batch} cannot be measured", "Choose 1 or more")
    gpu = open_gpu(device or "cuda")
    before = gpu.used_mib if gpu else None
    arguments = json.dumps([str(path), device, batch, sys.path])
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.monotonic()  # the same clock in all processes
        process = subprocess.Popen([sys.executable, "-c", _CHILD, arguments], stdout=out, stderr=err)
        try:
            most = _watch(process, gpu, start + timeout)
        finally:
            process.kill()  # nothing to do where it has ended
            process.wait()
        out.seek(0)
        err.seek(0)
        told = _told(out.read())
        if told is None or process.returncode:
            raise ModelError(
                f"{path} cannot be run in a process of its own: {_end(process.returncode, err.read(), timeout)}",
                "Is there memory for it a second time? Leave the cold start out otherwise",
            )
    first, peak = told
    grown = most - before if most is not None and before is not None else None
    return ColdStart(1000 * (first - start), peak, batch, grown)


def _watch(process: subprocess.Popen[bytes], gpu: Gpu | None, until: float) -> float | None:
    """Wait for the end of a process, at most until then; the most memory that was in use on the GPU meanwhile."""
    most: float | None = None
    while process.poll() is None and time.monotonic() < until:
        used = gpu.used_mib if gpu else None
        most = used if most is None or (used is not None and used > most) else most
        time.sleep(_TICK)
    return most


def _told(printed: bytes) -> Any:
    """What the process printed last: engines may have printed something before."""
    try:
        first, peak = json.loads(printed.splitlines()[-1])
    except (IndexError, ValueError, TypeError):
        return None
    return float(first), float(peak)


def _end(code: int, errors: bytes, timeout: float) -> str:
    lines = errors.decode(errors="replace").strip().splitlines()
    if code < 0:
        return f"killed by signal {-code}, after {timeout:g} s at the latest"
    return lines[-1] if lines else f"it ended with exit code {code}"
