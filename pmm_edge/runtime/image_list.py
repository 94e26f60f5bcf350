"""What to embed: the images of a folder, of a text list or of a data set, in an order that does not change."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pmm_edge.data.dataset import read
from pmm_edge.data.layouts import cuhk03, market, msmt17
from pmm_edge.errors import DataError
from pmm_edge.images import IMAGE_SUFFIXES


@dataclass(frozen=True, eq=False)
class Labels:
    """What a data set says of each image."""

    pids: NDArray[np.int64]
    """(N,) identities; -1 is junk, 0 a distractor."""
    camids: NDArray[np.int64]
    """(N,) cameras."""
    split: NDArray[np.str_]
    """(N,) `query`, `gallery` or `train`."""

    def __getitem__(self, rows: NDArray[np.int64]) -> Labels:
        return Labels(self.pids[rows], self.camids[rows], self.split[rows])


@dataclass(frozen=True, eq=False)
class ImageList:
    """Image files to embed, one row each."""

    source: str
    """Where they come from, for people: `folder`, `list`, or a data set's layout."""
    paths: list[Path]
    names: list[str]
    """The paths as they are stored: relative to the folder or data set; of a list, its lines."""
    labels: Labels | None = None


def find_images(source: Path, layout: str | None = None) -> ImageList:
    """Find what to embed; no image is opened.

    Args:
        source: a data set's folder, any other folder (searched with what it holds, hidden files left out), or a text
            file with one path a line, relative to the file's own folder.
        layout: one of `pmm_edge.data.layouts.LAYOUTS`, where `source` is a data set that is not recognised.

    Raises:
        DataError: `source` does not exist, is no text, or names no images; a data set is not as it should be.
    """
    if source.is_dir():
        images = _of_dataset(source, layout) if layout or is_dataset(source) else _of_folder(source)
    elif layout:
        raise DataError(f"{source} is no folder, so it is in no layout", "Leave --layout out, or name a data set")
    else:
        images = _of_list(source)
    if not images.paths:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"{source} names no images", f"Name a folder with {kinds} files, or a list of their paths")
    return images


def is_dataset(root: Path) -> bool:
    """Whether a folder is in the layout of a data set that is known."""
    return any(kind.holds(root) for kind in (market, msmt17, cuhk03)) or bool(cuhk03.kinds_in(root))


def _of_dataset(root: Path, layout: str | None) -> ImageList:
    dataset = read(root, layout)
    splits = {name: dataset.splits[name] for name in ("query", "gallery", "train")}
    paths = [path for split in splits.values() for path in split.paths]
    labels = Labels(
        np.concatenate([split.pids for split in splits.values()]),
        np.concatenate([split.camids for split in splits.values()]),
        np.repeat(np.array(list(splits)), [len(split) for split in splits.values()]),
    )
    return ImageList(dataset.layout, paths, _names(paths, dataset.root), labels)


def _of_folder(folder: Path) -> ImageList:
    paths = []
    for parent, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(parent, name) for name in files if _is_image(name)]
    paths.sort()
    return ImageList("folder", paths, _names(paths, folder))


def _refuse(error: OSError) -> None:
    raise DataError(f"cannot read {error.filename}: {error.strerror}", "Check its permissions") from error


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122  of a million


def _of_list(path: Path) -> ImageList:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist", "Name a folder, a data set or a list of image files") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no text file with one path a line", "Name a folder or such a list") from error
    names = [line.strip() for line in lines if line.strip()]
    return ImageList("list", [path.parent / name for name in names], names)


def _names(paths: Sequence[Path], root: Path) -> list[str]:
    # A name that is no Unicode text is legal on disk and in no file format: its bytes are written as \xNN.
    return [os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "backslashreplace") for path in paths]
