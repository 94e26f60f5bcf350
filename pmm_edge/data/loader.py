"""Load training batches: decoded crops with a cache, replacements for unreadable images, the P x K sampler."""

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pmm_edge.errors import DataError
from pmm_edge.images import IN_FIGURES, BadImage, try_crop
from pmm_edge.machine import threads

T = TypeVar("T")
CACHE_BYTES = 8 << 30  # the training set of Market-1501 at 384x128 takes 1.9 GB


class Crops:
    """The images of a split at network size, decoded on first use and then cached.

    Threads suffice, without copies between processes: Pillow decodes and resizes without the GIL.
    `height` and `width` are in pixels. Images that do not fit into `cache_bytes` are decoded again each time.
    `workers` is the number of decoding threads, by default one for each usable core. With the (N,) identities `pids`,
    for training, an unreadable image is replaced by the next readable one of its identity, the same in every run.
    Without them, for evaluation, it is an error.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        height: int,
        width: int,
        cache_bytes: int = CACHE_BYTES,
        workers: int | None = None,
        pids: NDArray[np.int64] | None = None,
    ) -> None:
        self.paths, self.height, self.width, self.pids = paths, height, width, pids
        image_bytes = height * width * 3
        cached = min(len(paths), max(0, cache_bytes) // image_bytes)
        self.cached_bytes, self.all_bytes = cached * image_bytes, len(paths) * image_bytes  # size when full, and needed
        self._cache = np.empty((cached, height, width, 3), dtype=np.uint8)
        self._decoded = np.zeros(cached, dtype=bool)
        self._unreadable: dict[int, str] = {}  # index and problem of those that this process has met
        self._taken = 0
        self._counted: set[int] = set()  # of all processes
        self.workers = workers or threads()
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the images at `indices`, (N, height, width, 3) uint8 RGB; raise DataError if one cannot be read."""
        if indices.max(initial=-1) < len(self._cache) and self._decoded[indices].all():
            return self._cache[indices]
        return np.stack(list(self._pool.map(self._crop, indices.tolist())))

    def prefetched(self, batches: Sequence[NDArray[np.int64]], most: int = 2) -> Generator[NDArray[np.uint8]]:
        """Yield `batch(indices)` for each of `batches`, decoding at most `most` in advance; see `ahead`."""
        return ahead(map(self.batch, batches), most)

    def _crop(self, index: int) -> NDArray[np.uint8]:
        if index < len(self._cache) and self._decoded[index]:
            return self._cache[index]
        crop = try_crop(self.paths[index], self.height, self.width)
        if isinstance(crop, BadImage):
            if self.pids is None:
                raise crop.error(IN_FIGURES)
            self._unreadable[index] = str(crop)
            same = np.flatnonzero(self.pids == self.pids[index])
            for other in np.roll(same, -int(np.searchsorted(same, index))).tolist():
                if other not in self._unreadable:
                    return self._crop(other)
            raise DataError(f"no image of identity {self.pids[index]} can be read: {crop}", "Replace its files")
        if index < len(self._cache):
            self._cache[index] = crop
            self._decoded[index] = True
        return crop

    def take_unreadable(self) -> list[tuple[int, str]]:
        """Return the index and the problem of each unreadable image that this process has met since the last call."""
        new = list(self._unreadable.items())[self._taken :]
        self._taken += len(new)
        return new

    def count_unreadable(self, unreadable: Sequence[tuple[int, str]], limit: int) -> list[str]:
        """Count those of all processes, `limit` at most; return a message for each that was not counted before."""
        messages = []
        for index, problem in unreadable:
            if index not in self._counted:
                self._counted.add(index)
                messages.append(f"{problem}; training uses another image of the same identity")
            if len(self._counted) > limit:
                raise DataError(
                    f"{len(self._counted)} training images cannot be read, the last of them {self.paths[index]}",
                    "Check the data set with pmm data --decode, or raise --max-bad-images",
                )
        return messages


def ahead(items: Iterable[T], most: int) -> Generator[T]:
    """Yield items that another thread computes, at most `most` in advance; close the generator to end it early."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        pending = deque(thread.submit(next, iterator, end) for _ in range(most))
        try:
            while (item := pending.popleft().result()) is not end:
                pending.append(thread.submit(next, iterator, end))
                yield item  # type: ignore[misc]  # not the end
        finally:
            for future in pending:
                future.cancel()
            if isinstance(iterator, Generator):
                thread.submit(iterator.close).result()


def identity_batches(
    pids: NDArray[np.int64], identities: int, images: int, generator: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Sample one epoch of batches of `identities` (P) x `images` (K): index vectors into the (N,) `pids`.

    Every identity is drawn once; one with fewer images repeats some of them. The images of an identity are adjacent.
    The last batch contains the identities that are left; it is dropped if there is only one, which would have no
    negative. The same state of `generator` gives the same epoch.
    """
    order = np.argsort(pids, kind="stable")
    people = np.split(order, np.flatnonzero(np.diff(pids[order])) + 1)
    drawn = []
    for person in generator.permutation(len(people)):
        members = people[person]
        chosen = generator.permutation(len(members))[:images]
        if len(members) < images:
            chosen = np.concatenate([chosen, generator.integers(len(members), size=images - len(members))])
        drawn.append(members[chosen])
    batches = [np.concatenate(drawn[start : start + identities]) for start in range(0, len(drawn), identities)]
    return batches[:-1] if len(drawn) % identities == 1 else batches
