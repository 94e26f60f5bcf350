"""Embed image files: they are decoded on threads while the network works on the ones before them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pmm_edge.errors import DataError, PmmError
from pmm_edge.images import read_crop
from pmm_edge.machine import threads
from pmm_edge.progress import Report, silent
from pmm_edge.runtime.crops import Pixels
from pmm_edge.runtime.embedder import Embedder, Embeddings

_BATCHES_AHEAD = 2


@dataclass(frozen=True, eq=False)
class EmbeddedFiles:
    """Embeddings of the files that can be read, what is wrong with the others, and how long it took."""

    embeddings: Embeddings
    """(N, D) float32, in the order of the files."""
    rows: NDArray[np.int64]
    """(N,) which of the files each embedding is of."""
    bad: list[tuple[int, str]]
    """Which files cannot be read, and why."""
    seconds: float
    """From the first file to the last embedding."""
    model_seconds: float
    """Of `seconds`, what the network took; the rest is decoding that it had to wait for."""


def embed_files(
    embedder: Embedder, paths: Sequence[Path], batch: int | None = None, report: Report = silent
) -> Embeddings:
    """Embed image files in their order.

    Args:
        batch: images that are embedded at once; None for `embedder.chunk`.
        report: told after each batch how many images are done.

    Returns:
        (N, D) float32.

    Raises:
        DataError: an image is missing, truncated or no image.
        PmmError: `batch` is less than 1.
    """
    return _embed(embedder, paths, batch, report, skip_bad=False).embeddings


def embed_readable_files(
    embedder: Embedder, paths: Sequence[Path], batch: int | None = None, report: Report = silent
) -> EmbeddedFiles:
    """Embed the image files that can be read, in their order, and say which cannot.

    Args:
        batch: images that are embedded at once; None for `embedder.chunk`.
        report: told after each batch how many images are done.

    Raises:
        PmmError: `batch` is less than 1.
    """
    return _embed(embedder, paths, batch, report, skip_bad=True)


def _embed(
    embedder: Embedder, paths: Sequence[Path], batch: int | None, report: Report, skip_bad: bool
) -> EmbeddedFiles:
    batch = embedder.chunk if batch is None else batch
    if batch < 1:
        raise PmmError(f"a batch of {batch} images cannot be embedded", "Choose 1 or more")
    embeddings = np.empty((len(paths), embedder.spec.embedding_size), np.float32)
    rows: list[int] = []
    bad: list[tuple[int, str]] = []
    what, done, model_seconds = f"embedding with {embedder.path.name}", 0, 0.0
    report(what, done, len(paths))
    start = time.perf_counter()
    for decoded in _decoded(paths, batch, embedder.spec.input.height, embedder.spec.input.width):
        images = []
        for row, image in enumerate(decoded, start=done):
            if not isinstance(image, DataError):
                rows.append(row)
                images.append(image)
            elif skip_bad:
                bad.append((row, str(image.__cause__ or image.problem)))
            else:
                raise image
        if images:
            model_start = time.perf_counter()
            embeddings[len(rows) - len(images) : len(rows)] = embedder.embed_prepared(np.stack(images))
            model_seconds += time.perf_counter() - model_start
        done += len(decoded)
        report(what, done, len(paths), f"{done / (time.perf_counter() - start):,.0f} images/s")
    seconds = time.perf_counter() - start
    return EmbeddedFiles(embeddings[: len(rows)], np.array(rows, np.int64), bad, seconds, model_seconds)


def _decoded(paths: Sequence[Path], batch: int, height: int, width: int) -> Iterator[list[Pixels | DataError]]:
    """Batches of (height, width, 3) uint8; a bounded number is decoded ahead of the one asked for."""

    def read(path: Path) -> Pixels | DataError:
        try:
            return read_crop(path, height, width)
        except DataError as error:
            return error

    pending: deque[list[Future[Pixels | DataError]]] = deque()
    pool = ThreadPoolExecutor(threads(), thread_name_prefix="decode")
    try:
        for start in range(0, len(paths), batch):
            pending.append([pool.submit(read, path) for path in paths[start : start + batch]])
            if len(pending) > _BATCHES_AHEAD:
                yield [image.result() for image in pending.popleft()]
        while pending:
            yield [image.result() for image in pending.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)
