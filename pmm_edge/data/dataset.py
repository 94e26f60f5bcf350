"""A reID data set on disk: three splits of image files with identities and cameras."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pmm_edge.console import Report, silent
from pmm_edge.data.layouts import ANY_MARKET, Record, find
from pmm_edge.errors import DataError
from pmm_edge.files import sha256
from pmm_edge.retrieval.metrics import JUNK_PID, checked_labels

DISTRACTOR_PID = 0
"""Boxes of nobody in the query set; they stay in the gallery as wrong answers."""


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
    """That of the layout where the set is a known one, otherwise that of its folder."""
    root: Path
    train: Split
    query: Split
    gallery: Split
    layout: str = ANY_MARKET
    """One of `pmm_edge.data.layouts.LAYOUTS`."""

    @property
    def splits(self) -> dict[str, Split]:
        """The three splits by name."""
        return {"train": self.train, "query": self.query, "gallery": self.gallery}


def scan(root: Path, layout: str | None = None) -> ReidDataset:
    """Read a data set that can train and judge a network; no image is opened.

    Args:
        root: the data set's folder: Market-1501, DukeMTMC-reID, CUHK03-NP, MSMT17, or any in Market-1501's layout.
        layout: one of `pmm_edge.data.layouts.LAYOUTS`; recognised by itself where it is not given.

    Raises:
        DataError: a folder is missing or empty, a name does not parse, or the splits cannot train or judge.
    """
    dataset = read(root, layout)
    for problem in problems(dataset):
        raise problem
    return dataset


def read(root: Path, layout: str | None = None) -> ReidDataset:
    """Read a data set as `scan` does, whether or not its splits can train and judge.

    Raises:
        DataError: a folder is missing or empty, or a name does not parse.
    """
    try:
        found = find(root, layout)
    except OSError as error:
        raise DataError(f"cannot read {error.filename or root}: {error.strerror}", "Check its permissions") from error
    name = found.root.name if found.layout == ANY_MARKET else found.layout
    train, query, gallery = map(_split, found.files)
    return ReidDataset(name, found.root, train, query, gallery, found.layout)


def problems(dataset: ReidDataset) -> list[DataError]:
    """Why the splits cannot train a network or judge one; empty where they can."""
    train, query, gallery, root = dataset.train, dataset.query, dataset.gallery, dataset.root
    found = []
    if train.identities < 2:
        word = "identity" if train.identities == 1 else "identities"
        found.append(
            DataError(f"the training set of {root} shows {train.identities} {word}", "Training needs two or more")
        )
    if len(np.unique(np.concatenate([query.camids, gallery.camids]))) < 2:
        found.append(
            DataError(
                f"the query and gallery of {root} come from one camera",
                "Re-identification is judged across cameras: two or more are needed",
            )
        )
    elif not len(queries_with_match(dataset)):
        found.append(
            DataError(
                f"no query of {root} has a match in its gallery from another camera",
                "Query and gallery must show the same people; put their images back together",
            )
        )
    return found


def queries_with_match(dataset: ReidDataset) -> NDArray[np.intp]:
    """Indices of the queries that evaluation counts: their gallery shows the same person from another camera."""
    query, gallery = dataset.query, dataset.gallery
    if (gallery.pids == JUNK_PID).all():
        return np.empty(0, np.intp)
    labels = checked_labels(query.pids, gallery.pids, query.camids, gallery.camids, (len(query), len(gallery)))
    return np.flatnonzero([len(labels.matches_and_left_out(number)[0]) > 0 for number in range(len(query))])


def _split(records: Sequence[Record]) -> Split:
    pids = np.array([record.pid for record in records], dtype=np.int64)
    camids = np.array([record.camid for record in records], dtype=np.int64)
    return Split([record.path for record in records], pids, camids)


_REPORTED_EVERY = 256


def data_sha256(paths: Sequence[Path], root: Path, report: Report = silent) -> str:
    """The SHA-256 over the names and contents of images, in their order.

    Names are relative to `root`, so that a data set that was moved or copied keeps its hash.

    Raises:
        DataError: an image cannot be read.
    """
    digest = hashlib.sha256()
    for number, path in enumerate(paths):
        if number % _REPORTED_EVERY == 0:
            report("hashing the data", number, len(paths))
        try:
            line = f"{Path(os.path.relpath(path, root)).as_posix()}\0{sha256(path)}\n"
        except OSError as error:
            raise DataError(f"cannot hash {path} ({error})", "Check the data set with pmm data --verify") from error
        digest.update(line.encode("utf-8", "surrogateescape"))
    report("hashing the data", len(paths), len(paths))
    return digest.hexdigest()
