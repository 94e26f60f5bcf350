"""Crops at network size, decoded once: what training and its evaluation read."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock

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


class Replacements:
    """For each unreadable image the next readable one of its identity: the same in every run.

    Args:
        paths, pids: of the split's images.
        limit: unreadable images that are passed over.
        warn: told of each, once.
    """

    Found = list[tuple[int, str]]
    """Of unreadable images the index, and what is wrong."""

    def __init__(self, paths: list[Path], pids: NDArray[np.int64], limit: int, warn: Callable[[str], None]) -> None:
        self._paths, self._pids, self._limit, self._warn = paths, pids, limit, warn
        self._bad: set[int] = set()
        self._told: set[int] = set()
        self._found: Replacements.Found = []
        self._lock = Lock()

    def __call__(self, index: int, error: DataError) -> int:
        """The image to take instead of `index`.

        Raises:
            DataError: no other image of the identity is left.
        """
        with self._lock:
            if index not in self._bad:
                self._bad.add(index)
                self._found.append((index, error.problem))
            same = np.flatnonzero(self._pids == self._pids[index])
            following = np.roll(same, -int(np.searchsorted(same, index)))
            left = [int(other) for other in following if int(other) not in self._bad]
            if not left:
                raise DataError(f"no image of identity {self._pids[index]} can be read", error.remedy) from error
            return left[0]

    def found(self) -> Found:
        """The unreadable images that this process has met since it was last asked."""
        with self._lock:
            found, self._found = self._found, []
        return found

    def tell(self, found: Found) -> None:
        """Warn of what all processes have found; what two of them met counts once.

        Raises:
            DataError: the limit is passed.
        """
        for index, problem in found:
            if index in self._told:
                continue
            self._told.add(index)
            if len(self._told) > self._limit:
                raise DataError(
                    f"{len(self._told)} training images cannot be read, the last {self._paths[index]}",
                    "Check the set with pmm data --verify, or allow more with --max-bad-images",
                )
            self._warn(f"{problem}; another image of the same identity is taken")


def identity_batches(
    pids: NDArray[np.int64], identities: int, images: int, generator: np.random.Generator
) -> list[NDArray[np.int64]]:
    """One epoch: every identity once, with `images` of its images, `identities` of them in a batch.

    An identity with fewer images gives some of them more than once. The last batch holds the identities that are
    left; it is dropped where that is a single one, which has no negative.

    Args:
        pids: (N,) identity of each training image.
        generator: the same state gives the same epoch.

    Returns:
        Index vectors into `pids`, an identity's images side by side.
    """
    order = np.argsort(pids, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(pids[order])) + 1)
    drawn = [
        members[identity][_draw(len(members[identity]), images, generator)]
        for identity in generator.permutation(len(members))
    ]
    batches = [np.concatenate(drawn[start : start + identities]) for start in range(0, len(drawn), identities)]
    if len(drawn) % identities == 1:
        batches.pop()
    return batches


def _draw(available: int, wanted: int, generator: np.random.Generator) -> NDArray[np.int64]:
    if available >= wanted:
        return generator.permutation(available)[:wanted]
    return np.concatenate([generator.permutation(available), generator.integers(available, size=wanted - available)])
