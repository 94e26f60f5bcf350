"""Count the images of a data set and find errors in its labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pmm_edge.console import Report, silent
from pmm_edge.data.dataset import DISTRACTOR_PID, ReidDataset, Split, problems, queries_with_match
from pmm_edge.data.layouts import KNOWN_SETS, KnownSet, SplitSize
from pmm_edge.errors import DataError
from pmm_edge.images import read_crop
from pmm_edge.machine import threads
from pmm_edge.retrieval.metrics import JUNK_PID

_CHUNK = 256


@dataclass(frozen=True)
class SplitCounts:
    """What a split contains."""

    identities: int  # without junk and distractors
    cameras: int
    images: int  # as papers count them: with distractors, without junk
    distractors: int
    junk: int


class DatasetWarningKind(str, Enum):
    """What is wrong with a data set."""

    UNUSABLE = "unusable"  # training or evaluation is impossible
    UNEXPECTED_SIZE = "unexpected-size"  # a split of a known data set does not have the published size
    UNTRAINED_IMAGES = "untrained-images"  # training images have a label that means "nobody"
    TRAIN_TEST_OVERLAP = "train-test-overlap"  # identities are in the training set and in query or gallery
    UNMATCHED_QUERIES = "unmatched-queries"  # queries have no right answer in the gallery
    ONE_CAMERA = "one-camera"  # only one camera has seen some identities


@dataclass(frozen=True)
class DatasetWarning:
    """A problem: `kind`, `split`, `pids` and `images` are for programs, `text` is for people."""

    kind: DatasetWarningKind
    text: str
    split: str = ""  # train, query, gallery or test (query and gallery together); empty if several are concerned
    pids: list[int] = field(default_factory=list)  # identities concerned, ascending
    images: int = 0  # number of images concerned, where it is known


@dataclass(frozen=True)
class Analysis:
    """Counts of a data set by split, the published sizes if it is a known one, and what is wrong with it."""

    splits: dict[str, SplitCounts]
    known: KnownSet | None
    warnings: list[DatasetWarning]


@dataclass(frozen=True)
class BadImage:
    """An image file that cannot be decoded."""

    path: Path
    reason: str


def analyze(dataset: ReidDataset) -> Analysis:
    """Count the images of a data set and check its labels. No image is opened."""
    known = KNOWN_SETS.get(dataset.layout)
    splits = {name: _count(split) for name, split in dataset.splits.items()}
    warnings = [
        *(DatasetWarning(DatasetWarningKind.UNUSABLE, str(problem)) for problem in problems(dataset)),
        *(_unexpected_sizes(splits, known) if known else ()),
        *untrained_images(dataset.train),
        *_mislabeled_people(dataset, known.one_camera if known else 0),
    ]
    return Analysis(splits, known, warnings)


def untrained_images(train: Split) -> list[DatasetWarning]:
    """Find training images that training skips because their label means "junk" or "distractor".

    A data set that numbers identities from 0 would silently lose one of them.
    """
    found = []
    for pid in (DISTRACTOR_PID, JUNK_PID):
        if images := int((train.pids == pid).sum()):
            text = (
                f"train: training skips {images:,} images with identity {pid}, which means that they show nobody; if"
                " they show a person, rename all images of that identity to an unused number above 0"
            )
            found.append(DatasetWarning(DatasetWarningKind.UNTRAINED_IMAGES, text, "train", [pid], images))
    return found


def unreadable(paths: Sequence[Path], *, report: Report = silent) -> list[BadImage]:
    """Decode image files as training does, and return those that fail."""
    bad: list[BadImage] = []
    with ThreadPoolExecutor(threads(), thread_name_prefix="verify") as pool:  # Pillow decodes without the GIL
        # Chunks keep Ctrl-C fast, and avoid a queue of 126,441 futures for MSMT17.
        for start in range(0, len(paths), _CHUNK):
            chunk = paths[start : start + _CHUNK]
            bad += [image for image in pool.map(_try_image, chunk) if image]
            report("images", start + len(chunk), len(paths), f"{len(bad)} unreadable")
    return bad


def _try_image(path: Path) -> BadImage | None:
    try:
        read_crop(path, 1, 1)
    except DataError as error:
        return BadImage(path, str(error.__cause__ or error.problem))
    return None


def _count(split: Split) -> SplitCounts:
    junk, distractors = (int((split.pids == pid).sum()) for pid in (JUNK_PID, DISTRACTOR_PID))
    return SplitCounts(split.identities, split.cameras, len(split) - junk, distractors, junk)


def _unexpected_sizes(splits: dict[str, SplitCounts], known: KnownSet) -> Iterator[DatasetWarning]:
    for name, expected in (("train", known.train), ("query", known.query), ("gallery", known.gallery)):
        found = SplitSize(splits[name].identities, splits[name].images)
        if found != expected:
            text = (
                f"{name} has {found.identities:,} identities in {found.images:,} images, {known.title} has"
                f" {expected.identities:,} in {expected.images:,}"
            )
            yield DatasetWarning(DatasetWarningKind.UNEXPECTED_SIZE, text, name, images=found.images)


def _mislabeled_people(dataset: ReidDataset, one_camera_in_test: int) -> Iterator[DatasetWarning]:
    """Identities in training and test, queries without a match, and identities that only one camera has seen."""
    (train, train_cameras), (test, test_cameras) = _people(dataset.train), _people(dataset.query, dataset.gallery)
    if pids := np.intersect1d(train, test).tolist():
        text = f"identities are in the training set and in query or gallery, which inflates results: {_listed(pids)}"
        yield DatasetWarning(DatasetWarningKind.TRAIN_TEST_OVERLAP, text, pids=pids)
    unmatched = np.delete(dataset.query.pids, queries_with_match(dataset))
    if pids := np.unique(unmatched).tolist():
        text = (
            f"{len(unmatched):,} of {len(dataset.query):,} queries have no gallery image from another camera and do not"
            f" count in an evaluation: {_listed(pids)}"
        )
        yield DatasetWarning(DatasetWarningKind.UNMATCHED_QUERIES, text, "query", pids, len(unmatched))
    for split, people, cameras, expected in (
        ("train", train, train_cameras, 0),
        ("test", test, test_cameras, one_camera_in_test),  # 408 in the gallery of DukeMTMC-reID, by design
    ):
        pids = people[cameras == 1].tolist()
        if len(pids) not in (0, expected):
            text = f"{split}: only one camera has seen some of the {len(people):,} identities: {_listed(pids)}"
            yield DatasetWarning(DatasetWarningKind.ONE_CAMERA, text, split, pids)


def _people(*splits: Split) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
    """Identities, ascending, without junk and distractors, and the number of cameras that have seen each."""
    labels = np.concatenate([np.stack([split.pids, split.camids], axis=1) for split in splits])
    seen = np.unique(labels[labels[:, 0] > DISTRACTOR_PID], axis=0)
    return np.unique(seen[:, 0], return_counts=True)


def _listed(pids: Sequence[int]) -> str:
    """The number of identities and the first few of them."""
    word = "identity" if len(pids) == 1 else "identities"
    return f"{len(pids):,} {word} ({', '.join(map(str, pids[:5]))}{', …' if len(pids) > 5 else ''})"
