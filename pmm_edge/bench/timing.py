"""Latency with interleaved timing, and the cold start of a model in a new process.

All models share the same 10 to 20 turns, so that drift of the machine affects them alike. Each turn of a model starts
with one uncounted run, which refills the caches and lets the threads of the previous engine stop spinning.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from pmm_edge.bench.report import ColdStart, Latency, Scope
from pmm_edge.bench.resources import ClockReading, clock_range, clock_reader, open_gpu
from pmm_edge.console import Report, silent
from pmm_edge.errors import ModelError
from pmm_edge.images import Pixels
from pmm_edge.runtime.embed_files import embed_files
from pmm_edge.runtime.embedder import Embedder

Clock = Callable[[], float]

MIN_RUNS, MIN_SECONDS = 50, 1.0
MAX_TURNS, MIN_RUNS_PER_TURN = 20, 5
"""With fewer runs per turn, too much time goes into uncounted ones."""
TIME_MARGIN = 1.05
"""Plan this much more time than requested, so that a run that became slightly faster does not need an extra turn."""
MIN_WARM_UP_SECONDS, MAX_WARM_UP_SECONDS = 0.2, 1.5
STABLE = 0.05
"""The warm-up ends when the medians of its two halves differ by at most this fraction."""


@dataclass
class Workload:
    """A function to time, and its times."""

    run: Callable[[], object]
    gpu_milliseconds: Callable[[], float | None] = lambda: None
    """Called once at the end of each turn."""
    read_clocks: Callable[[], ClockReading] = ClockReading
    """Called at the end of each turn, while the device is still hot."""
    turns: list[list[float]] = field(default_factory=list)
    """Seconds of each run; every turn has the same number of runs."""
    gpu_ms: list[float | None] = field(default_factory=list)
    clocks: list[ClockReading] = field(default_factory=list)


def time_interleaved(
    workloads: Sequence[Workload],
    min_runs: int,
    min_seconds: float,
    report: Report = silent,
    what: str = "timing",
    clock: Clock = time.perf_counter,
) -> None:
    """Warm up each workload, then time all of them in turns, until each has `min_runs` and `min_seconds`.

    A fast workload gets more runs per turn than a slow one, so that all of them need about the same number of turns.
    """
    report(what, 0, 1, "warming up")
    typical = [warm_up(workload.run, clock) for workload in workloads]
    wanted = [max(min_runs, math.ceil(TIME_MARGIN * min_seconds / max(seconds, 1e-9))) for seconds in typical]
    turns = max(1, min(MAX_TURNS, min(wanted) // MIN_RUNS_PER_TURN))

    def enough(workload: Workload) -> bool:
        seconds = [second for turn in workload.turns for second in turn]
        return len(seconds) >= min_runs and sum(seconds) >= min_seconds

    turn = 0
    # A machine that became faster after the warm-up needs more turns than planned.
    while turn < turns or not all(map(enough, workloads)):
        report(what, min(turn, turns - 1), turns)
        for workload, runs in zip(workloads, wanted, strict=True):
            workload.run()
            workload.turns.append([_seconds(workload.run, clock) for _ in range(math.ceil(runs / turns))])
            workload.clocks.append(workload.read_clocks())
            workload.gpu_ms.append(workload.gpu_milliseconds())
        turn += 1
    report(what, turns, turns)


def warm_up(run: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """Run until the times are stable or `MAX_WARM_UP_SECONDS` have passed; return the median seconds of late runs."""
    seconds = [_seconds(run, clock)]
    while True:
        seconds.append(_seconds(run, clock))
        first, second = (float(np.median(half)) for half in np.array_split(seconds, 2))
        stable = len(seconds) >= 6 and sum(seconds) >= MIN_WARM_UP_SECONDS and abs(second - first) <= STABLE * second
        if stable or sum(seconds) >= MAX_WARM_UP_SECONDS:
            return second


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

    The first model is the reference of the ratios. `images` holds (N, height, width, 3) uint8 for each model at its
    input size, N >= 1; they are repeated to fill the batch. Each model reaches both `min_runs` and `min_seconds`.
    """
    workloads = []
    for embedder, crops in zip(embedders, images, strict=True):
        filled = np.resize(crops, (batch, *crops.shape[1:]))
        run, gpu = partial(embedder.embed_prepared, filled), partial(embedder.gpu_milliseconds, filled)
        workloads.append(Workload(run, gpu, clock_reader(embedder.device)))
    time_interleaved(workloads, min_runs, min_seconds, report, f"timing batch {batch}", clock)
    return _latencies(embedders, workloads, batch, "model")


def measure_end_to_end(
    embedders: Sequence[Embedder],
    paths: Sequence[Path],
    batch: int,
    min_runs: int = MIN_RUNS,
    min_seconds: float = MIN_SECONDS,
    report: Report = silent,
) -> list[Latency]:
    """Time models on one batch of image files: decode, resize, copy to the device, infer, copy back.

    After the warm-up the files are in the page cache: disk access is not timed. `paths`, at least one, are repeated to
    fill the batch; the other arguments are those of `measure_latency`. Raises DataError if an image cannot be decoded.
    """
    files = [paths[number % len(paths)] for number in range(batch)]
    workloads = [
        Workload(partial(embed_files, embedder, files, batch=batch), read_clocks=clock_reader(embedder.device))
        for embedder in embedders
    ]
    time_interleaved(workloads, min_runs, min_seconds, report, f"timing batch {batch} from files")
    return _latencies(embedders, workloads, batch, "end to end")


def without_cuda_graphs(embedder: Embedder) -> Embedder | None:
    """Load the same TensorRT engine without CUDA graphs; None if the model does not use them.

    Raises GpuError if the GPU has no memory left for a second copy.
    """
    if not embedder.cuda_graphs:
        return None
    from pmm_edge.runtime.tensorrt_backend import TensorRTEmbedder

    return TensorRTEmbedder(embedder.path, embedder.device, cuda_graphs=False)


def ratio_interval(turns: ArrayLike, reference: ArrayLike, resamples: int = 1000) -> tuple[float, float, float]:
    """Return the ratio of the medians and the bounds of its 95 % interval, from a paired bootstrap over turns.

    Both arrays are (turns, runs) seconds; the number of runs may differ. The bootstrap resamples whole turns of model
    and reference together: runs of one turn are not independent, and whatever the machine did during a turn affected
    both (Efron and Tibshirani 1993, chapter 8).
    """
    own, other = np.asarray(turns), np.asarray(reference)
    drawn = np.random.default_rng(0).integers(0, len(own), (resamples, len(own)))
    low, high = np.percentile([np.median(own[rows]) / np.median(other[rows]) for rows in drawn], [2.5, 97.5])
    return float(np.median(own) / np.median(other)), float(low), float(high)


def _latencies(embedders: Sequence[Embedder], workloads: Sequence[Workload], batch: int, scope: Scope) -> list[Latency]:
    found = []
    for embedder, workload in zip(embedders, workloads, strict=True):
        median, p90, p99 = (float(value) for value in np.percentile(workload.turns, [50, 90, 99]))
        ratio, low, high = ratio_interval(workload.turns, workloads[0].turns)
        gpu_ms = [value for value in workload.gpu_ms if value is not None]
        found.append(
            Latency(
                batch=batch,
                scope=scope,
                cuda_graph=embedder.cuda_graphs,
                runs=np.size(workload.turns),
                median_ms=1000 * median,
                p90_ms=1000 * p90,
                p99_ms=1000 * p99,
                variation=float(np.std(workload.turns) / np.mean(workload.turns)),
                images_per_second=batch / median,
                ratio=ratio,
                ratio_low=low,
                ratio_high=high,
                gpu_ms=float(np.median(gpu_ms)) if gpu_ms else None,
                cpu_clocks=clock_range(reading.cpu_mhz for reading in workload.clocks),
                gpu_clocks=clock_range(reading.gpu_mhz for reading in workload.clocks),
                slowed_by=tuple(dict.fromkeys(reason for reading in workload.clocks for reason in reading.slowed_by)),
            )
        )
    return found


# The child imports nothing of pmm_edge.bench before the first embedding, because the import would be timed. It uses the
# import paths of this process: `-c` puts the working directory first.
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
from pmm_edge.bench.resources import open_gpu
gpu = open_gpu(embedder.device)
print(json.dumps([first, peak, gpu and gpu.used_mib]))
"""


def measure_cold_start(path: Path, device: str, batch: int, timeout: float = 600.0) -> ColdStart:
    """Start Python, load a model, embed one crop, then embed a batch of crops.

    The model file is usually in the page cache; right after a boot, reading it from disk adds to the time. GPU memory
    is what all processes use after the batch minus what they used before the start; None without NVML. On a Jetson it
    is part of the memory of the process. Raises ModelError if the process failed or took more than `timeout` seconds.
    """
    gpu = open_gpu(device)
    before = gpu.used_mib if gpu else None
    command = [sys.executable, "-c", _CHILD, json.dumps([str(path), device, batch, sys.path])]
    start = time.monotonic()  # this clock is the same in all processes
    try:
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout, check=False)
        reason = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
        failed = ended.returncode != 0
    except subprocess.TimeoutExpired:
        failed, reason = True, f"no result after {timeout:.0f} s"
    if failed:
        raise ModelError(
            f"cannot run {path} in a separate process: {reason}",
            "Free memory for a second copy of the model; the other measurements are not affected",
        )
    first, peak, used = json.loads(ended.stdout.splitlines()[-1])  # engines may have printed lines before
    return ColdStart(1000 * (first - start), peak, batch, None if before is None or used is None else used - before)
