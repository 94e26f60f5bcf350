"""Latency with interleaved timing, and the cold start of a model in a new process.

All models share the same 10 to 20 turns, so that drift of the machine affects them alike. Each turn of a model starts
with one uncounted run, which refills the caches and lets the threads of the previous engine stop spinning.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic, perf_counter

import numpy as np
from numpy.typing import ArrayLike

from pmm_edge.bench.report import ColdStart, Latency
from pmm_edge.bench.resources import ClockReading, clock_range, clock_reader
from pmm_edge.console import Report, silent
from pmm_edge.errors import ModelError
from pmm_edge.images import Pixels
from pmm_edge.runtime.embed_files import embed_files
from pmm_edge.runtime.embedder import Embedder

MIN_RUNS, MIN_SECONDS = 50, 1.0
MAX_TURNS, MIN_RUNS_PER_TURN = 20, 5  # with fewer runs per turn, too much time goes into uncounted ones
MIN_WARM_UP_SECONDS, MAX_WARM_UP_SECONDS = 0.2, 1.5
STABLE = 0.05  # the warm-up ends when the medians of its two halves differ by at most this fraction


@dataclass
class Workload:
    """A function to time, and the seconds of its runs in turns; GPU time and clocks are read at the end of each."""

    run: Callable[[], object]
    gpu_milliseconds: Callable[[], float | None] = lambda: None
    read_clocks: Callable[[], ClockReading] = lambda: (None, None)
    turns: list[list[float]] = field(default_factory=list)
    gpu_ms: list[float | None] = field(default_factory=list)
    clocks: list[ClockReading] = field(default_factory=list)


def time_interleaved(
    workloads: Sequence[Workload], min_runs: int, min_seconds: float, report: Report = silent, what: str = "timing"
) -> None:
    """Warm up each workload, then time all of them in turns: each has `min_runs` and, by its warm-up, `min_seconds`."""
    report(what, 0, 1, "warming up")
    typical = [warm_up(workload.run) for workload in workloads]
    wanted = [max(min_runs, math.ceil(min_seconds / max(seconds, 1e-9))) for seconds in typical]
    turns = max(1, min(MAX_TURNS, min(wanted) // MIN_RUNS_PER_TURN))
    for turn in range(turns):
        report(what, turn, turns)
        for workload, runs in zip(workloads, wanted, strict=True):
            workload.run()
            workload.turns.append([_seconds(workload.run) for _ in range(math.ceil(runs / turns))])
            workload.clocks.append(workload.read_clocks())
            workload.gpu_ms.append(workload.gpu_milliseconds())
    report(what, turns, turns)


def warm_up(run: Callable[[], object]) -> float:
    """Run until the times are stable or `MAX_WARM_UP_SECONDS` have passed; return the median seconds of late runs."""
    seconds = [_seconds(run)]
    while True:
        seconds.append(_seconds(run))
        first, second = (float(np.median(half)) for half in np.array_split(seconds, 2))
        stable = len(seconds) >= 6 and sum(seconds) >= MIN_WARM_UP_SECONDS and abs(second - first) <= STABLE * second
        if stable or sum(seconds) >= MAX_WARM_UP_SECONDS:
            return second


def _seconds(run: Callable[[], object]) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start


def measure_latency(
    embedders: Sequence[Embedder],
    images: Sequence[Pixels],
    batch: int,
    min_runs: int = MIN_RUNS,
    min_seconds: float = MIN_SECONDS,
    report: Report = silent,
    files: Sequence[Path] = (),
) -> list[Latency]:
    """Time models on one batch, from crops to embeddings in host memory; the first is the reference of the ratios.

    `images` are for each model N >= 1 crops of its input size, (N, height, width, 3) uint8. With `files`, it is instead
    image files that are decoded, resized and embedded; after the warm-up they are in the page cache. Both are repeated
    to fill the batch. Raises DataError if a file cannot be decoded.
    """
    repeated, workloads = [files[number % len(files)] for number in range(batch) if files], []
    for number, embedder in enumerate(embedders):
        clocks = clock_reader(embedder.device)
        if files:
            workloads.append(Workload(partial(embed_files, embedder, repeated, batch=batch), read_clocks=clocks))
            continue
        crops = np.resize(images[number], (batch, *images[number].shape[1:]))
        run, gpu = partial(embedder.embed_prepared, crops), partial(embedder.gpu_milliseconds, crops)
        workloads.append(Workload(run, gpu, clocks))
    time_interleaved(workloads, min_runs, min_seconds, report, f"timing batch {batch}")
    found = list[Latency]()
    for embedder, workload in zip(embedders, workloads, strict=True):
        times = 1000 * np.array(workload.turns)
        median, p90, p99 = np.percentile(times, [50, 90, 99]).tolist()
        variation, ratio = float(times.std() / times.mean()), ratio_interval(workload.turns, workloads[0].turns)
        measured = [value for value in workload.gpu_ms if value is not None]
        latency = Latency(
            batch=batch,
            scope="end to end" if files else "model",
            cuda_graph=embedder.cuda_graphs,
            runs=times.size,
            median_ms=median,
            p90_ms=p90,
            p99_ms=p99,
            variation=variation,
            images_per_second=1000 * batch / median,
            ratio=ratio[0],
            ratio_low=ratio[1],
            ratio_high=ratio[2],
            gpu_ms=float(np.median(measured)) if measured else None,
            cpu_clocks=clock_range(cpu for cpu, _ in workload.clocks),
            gpu_clocks=clock_range(gpu for _, gpu in workload.clocks),
        )
        found.append(latency)
    return found


def ratio_interval(turns: ArrayLike, reference: ArrayLike, resamples: int = 1000) -> tuple[float, float, float]:
    """Return the ratio of the medians and the bounds of its 95 % interval, from a paired bootstrap over turns.

    Both arrays are (turns, runs) seconds; the number of runs may differ. Runs of one turn are not independent, and
    whatever the machine did during a turn affected both models (Efron and Tibshirani 1993, chapter 8).
    """
    own, other = np.asarray(turns), np.asarray(reference)
    drawn = np.random.default_rng(0).integers(0, len(own), (resamples, len(own)))
    low, high = np.percentile([np.median(own[rows]) / np.median(other[rows]) for rows in drawn], [2.5, 97.5])
    return float(np.median(own) / np.median(other)), float(low), float(high)


# The child uses the import paths of this process: `-c` puts the working directory first.
_CHILD = """
import json, sys, time
path, device, batch, sys.path[:] = json.loads(sys.argv[1])
import numpy
import pmm_edge
embedder = pmm_edge.load(path, device, require_certificate=None)
size = embedder.spec.input
crops = numpy.zeros((batch, size.height, size.width, 3), numpy.uint8)
embedder.embed(crops[:1])
first = time.monotonic()
embedder.embed(crops)
with open("/proc/self/status") as status:  # getrusage starts at the size of the parent process
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024
print(json.dumps([first, peak]))
"""


def measure_cold_start(path: Path, device: str, batch: int, timeout: float = 600.0) -> ColdStart:
    """Start Python, load a model, embed one crop, then embed a batch of crops.

    Raises ModelError if the process failed or took more than `timeout` seconds.
    """
    command = [sys.executable, "-c", _CHILD, json.dumps([str(path), device, batch, sys.path])]
    start = monotonic()  # this clock is the same in all processes
    try:
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout, check=False)
        lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
        reason = lines[-1] if ended.returncode else ""
    except subprocess.TimeoutExpired:
        reason = f"no result after {timeout:.0f} s"
    except OSError as error:  # such as no memory for another process
        reason = str(error)
    if reason:
        raise ModelError(
            f"cannot run {path} in a separate process: {reason}",
            "Free memory for a second copy of the model; the other measurements are not affected",
        )
    first, peak = json.loads(ended.stdout.splitlines()[-1])  # engines may have printed lines before
    return ColdStart(1000 * (first - start), peak, batch)
