"""Single crops from several clients at once, as cameras and servers send them, through dynamic batching."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pmm_edge.bench.report import Stream
from pmm_edge.console import Report, silent
from pmm_edge.errors import PmmError
from pmm_edge.images import Pixels
from pmm_edge.runtime.batcher import Batcher
from pmm_edge.runtime.embedder import Embedder

SECONDS = 3.0
WARM_UP_SECONDS = 3.0
_TICK = 0.1


@dataclass
class _Client:
    """What one client saw."""

    calls: list[tuple[float, float]] = field(default_factory=list)
    """Start and end of each."""
    error: Exception | None = None


def measure_stream(
    embedder: Embedder,
    crops: Sequence[Pixels] | Pixels,
    clients: int,
    seconds: float = SECONDS,
    largest_batch: int | None = None,
    report: Report = silent,
) -> Stream:
    """Let clients send single crops, each the next one as soon as it has the embedding of the one before.

    A closed loop: as many crops are under way as there are clients. Before, the batch sizes that can come are run once,
    for `WARM_UP_SECONDS` at most; and the first calls, of a fifth of the time, are not counted.

    Args:
        crops: (H, W, 3) uint8 RGB of any size, at least one; the clients take them in turn.
        clients: threads.
        seconds: that are counted.
        largest_batch: of the crops that wait; see `Batcher`.

    Raises:
        PmmError: there is no client or no crop; or what the embedder raised for a crop.
    """
    if clients < 1 or not len(crops) or seconds <= 0:
        raise PmmError(
            f"a stream of {clients} clients with {len(crops)} crops for {seconds:g} s cannot be measured",
            "Choose one client, one crop or more",
        )
    what = f"streaming from {clients} clients"
    seen = [_Client() for _ in range(clients)]
    stop = threading.Event()
    with Batcher(embedder, largest_batch) as batcher:
        report(what, 0, 100, "warming up")
        _warm_up(embedder, crops, min(clients, batcher.largest_batch))
        threads = [
            threading.Thread(target=_send, args=(batcher, crops, number, client, stop), name=f"client {number}")
            for number, client in enumerate(seen)
        ]
        for thread in threads:
            thread.start()
        try:
            begin, before = _wait(seen, seconds / 5), batcher.sizes.copy()
            for tick in range(ticks := max(1, round(seconds / _TICK))):
                report(what, 100 * tick // ticks, 100)
                end = _wait(seen, seconds / ticks)
            after = batcher.sizes.copy()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    report(what, 100, 100)
    for client in seen:
        if client.error:
            raise client.error
    return _stream(seen, begin, end, after - before, clients)


def _warm_up(embedder: Embedder, crops: Sequence[Pixels] | Pixels, largest: int) -> None:
    """Run every batch size that can come, for some engines prepare each at its first; the largest takes most memory."""
    until = time.perf_counter() + WARM_UP_SECONDS
    for batch in (largest, *range(1, largest)):
        embedder.embed([crops[number % len(crops)] for number in range(batch)])
        if time.perf_counter() > until:
            return


def _send(
    batcher: Batcher, crops: Sequence[Pixels] | Pixels, first: int, client: _Client, stop: threading.Event
) -> None:
    number = first
    try:
        while not (client.calls and stop.is_set()):
            start = time.perf_counter()
            batcher.embed(crops[number % len(crops)])
            client.calls.append((start, time.perf_counter()))
            number += 1
    except Exception as error:  # raised where the others are known to have ended
        client.error = error


def _wait(seen: Sequence[_Client], seconds: float) -> float:
    """Let the clients go on for a while, less where one failed; the time after it."""
    until = time.perf_counter() + seconds
    while (now := time.perf_counter()) < until and not any(client.error for client in seen):
        time.sleep(min(_TICK, until - now))
    return time.perf_counter()


def _stream(seen: Sequence[_Client], begin: float, end: float, sizes: Counter[int], clients: int) -> Stream:
    ended = [(start, stop) for client in seen for start, stop in client.calls if begin <= stop < end]
    # With work of seconds none may have ended in time: then all that there is.
    calls = ended or [call for client in seen for call in client.calls]
    span = end - begin if ended else max(stop for _, stop in calls) - min(start for start, _ in calls)
    median, p90, p99 = (float(1000 * value) for value in np.percentile([b - a for a, b in calls], [50, 90, 99]))
    batches = sizes or Counter({1: 1})
    return Stream(
        clients=clients,
        largest_batch=max(batches),
        crops=len(calls),
        crops_per_second=len(calls) / span,
        median_ms=median,
        p90_ms=p90,
        p99_ms=p99,
        mean_batch=sum(size * number for size, number in batches.items()) / batches.total(),
    )
