"""Crops at network size, decoded once: what training and its evaluation read."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pmm_edge.errors import DataError
from pmm_edge.images import read_crop
from pmm_edge.machine import threads

CACHE_BYTES = 8 << 30
"""Market-1501's training set at 384×128 takes 1.9 GB."""


class Crops:
    """The images of a split at network size, decoded on first use and then kept while they fit.

    Pillow decodes and resizes without holding the interpreter's lock, so threads do what worker processes
    would, without copies between them.

    Args:
        paths: image files.
        height, width: network size in pixels.
        cache_bytes: images beyond this much memory are decoded each time they are asked for. Where the system does
            not give as much, half of what it gives is taken: a network has to fit, too.
        instead_of: names the image to take for one that cannot be read, or raises; None raises always.
        workers: threads that decode; one for each usable core by default.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        height: int,
        width: int,
        cache_bytes: int = CACHE_BYTES,
        instead_of: Callable[[int, DataError], int] | None = None,
        workers: int | None = None,
    ) -> None:
        self.paths = paths
        self.height, self.width = height, width
        wanted = min(len(paths), cache_bytes // (height * width * 3))
        kept = _given_by_the_system(wanted, height * width * 3)
        self.short_of_memory = kept < wanted
        self._kept = np.empty((kept, height, width, 3), dtype=np.uint8)
        self._decoded = np.zeros(kept, dtype=bool)
        self._instead_of = instead_of
        self.workers = workers or threads()
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def kept_bytes(self) -> int:
        """Memory that the images take once all that fit are decoded."""
        return self._kept.nbytes

    @property
    def all_bytes(self) -> int:
        """Memory that all images would take."""
        return len(self.paths) * self.height * self.width * 3

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


def _given_by_the_system(images: int, bytes_each: int) -> int:
    """`images` where there is memory for all of them, else half of a number that there is memory for."""
    left = images
    while left:
        try:
            np.empty(left * bytes_each, dtype=np.uint8)
            break
        except MemoryError:
            left //= 2
    return left if left == images else left // 2
