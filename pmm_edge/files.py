"""Where files go, and how they get there whole: written beside, then renamed."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from pmm_edge.errors import OutputError


def home_folder() -> Path | None:
    """The user's home folder; None for a user without one, as containers run with a foreign number."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def cache_folder() -> Path:
    """The folder for what can be made again: `PMM_HOME`, else `pmm-edge` in the user's cache folder.

    Raises:
        OutputError: the folder is in the user's home folder, and there is none.
    """
    chosen = os.environ.get("PMM_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/pmm-edge"
    try:
        return Path(chosen).expanduser()
    except RuntimeError as error:
        raise OutputError(
            f"{chosen} is nowhere: this user has no home folder", "Set PMM_HOME to the whole path of a folder"
        ) from error


def with_tilde(text: str) -> str:
    """Text to be shown to others: the user's home folder, which names them, is `~` wherever a path begins with it."""
    home = str(home_folder() or "")
    return re.sub(rf"(?<![\w./~-]){re.escape(home)}(?![\w-]|\.\w)", "~", text) if len(home) > 1 else text


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _cannot_write(path: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    return OutputError(f"cannot write {path}: {reason}", "Choose a folder that is writable and has space left")


def check_output(path: Path, suffixes: Sequence[str]) -> None:
    """Refuse, before work of many minutes, a file that could not be written after it.

    Raises:
        OutputError: the suffix is none of `suffixes`, or the folder cannot be made or written.
    """
    if path.suffix.lower() not in suffixes:
        raise OutputError(f"cannot write {path}: its name must end in {' or '.join(suffixes)}", "Name such a file")
    check_place(path)


def check_place(path: Path) -> None:
    """Make a file beside `path`, and the folders that it takes, and remove them again.

    Raises:
        OutputError: that cannot be done, or `path` is a folder.
    """
    made: list[Path] = []
    try:
        made = list(takewhile(lambda parent: not parent.exists(), path.absolute().parents))
        there = next(parent for parent in path.absolute().parents if parent.exists())
        if not there.is_dir() or path.is_dir():
            blocker, kind = (path, "folder") if path.is_dir() else (there, "file")
            raise OutputError(f"cannot write {path}: {blocker} is a {kind}", "Choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}", "Choose a folder that is writable") from error
    finally:
        for folder in made:
            with suppress(OSError):  # it was not made, or somebody uses it by now
                folder.rmdir()


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block ends without an error.

    Every OSError of the block counts as one of `path`: only what writes and checks it belongs there.

    Killed at any moment, the final name holds either the old file or the new one, never a part of it.

    Raises:
        OutputError: the folder cannot be made or written, or the disk is full.
    """
    temporary = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):  # gone after the rename; never there where the folder could not be made
            temporary.unlink()


def remove_unfinished(folder: Path, names: Sequence[str]) -> None:
    """Remove the temporary files that a kill in `written_whole` left, for whoever alone writes these names.

    Args:
        names: of the files that were meant, `*` standing for anything; temporary files of others are kept.
    """
    for path in folder.glob(".*.tmp"):
        meant = re.fullmatch(r"\.(.+)\.[0-9a-f]{8}\.tmp", path.name)
        if meant and path.is_file() and any(fnmatchcase(meant[1], name) for name in names):
            path.unlink(missing_ok=True)


def check_new_folder(path: Path, remedy: str = "Name a folder that does not exist yet") -> None:
    """Refuse, before work of many minutes, a folder that could not be written whole after it.

    Raises:
        OutputError: `path` exists and is not empty, or a file stands where a folder above it should be.
    """
    blocker = next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None)
    if blocker:
        raise OutputError(f"cannot write {path}: {blocker} is a file", "Choose another name")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(f"{path} exists and is not an empty folder", remedy)


@contextmanager
def folder_written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; rename it to `path` when the block ends without an error.

    Raises:
        OutputError: `path` exists and is not empty, or cannot be written.
    """
    check_new_folder(path)
    temporary = _beside(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            path.rmdir()
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a folder that is gone after the block, for what only this program reads.

    Every OSError of the block counts as one of this folder: only what writes and reads there belongs in it.

    Raises:
        OutputError: it cannot be made or written, or the disk is full.
    """
    try:
        with TemporaryDirectory() as folder:
            yield Path(folder)
    except OSError as error:
        place = f" in {tempfile.tempdir}" if tempfile.tempdir else ""  # nothing where no folder can be had
        raise OutputError(
            f"cannot write temporary files{place}: {error.strerror or error}",
            "Set TMPDIR to a folder that is writable and has space left",
        ) from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
