"""How long a batch takes, from crops and from image files; ratios are to a reference timed in the same turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from pmm_edge.bench.clocks import clock_range, clock_reader
from pmm_edge.bench.figures import Latency, Scope
from pmm_edge.bench.turns import Clock, Times, Work, time_in_turns
from pmm_edge.errors import PmmError
from pmm_edge.progress import Report, silent
from pmm_edge.runtime.crops import Pixels
from pmm_edge.runtime.embedder import Embedder
from pmm_edge.runtime.files import embed_files

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

    Each is warmed up until it is stable; then they take turns (`pmm_edge.bench.turns`).

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
        Work(partial(embed_files, embedder, files, batch), reading=clock_reader(embedder.device))
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
