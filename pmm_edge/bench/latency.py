"""How long a model takes: wall-clock medians, several models in turns so that drift hits all alike."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pmm_edge.progress import Report, silent
from pmm_edge.runtime.crops import Pixels
from pmm_edge.runtime.embedder import Embedder

MIN_RUNS = 30
MIN_SECONDS = 1.0
_RUNS_A_TURN = 5


@dataclass(frozen=True)
class Latency:
    """Wall-clock time of one batch, from uint8 crops of network size to embeddings in host memory."""

    batch: int
    runs: int
    median_ms: float
    p90_ms: float
    images_per_second: float
    """At the median."""


def measure_latency(
    embedders: Sequence[Embedder],
    images: Sequence[Pixels],
    batch: int,
    min_runs: int = MIN_RUNS,
    min_seconds: float = MIN_SECONDS,
    report: Report = silent,
) -> list[Latency]:
    """Time embedders on one batch size, in turns.

    Each turn starts with a run that is not counted: it warms up, and lets the threads of the engine before come
    to rest, which spin for a while after their last task.

    Args:
        images: for each embedder (N, height, width, 3) uint8 of its size, N >= 1, repeated to fill the batch.
        batch: images in a run.
        min_runs, min_seconds: of each embedder, both reached.

    Returns:
        One for each embedder.
    """
    batches = [np.resize(crops, (batch, *crops.shape[1:])) for crops in images]
    seconds: list[list[float]] = [[] for _ in embedders]
    what = f"timing batch {batch}"
    while (runs := len(seconds[0])) < min_runs or min(map(sum, seconds)) < min_seconds:
        report(what, min(runs, min_runs), min_runs)
        for embedder, crops, times in zip(embedders, batches, seconds, strict=True):
            embedder.embed_prepared(crops)
            times.extend(_timed(embedder, crops) for _ in range(_RUNS_A_TURN))
    report(what, min_runs, min_runs)
    return [_summary(batch, times) for times in seconds]


def _summary(batch: int, seconds: list[float]) -> Latency:
    median, p90 = (float(np.percentile(seconds, share)) for share in (50, 90))
    return Latency(batch, len(seconds), 1000 * median, 1000 * p90, batch / median)


def _timed(embedder: Embedder, crops: Pixels) -> float:
    start = time.perf_counter()
    embedder.embed_prepared(crops)
    return time.perf_counter() - start
