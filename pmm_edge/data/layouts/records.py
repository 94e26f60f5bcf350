"""What a layout yields, whatever it looks like on disk: the image files of each split, and who they show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pmm_edge.errors import DataError

ANY_MARKET = "market layout"
"""A folder in Market-1501's layout that is no set that is known by name."""

_TEXT_SHOWN = 80


class Record(NamedTuple):
    """An image file, the identity it shows and the camera that took it."""

    path: Path
    pid: int
    camid: int


class Files(NamedTuple):
    """The records of the three splits, each in the order of its paths."""

    train: list[Record]
    query: list[Record]
    gallery: list[Record]


def shown(text: str) -> str:
    """A stranger's text for a message: quoted, control characters escaped, cut to a bearable length."""
    return repr(text if len(text) <= _TEXT_SHOWN else text[:_TEXT_SHOWN] + "…")


def read_list(path: Path) -> str:
    """Read a list file.

    Raises:
        DataError: it is not there, or no UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist", "Fetch the data set's list files and put them there") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text file", "Fetch it again") from error


def require_files(folder: Path, names: Sequence[str], listed_in: Path) -> None:
    """Check that a list's files are there, with one look into each folder instead of one at each file.

    Args:
        folder: what the names are relative to.
        names: `FILE` or `FOLDER/FILE`, with forward slashes.
        listed_in: the list, for the message.

    Raises:
        DataError: some are not there.
    """
    present: dict[str, set[str]] = {}
    missing = []
    for name in names:
        inner, _, file = name.rpartition("/")
        if inner not in present:
            present[inner] = _names_in(folder / inner)
        if file not in present[inner]:
            missing.append(name)
    if missing:
        raise DataError(
            f"{len(missing):,} of {len(names):,} images that {listed_in} lists are not there, such as"
            f" {folder / missing[0]}",
            "Unpack the data set again",
        )


def _names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()
