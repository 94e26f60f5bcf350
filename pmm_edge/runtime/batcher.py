"""Dynamic batching: single crops from many threads go through the network together."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections import Counter
from concurrent.futures import Future

import numpy as np

from pmm_edge.errors import PmmError
from pmm_edge.images import Pixels, prepare_crops
from pmm_edge.runtime.embedder import CHUNK, Embedder, Embeddings

_Waiting = tuple[Pixels, "Future[Embeddings]"]


class Batcher:
    """An embedder for threads that come with one crop at a time, as those of a server or of several cameras do.

    While a batch is in the network, the crops that come wait; all of them are the next batch. So nothing is added to
    the time of a crop that comes alone, and the batches grow with the load. One thread runs the network.

        with Batcher(pmm_edge.load("model.onnx")) as batcher:
            embedding = batcher.embed(crop)      # from any thread

    Args:
        embedder: what embeds.
        largest_batch: crops that go through the network at once; by default the most that the engine takes, 64 of one
            that takes any.
        delay: seconds that a crop may wait for others to come; more throughput under a load that comes unevenly.

    Raises:
        PmmError: `largest_batch` is less than 1, or `delay` less than 0.
    """

    def __init__(self, embedder: Embedder, largest_batch: int | None = None, delay: float = 0.0) -> None:
        if largest_batch is None:
            largest_batch = embedder.profile.maximum if embedder.profile else CHUNK
        if largest_batch < 1 or delay < 0:
            raise PmmError(
                f"batches of {largest_batch} crops after {delay} s cannot be made",
                "Choose a batch of 1 or more, and a delay of 0 or more",
            )
        self.embedder = embedder
        self.largest_batch = largest_batch
        self.sizes: Counter[int] = Counter()
        """How many batches of which size went through the network."""
        self._waiting: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        # The thread knows the queue, not the batcher: one that nobody holds any longer ends its thread.
        arguments = (embedder, self._waiting, self.sizes, largest_batch, delay)
        self._thread = threading.Thread(target=_run, args=arguments, name="batcher", daemon=True)
        self._thread.start()
        self._end = weakref.finalize(self, self._waiting.put, None)

    def embed(self, crop: Pixels) -> Embeddings:
        """Embed one crop; returns when its batch is done. What fails in one batch fails for its crops alone.

        Args:
            crop: (H, W, 3) uint8 RGB of any size.

        Returns:
            (D,) float32, of length 1 where `embedder.spec.normalized_output`.

        Raises:
            DataError: a crop without pixels, grey, with an alpha channel, or of another type than uint8; the crops
                of other threads do not notice.
            PmmError: the batcher is closed.
            GpuError: the engine failed on this batch.
        """
        size = self.embedder.spec.input
        (prepared,) = prepare_crops([crop], size.height, size.width)  # in the caller's thread, beside the network
        done: Future[Embeddings] = Future()
        with self._lock:
            if self._closed:
                raise PmmError("the batcher is closed", "Make another one")
            self._waiting.put((prepared, done))
        return done.result()

    def close(self) -> None:
        """Embed what waits, take nothing new, and end. A second time does nothing."""
        with self._lock:
            self._closed = True
        self._end()
        self._thread.join()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _run(
    embedder: Embedder,
    waiting: queue.SimpleQueue[_Waiting | None],
    sizes: Counter[int],
    largest_batch: int,
    delay: float,
) -> None:
    open_ = True
    while open_:
        batch, open_ = _gather(waiting, largest_batch, delay)
        if batch:
            sizes[len(batch)] += 1
            _embed(embedder, batch)


def _gather(
    waiting: queue.SimpleQueue[_Waiting | None], largest_batch: int, delay: float
) -> tuple[list[_Waiting], bool]:
    """The next batch, and whether more may come."""
    batch: list[_Waiting] = []
    until = 0.0
    while len(batch) < largest_batch:
        try:
            left = max(until - time.monotonic(), 0.0)
            item = waiting.get(timeout=left) if batch and left else waiting.get(block=not batch)
        except queue.Empty:
            break
        if item is None:
            return batch, False
        if not batch:
            until = time.monotonic() + delay
        batch.append(item)
    return batch, True


def _embed(embedder: Embedder, batch: list[_Waiting]) -> None:
    try:
        embeddings = embedder.embed_prepared(np.stack([crop for crop, _ in batch]))
        given = list(zip([done for _, done in batch], embeddings, strict=True))
    except Exception as error:  # whatever it is, those who wait for it must hear of it
        for _, done in batch:
            done.set_exception(error)
        return
    for done, embedding in given:
        done.set_result(embedding)
