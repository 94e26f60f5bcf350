"""Latency with interleaved timing, and the cold start of a model in a new process.

All models share the same 10 to 20 turns, so that drift of the machine affects them alike. Each turn of a model starts
with one uncounted run, which refills the caches and lets the threads of the previous engine stop spinning.
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

import numpy as np

from pmm_edge.bench.report import ColdStart, Latency, Scope
from pmm_edge.bench.resources import ClockReading, clock_range, clock_reader, open_gpu
from pmm_edge.console import Report, silent
from pmm_edge.errors import ModelError, PmmError
from pmm_edge.images import Pixels
from pmm_edge.runtime.embed_files import embed_files
from pmm_edge.runtime.embedder import Embedder

Clock = Callable[[], float]

MAX_TURNS = 20
MIN_RUNS_PER_TURN = 5
"""Keeps uncounted runs few compared with counted ones."""
TIME_MARGIN = 1.05
"""Plan this much more time than requested, so that a run that became slightly faster does not need an extra turn."""
MAX_WARM_UP_SECONDS = 3.0
WINDOW_RUNS = 3
WINDOW_SECONDS = 0.1
STABLE = 0.05
"""The warm-up ends when the medians of two successive windows differ by at most this fraction."""
MIN_RUNS = 50
MIN_SECONDS = 2.0


@dataclass(frozen=True)
class Workload:
    """A function to time."""

    run: Callable[[], object]
    gpu_milliseconds: Callable[[], float | None] = lambda: None
    """Called once at the end of each turn."""
    read_clocks: Callable[[], ClockReading] = ClockReading
    """Called at the end of each turn, while the device is still hot."""


@dataclass(frozen=True)
class Timings:
    """Measured times of one workload."""

    turns: list[list[float]] = field(default_factory=list)
    """Seconds of each run, by turn; a turn that the workload did not need is empty."""
    gpu_ms: list[float] = field(default_factory=list)
    clocks: list[ClockReading] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        return [seconds for turn in self.turns for seconds in turn]


def time_interleaved(
    workloads: Sequence[Workload],
    min_runs: int,
    min_seconds: float,
    report: Report = silent,
    what: str = "timing",
    clock: Clock = time.perf_counter,
) -> list[Timings]:
    """Warm up each workload, then time all of them in turns, until each has `min_runs` and `min_seconds`.

    A fast workload gets more runs per turn than a slow one, so that all of them finish after the same number of turns.
    """
    report(what, 0, 100, "warming up")
    typical = [warm_up(workload.run, clock) for workload in workloads]
    wanted = [max(min_runs, math.ceil(TIME_MARGIN * min_seconds / max(seconds, 1e-9))) for seconds in typical]
    turns = max(1, min(MAX_TURNS, min(wanted) // MIN_RUNS_PER_TURN))
    timings = [Timings() for _ in workloads]

    def enough(timing: Timings) -> bool:
        return len(timing.seconds) >= min_runs and sum(timing.seconds) >= min_seconds

    start = clock()
    for turn in count(1):
        for workload, timing, number in zip(workloads, timings, wanted, strict=True):
            timing.turns.append([])
            # A machine that became faster after the warm-up needs more turns than planned.
            if turn <= turns or not enough(timing):
                workload.run()
                timing.turns[-1].extend(_seconds(workload.run, clock) for _ in range(math.ceil(number / turns)))
                timing.clocks.append(workload.read_clocks())
                if (gpu_ms := workload.gpu_milliseconds()) is not None:
                    timing.gpu_ms.append(gpu_ms)
        if turn >= turns and all(enough(timing) for timing in timings):
            break
        left = (clock() - start) / turn * max(turns - turn, 1)
        report(what, min(100 * turn // turns, 99), 100, f"{left:.0f} s left")
    report(what, 100, 100)
    return timings


def warm_up(run: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """Run until the medians of two successive windows agree or `MAX_WARM_UP_SECONDS` have passed.

    Returns:
        Median seconds per run of the last window.
    """
    start, previous = clock(), math.inf
    while True:
        opened, window = clock(), list[float]()
        while len(window) < WINDOW_RUNS or clock() - opened < WINDOW_SECONDS:
            window.append(_seconds(run, clock))
            if clock() - opened >= MAX_WARM_UP_SECONDS / 2:
                break  # one run per window is enough when a run takes seconds
        median = float(np.median(window))
        late = clock() - start >= MAX_WARM_UP_SECONDS and previous != math.inf
        if late or abs(median - previous) <= STABLE * median:
            return median
        previous = median


def _seconds(run: Callable[[], object], clock: Clock) -> float:
    start = clock()
    run()
    return clock() - start


def measure_latency(
    embedders: Sequence[Embedder],
    images: Sequence[Pixels],
    batch: int,
    min_runs: int = MIN_RUNS,
    min_seconds: float = MIN_SECONDS,
    report: Report = silent,
    clock: Clock = time.perf_counter,
) -> list[Latency]:
    """Time models on one batch size, from uint8 crops of network size to embeddings in host memory.

    Args:
        embedders: the models; the first is the reference of the ratios.
        images: for each model (N, height, width, 3) uint8 at its input size, N >= 1; repeated to fill the batch.
        batch: number of images per run.
        min_runs, min_seconds: minimum for each model; both are reached.
        report: progress.
        clock: returns seconds.
    """
    batches = [np.resize(crops, (batch, *crops.shape[1:])) for crops in images]
    workloads = [
        Workload(
            partial(embedder.embed_prepared, crops),
            partial(embedder.gpu_milliseconds, crops),
            clock_reader(embedder.device),
        )
        for embedder, crops in zip(embedders, batches, strict=True)
    ]
    timings = time_interleaved(workloads, min_runs, min_seconds, report, f"timing batch {batch}", clock)
    return _latencies(embedders, timings, batch, "model")


def measure_end_to_end(
    embedders: Sequence[Embedder],
    paths: Sequence[Path],
    batch: int,
    min_runs: int = MIN_RUNS,
    min_seconds: float = MIN_SECONDS,
    report: Report = silent,
) -> list[Latency]:
    """Time models on one batch of image files: decode, resize, copy to the device, infer, copy back.

    After the warm-up the files are in the page cache: disk access is not timed.

    Args:
        paths: image files, at least one; repeated to fill the batch.
        embedders, batch, min_runs, min_seconds, report: as for `measure_latency`.

    Raises:
        DataError: an image is missing or cannot be decoded.
        PmmError: `paths` is empty.
    """
    if not paths:
        raise PmmError("there are no images to time", "Pass at least one image file")
    files = [paths[number % len(paths)] for number in range(batch)]
    works = [(partial(embed_files, model, files, batch=batch), clock_reader(model.device)) for model in embedders]
    workloads = [Workload(run, read_clocks=read_clocks) for run, read_clocks in works]
    timings = time_interleaved(workloads, min_runs, min_seconds, report, f"timing batch {batch} from files")
    return _latencies(embedders, timings, batch, "end to end")


def without_cuda_graphs(embedder: Embedder) -> Embedder | None:
    """Load the same TensorRT engine without CUDA graphs; None if the model does not use them.

    Raises:
        GpuError: the GPU has no memory left for a second copy.
    """
    if not embedder.cuda_graphs:
        return None
    from pmm_edge.runtime.tensorrt_backend import TensorRTEmbedder

    return TensorRTEmbedder(embedder.path, embedder.device, cuda_graphs=False)


def ratio_interval(
    turns: Sequence[Sequence[float]], reference: Sequence[Sequence[float]], resamples: int = 1000
) -> tuple[float, float, float]:
    """Return the ratio of the medians with its 95 % interval from a paired bootstrap over turns.

    The bootstrap resamples whole turns of model and reference together: runs of one turn are not independent, and
    whatever the machine did during a turn affected both (Efron and Tibshirani 1993, chapter 8).

    Args:
        turns, reference: seconds of each run, by turn; pairs with an empty turn are ignored.
        resamples: number of bootstrap samples.

    Returns:
        Ratio, lower bound, upper bound. With fewer than two pairs both bounds equal the ratio.
    """
    pairs = [(np.array(own), np.array(other)) for own, other in zip(turns, reference, strict=True) if own and other]
    random = np.random.default_rng(0)

    def ratio(chosen: Sequence[int]) -> float:
        own, other = (np.median(np.concatenate([pairs[turn][side] for turn in chosen])) for side in (0, 1))
        return float(own / other)

    drawn = [ratio(random.integers(0, len(pairs), len(pairs)).tolist()) for _ in range(resamples)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return ratio(range(len(pairs))), float(low), float(high)


def _latencies(embedders: Sequence[Embedder], timings: Sequence[Timings], batch: int, scope: Scope) -> list[Latency]:
    found = []
    for embedder, timing in zip(embedders, timings, strict=True):
        seconds = np.array(timing.seconds)
        median, p90, p99 = (float(value) for value in np.percentile(seconds, [50, 90, 99]))
        is_reference = timing is timings[0]
        ratio, low, high = (1.0, 1.0, 1.0) if is_reference else ratio_interval(timing.turns, timings[0].turns)
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
                gpu_ms=float(np.median(timing.gpu_ms)) if timing.gpu_ms else None,
                cpu_clocks=clock_range(reading.cpu_mhz for reading in timing.clocks),
                gpu_clocks=clock_range(reading.gpu_mhz for reading in timing.clocks),
                slowed_by=tuple(dict.fromkeys(reason for reading in timing.clocks for reason in reading.slowed_by)),
            )
        )
    return found


TIMEOUT = 600.0
_POLL_SECONDS = 0.01

# The child does not import pmm_edge.bench, whose import would be timed. It uses the import paths of this process,
# because `-c` puts the working directory first.
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
with open("/proc/self/status") as status:  # getrusage starts at the size of the parent process
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024
print(json.dumps([first, peak]))
"""


def measure_cold_start(path: Path, device: str | None, batch: int, timeout: float = TIMEOUT) -> ColdStart:
    """Start Python, load a model, embed one crop, then embed a batch of crops.

    The model file is usually in the page cache; right after a boot, reading it from disk adds to the time.

    Args:
        path: model file, as for `pmm_edge.load`.
        device: as for `pmm_edge.load`.
        batch: number of crops for the memory measurement, at least 1.
        timeout: seconds after which the process is killed.

    Returns:
        Time and peak memory. GPU memory is the peak of all processes minus what was in use before; None without NVML.
        On a Jetson, GPU memory is part of the memory of the process.

    Raises:
        ModelError: the process failed or took too long.
    """
    gpu = open_gpu(device or "cuda")
    before = peak_gpu = gpu.used_mib if gpu else None
    arguments = json.dumps([str(path), device, batch, sys.path])
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.monotonic()  # this clock is the same in all processes
        process = subprocess.Popen([sys.executable, "-c", _CHILD, arguments], stdout=out, stderr=err)
        try:
            while process.poll() is None and time.monotonic() < start + timeout:
                if gpu and (used := gpu.used_mib) is not None:
                    peak_gpu = max(used, peak_gpu or 0.0)
                time.sleep(_POLL_SECONDS)
        finally:
            process.kill()  # no effect if the process has ended
            process.wait()
        out.seek(0)
        err.seek(0)
        try:
            first, peak = map(float, json.loads(out.read().splitlines()[-1]))  # engines may have printed lines before
        except (IndexError, ValueError, TypeError):
            first = peak = math.nan
        if process.returncode or math.isnan(first):
            lines = err.read().decode(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else f"exit code {process.returncode}"
            if process.returncode < 0:
                reason = f"killed by signal {-process.returncode} after {time.monotonic() - start:.0f} s"
            raise ModelError(
                f"cannot run {path} in a separate process: {reason}",
                "Free memory for a second copy of the model; the other measurements are not affected",
            )
    gpu_memory = peak_gpu - before if peak_gpu is not None and before is not None else None
    return ColdStart(1000 * (first - start), peak, batch, gpu_memory)
