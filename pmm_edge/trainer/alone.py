"""One process trains in a run folder: a second one would write over what the first one learned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pmm_edge.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = "run.lock"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a run folder, which is made where it does not exist; a process that ends, however it ends, lets go of it.

    Where the system or the file system has no locks, nothing is held.

    Raises:
        OutputError: another process trains in the folder, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a")  # never removed: who had it open already would then hold another file
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}", "Choose another folder with --out") from error
    with file:
        if not _locked(file):
            raise OutputError(
                f"another process is training in {folder}", "Wait for its end or stop it, or choose another --out"
            )
        yield


def _locked(file: IO[str]) -> bool:
    """Lock a file until it is closed; False where somebody else holds it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True
