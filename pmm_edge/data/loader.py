"""Load training batches: decoded crops with a cache, replacements for unreadable images, the P x K sampler."""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from pmm_edge.errors import DataError, PmmError
from pmm_edge.images import read_crop
from pmm_edge.machine import threads

CACHE_BYTES = 8 << 30
"""The training set of Market-1501 at 384x128 takes 1.9 GB."""
Unreadable = tuple[int, str]
"""The index of an unreadable image and what is wrong with it."""


class Crops:
    """The images of a split at network size, decoded on first use and then cached.

    Threads do the work of data loader processes without copies between processes: Pillow decodes and resizes
    without the GIL.

    Args:
        paths: image files.
        height, width: network size in pixels.
        cache_bytes: size of the cache. Images that do not fit are decoded again each time.
        instead_of: called with the index of an unreadable image and the error, returns the index of the image to use
            instead; None raises the error.
        workers: number of decoding threads; one for each usable core by default.
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
        self.paths, self.height, self.width = paths, height, width
        image_bytes = height * width * 3
        cached = min(len(paths), max(0, cache_bytes) // image_bytes)
        self.cached_bytes, self.all_bytes = cached * image_bytes, len(paths) * image_bytes  # size when full, and needed
        try:
            self._cache = np.empty((cached, height, width, 3), dtype=np.uint8)
        except MemoryError as error:
            size = f"{self.cached_bytes / 2**30:.1f} GiB"
            raise PmmError(f"not enough memory to cache {size} of decoded images", "Lower --cache-gib") from error
        self._decoded = np.zeros(cached, dtype=bool)
        self._instead_of = instead_of
        self.workers = workers or threads()
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the images at `indices`, (N, height, width, 3) uint8 RGB; raise DataError if one cannot be read."""
        if indices.max(initial=-1) < len(self._cache) and self._decoded[indices].all():
            return self._cache[indices]
        return np.stack(list(self._pool.map(self._crop, indices.tolist())))

    def prefetched(self, batches: Sequence[NDArray[np.int64]], ahead: int = 2) -> Generator[NDArray[np.uint8]]:
        """Yield `batch(indices)` for each of `batches`, decoding the next ones in the background."""
        waiting: list[Future[NDArray[np.uint8]]] = []
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as assembler:
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
        if index < len(self._cache) and self._decoded[index]:
            return self._cache[index]
        try:
            crop = read_crop(self.paths[index], self.height, self.width)
        except DataError as error:
            if self._instead_of is None:
                raise
            return self._crop(self._instead_of(index, error))
        if index < len(self._cache):
            self._cache[index] = crop
            self._decoded[index] = True
        return crop


class Replacements:
    """Replace each unreadable training image by the next readable one of its identity, the same in every run.

    `pids` are the (N,) identities of the images at `paths`, `limit` is the maximum number of unreadable images.
    """

    def __init__(self, paths: Sequence[Path], pids: NDArray[np.int64], limit: int) -> None:
        self._paths, self._pids, self._limit = paths, pids, limit
        self._bad: dict[int, str] = {}  # what this process has met
        self._taken = 0
        self._known: set[int] = set()  # of all processes
        self._lock = Lock()

    def __call__(self, index: int, error: DataError) -> int:
        """Return the index of the image to use instead of `index`."""
        with self._lock:
            self._bad.setdefault(index, error.problem)
            same = np.flatnonzero(self._pids == self._pids[index])
            following = np.roll(same, -int(np.searchsorted(same, index))).tolist()
            for replacement in following:
                if replacement not in self._bad:
                    return int(replacement)
        raise DataError(f"no image of identity {self._pids[index]} can be read", error.remedy) from error

    def take_new(self) -> list[Unreadable]:
        """Return the unreadable images that this process has met since the last call."""
        with self._lock:
            new = list(self._bad.items())[self._taken :]
            self._taken = len(self._bad)
        return new

    def register(self, unreadable: Sequence[Unreadable]) -> list[str]:
        """Count unreadable images of all processes; return a message for each that was not counted before."""
        messages = []
        for index, problem in unreadable:
            if index in self._known:
                continue
            self._known.add(index)
            if len(self._known) > self._limit:
                raise DataError(
                    f"{len(self._known)} training images cannot be read, the last of them {self._paths[index]}",
                    "Check the data set with pmm data --decode, or raise --max-bad-images",
                )
            messages.append(f"{problem}; training uses another image of the same identity")
        return messages


def identity_batches(
    pids: NDArray[np.int64], identities: int, images: int, generator: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Sample one epoch of P x K batches: every identity once, with `images` (K) of its images.

    An identity with fewer images repeats some of them. The last batch contains the identities that are left; it is
    dropped if there is only one, which would have no negative. The same state of `generator` gives the same epoch.

    Args:
        pids: (N,) identity of each training image.
        identities: identities in a batch (P).

    Returns:
        Index vectors into `pids`; the images of an identity are adjacent.
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
