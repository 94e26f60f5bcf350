"""Embed image files: they are decoded on threads while the network works on the ones before them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pmm_edge.errors import PmmError
from pmm_edge.images import read_crop
from pmm_edge.progress import Report, silent
from pmm_edge.runtime.crops import Pixels
from pmm_edge.runtime.embedder import Embedder, Embeddings

_BATCHES_AHEAD = 2


def embed_files(embedder: Embedder, paths: Sequence[Path], batch: int = 64, report: Report = silent) -> Embeddings:
    """Embed image files in their order.

    Args:
        batch: images that go through the network at once.
        report: told after each batch how many images are done.

    Returns:
        (N, D) float32.

    Raises:
        DataError: an image is missing, truncated or no image.
        PmmError: `batch` is less than 1.
    """
    if batch < 1:
        raise PmmError(f"a batch of {batch} images cannot be embedded", "Choose 1 or more")
    embeddings = np.empty((len(paths), embedder.spec.embedding_size), np.float32)
    what, done = f"embedding with {embedder.path.name}", 0
    report(what, done, len(paths))
    for images in _decoded(paths, batch, embedder.spec.input.height, embedder.spec.input.width):
        embeddings[done : done + len(images)] = embedder.embed_prepared(images)
        done += len(images)
        report(what, done, len(paths))
    return embeddings


def _decoded(paths: Sequence[Path], batch: int, height: int, width: int) -> Iterator[Pixels]:
    """Batches of (N, height, width, 3) uint8; a bounded number is decoded ahead of the one asked for."""
    pending: deque[list[Future[Pixels]]] = deque()
    pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")
    try:
        for start in range(0, len(paths), batch):
            pending.append([pool.submit(read_crop, path, height, width) for path in paths[start : start + batch]])
            if len(pending) > _BATCHES_AHEAD:
                yield np.stack([image.result() for image in pending.popleft()])
        while pending:
            yield np.stack([image.result() for image in pending.popleft()])
    finally:
        pool.shutdown(cancel_futures=True)
