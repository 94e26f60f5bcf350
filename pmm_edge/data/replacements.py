"""What training does about an image that cannot be read: another one of the same person, a warning, and a limit.

Taking another one is the business of the thread that reads. Warning and counting is that of training, which asks now
and then what was found: of several processes each reads a part.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from pmm_edge.errors import DataError


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
