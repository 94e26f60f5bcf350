"""A reID data set on disk: three splits of image files with identities and cameras."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pmm_edge.errors import DataError

JUNK_PID = -1
"""Boxes that show nobody in particular; they count neither as right nor as wrong."""
DISTRACTOR_PID = 0
"""Boxes of nobody in the query set; they stay in the gallery as wrong answers."""

_MARKET_NAME = re.compile(r"(-1|\d+)_c(\d+)")
_MARKET_FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}


@dataclass(frozen=True)
class Split:
    """Images of one split, in the order of their names."""

    paths: list[Path]
    pids: NDArray[np.int64]
    camids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def identities(self) -> int:
        """People in the split; junk and distractors are none."""
        return int((np.unique(self.pids) > DISTRACTOR_PID).sum())

    @property
    def cameras(self) -> int:
        return len(np.unique(self.camids))


@dataclass(frozen=True)
class ReidDataset:
    """Training images, and the queries and gallery of other identities that a network is judged by."""

    name: str
    root: Path
    train: Split
    query: Split
    gallery: Split


def scan(root: Path) -> ReidDataset:
    """Read the folders and file names of a data set in Market-1501's layout; no image is opened.

    Raises:
        DataError: a folder is missing or empty, a name does not parse, or the splits cannot train or judge.
    """
    if not root.is_dir():
        raise DataError(f"{root} is no folder", "Name the folder that holds bounding_box_train/, or run pmm synth")
    missing = [folder for folder in _MARKET_FOLDERS.values() if not (root / folder).is_dir()]
    if missing:
        inner = [child for child in sorted(root.iterdir()) if (child / _MARKET_FOLDERS["train"]).is_dir()]
        raise DataError(
            f"{root} has no folder {', '.join(missing)}: it is not in the layout of Market-1501",
            f"Did you mean {inner[0]}?" if inner else f"It must hold {', '.join(_MARKET_FOLDERS.values())}",
        )
    splits = {split: _scan_folder(root / folder) for split, folder in _MARKET_FOLDERS.items()}
    return _checked(ReidDataset(root.name, root, **splits))


def _scan_folder(folder: Path) -> Split:
    # Market-1501 itself ships Thumbs.db files: what is no image is passed over.
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not paths:
        raise DataError(f"{folder} holds no images", "Fetch or unpack the data set again")
    labels = [_parse(path) for path in paths]
    pids, camids = np.array(labels, dtype=np.int64).T
    return Split(paths, pids, camids)


def _parse(path: Path) -> tuple[int, int]:
    match = _MARKET_NAME.match(path.name)
    if match is None:
        raise DataError(
            f"the name of {path} does not say who it shows and which camera took it",
            "Name files IDENTITY_cCAMERA..., such as 0002_c1s1_000451_03.jpg, or remove this one",
        )
    return int(match[1]), int(match[2])


def _checked(dataset: ReidDataset) -> ReidDataset:
    train, query, gallery = dataset.train, dataset.query, dataset.gallery
    if train.identities < 2:
        raise DataError(f"{train.paths[0].parent} shows {train.identities} identity", "Training needs two or more")
    if len(np.unique(np.concatenate([query.camids, gallery.camids]))) < 2:
        raise DataError(
            f"the query and gallery of {dataset.root} come from one camera",
            "Re-identification is judged across cameras: two or more are needed",
        )
    if not np.isin(query.pids, gallery.pids).any():
        raise DataError(
            f"no identity in {query.paths[0].parent} is in {gallery.paths[0].parent}",
            "Query and gallery must show the same people; put their images back together",
        )
    return dataset
