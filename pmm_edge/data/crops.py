"""Crops at network size, decoded once: what training and its evaluation read."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from os import cpu_count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pmm_edge.errors import DataError
from pmm_edge.images import read_crop

CACHE_BYTES = 8 << 30
"""Market-1501's training set at 384×128 takes 1.9 GB."""


class Crops:
    """The images of a split at network size, decoded on first use and then kept while they fit.

    Pillow decodes and resizes without holding the interpreter's lock, so threads do what worker processes
    would, without copies between them.

    Args:
        paths: image files.
        height, width: network size in pixels.
        cache_bytes: images beyond this much memory are decoded each time they are asked for.
        instead_of: names the image to take for one that cannot be read, or raises; None raises always.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        height: int,
        width: int,
        cache_bytes: int = CACHE_BYTES,
        instead_of: Callable[[int, DataError], int] | None = None,
    ) -> None:
        self.paths = paths
        self.height, self.width = height, width
        kept = min(len(paths), cache_bytes // (height * width * 3))
        self._kept = np.empty((kept, height, width, 3), dtype=np.uint8)
        self._decoded = np.zeros(kept, dtype=bool)
        self._instead_of = instead_of
        self._pool = ThreadPoolExecutor(max_workers=cpu_count() or 1, thread_name_prefix="decode")

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def kept_bytes(self) -> int:
        """Memory that the images take once all that fit are decoded."""
        return self._kept.nbytes

    def batch(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(N,) indices -> (N, height, width, 3) uint8 RGB.

        Raises:
            DataError: an image cannot be read.
        """
        if indices.max(initial=-1) < len(self._kept) and self._decoded[indices].all():
            return self._kept[indices]
        return np.stack(list(self._pool.map(self._crop, indices.tolist())))

    def prefetched(self, batches: Sequence[NDArray[np.int64]], ahead: int = 2) -> Generator[NDArray[np.uint8]]:
        """Yield `batch(indices)` for each of `batches`, with the next ones decoded in the background."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as assembler:
            waiting: list[Future[NDArray[np.uint8]]] = []
            try:
                for indices in batches:
                    waiting.append(assembler.submit(self.batch, indices))
                    if len(waiting) > ahead:
                        yield waiting.pop(0).result()
                while waiting:
                    yield waiting.pop(0).result()
            finally:
                for future in waiting:
                    future.cancel()

    def _crop(self, index: int) -> NDArray[np.uint8]:
        if index < len(self._kept) and self._decoded[index]:
            return self._kept[index]
        try:
            crop = read_crop(self.paths[index], self.height, self.width)
        except DataError as error:
            if self._instead_of is None:
                raise
            return self._crop(self._instead_of(index, error))
        if index < len(self._kept):
            self._kept[index] = crop
            self._decoded[index] = True
        return crop
