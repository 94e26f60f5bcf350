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
from pmm_edge.data.layouts import ANY_MARKET, list_images
from pmm_edge.errors import DataError
from pmm_edge.files import sha256
from pmm_edge.retrieval.metrics import JUNK_PID, check_labels

DISTRACTOR_PID = 0
"""Identity of gallery images that show nobody in the query set; they count as wrong answers."""


@dataclass(frozen=True)
class Split:
    """The images of one split, sorted by path: N files with (N,) identities and (N,) cameras."""

    paths: list[Path]
    pids: NDArray[np.int64]
    camids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, rows: Sequence[int] | NDArray[np.intp]) -> Split:
        """The images at these indices."""
        rows = np.asarray(rows, np.intp)
        return Split([self.paths[row] for row in rows], self.pids[rows], self.camids[rows])

    @property
    def identities(self) -> int:
        """Number of people, without junk and distractors."""
        return int((np.unique(self.pids) > DISTRACTOR_PID).sum())

    @property
    def cameras(self) -> int:
        return len(np.unique(self.camids))


@dataclass(frozen=True)
class ReidDataset:
    """Training images, and query and gallery images of other identities for evaluation."""

    name: str
    """The layout if the data set is a known one, otherwise the name of its folder."""
    root: Path
    train: Split
    query: Split
    gallery: Split
    layout: str = ANY_MARKET

    @property
    def splits(self) -> dict[str, Split]:
        return {"train": self.train, "query": self.query, "gallery": self.gallery}


def scan(root: Path, layout: str | None = None) -> ReidDataset:
    """Read a data set and require that it can be trained and evaluated on. No image is opened.

    `layout` is one of `pmm_edge.data.layouts.LAYOUTS`; it is recognized automatically if None. Raises DataError if a
    folder is missing or empty, a file name has no labels, or `problems` finds something.
    """
    dataset = read(root, layout)
    for problem in problems(dataset):
        raise problem
    return dataset


def read(root: Path, layout: str | None = None) -> ReidDataset:
    """Read a data set like `scan`, but accept splits that cannot be trained or evaluated on."""
    try:
        listing = list_images(root, layout)
    except OSError as error:
        raise DataError(f"cannot read {error.filename or root}: {error.strerror}", "Check its permissions") from error
    name = listing.root.name if listing.layout == ANY_MARKET else listing.layout
    train, query, gallery = (
        Split([r.path for r in records], *(np.array([r[column] for r in records], np.int64) for column in (1, 2)))
        for records in (listing.train, listing.query, listing.gallery)
    )
    return ReidDataset(name, listing.root, train, query, gallery, listing.layout)


def problems(dataset: ReidDataset) -> list[DataError]:
    """Return the reasons why a network cannot be trained or evaluated on a data set."""
    root, train = dataset.root, dataset.train
    found = []
    if train.identities < 2:
        problem = f"the training set of {root} has {train.identities} identities"
        found.append(DataError(problem, "Training needs at least two"))
    if len(np.unique(np.concatenate([dataset.query.camids, dataset.gallery.camids]))) < 2:
        problem = f"all query and gallery images of {root} come from one camera"
        found.append(DataError(problem, "Evaluation needs at least two cameras"))
    elif not len(queries_with_match(dataset)):
        problem = f"no query of {root} has a match in the gallery from another camera"
        found.append(DataError(problem, "Query and gallery must show the same identities"))
    return found


def queries_with_match(dataset: ReidDataset) -> NDArray[np.intp]:
    """Indices of the queries that count in an evaluation: another camera's gallery image shows the same identity."""
    query, gallery = dataset.query, dataset.gallery
    if (gallery.pids == JUNK_PID).all():
        return np.empty(0, np.intp)
    labels = check_labels(query.pids, gallery.pids, query.camids, gallery.camids, (len(query), len(gallery)))
    return np.flatnonzero([len(labels.matches(number)[0]) > 0 for number in range(len(query))])


def data_sha256(paths: Sequence[Path], root: Path, report: Report = silent) -> str:
    """The SHA-256 of the names, relative to `root`, and contents of images, in the given order."""
    digest = hashlib.sha256()
    for number, path in enumerate(paths):
        if number % 256 == 0:
            report("hashing the data", number, len(paths))
        try:
            line = f"{Path(os.path.relpath(path, root)).as_posix()}\0{sha256(path)}\n"
        except OSError as error:
            raise DataError(f"cannot hash {path} ({error})", "Check the data set with pmm data --decode") from error
        digest.update(line.encode("utf-8", "surrogateescape"))
    report("hashing the data", len(paths), len(paths))
    return digest.hexdigest()
