"""Count the images of a data set and find errors in its labels."""

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import numpy as np

from pmm_edge.console import Report, silent
from pmm_edge.data.dataset import KNOWN_SETS, ReidDataset, SplitSize, describe_ignored, problems, queries_with_match
from pmm_edge.data.people import CameraRule, SplitRule
from pmm_edge.errors import PmmWarning
from pmm_edge.images import BadImage, try_crop
from pmm_edge.machine import threads
from pmm_edge.retrieval.metrics import DISTRACTOR_PID, JUNK_PID


@dataclass(frozen=True)
class SplitCounts(SplitSize):
    """What a split contains."""

    cameras: int
    distractors: int
    junk: int


class DatasetWarningKind(str, Enum):
    """What is wrong with a data set."""

    UNUSABLE = "unusable"  # training or evaluation is impossible
    UNEXPECTED_SIZE = "unexpected-size"  # a split of a known data set does not have the published size
    UNTRAINED_IMAGES = "untrained-images"  # training images have a label that means "nobody"
    UNCOUNTED_QUERIES = "uncounted-queries"  # so have queries
    TRAIN_TEST_OVERLAP = "train-test-overlap"  # identities are in the training set and in query or gallery
    UNMATCHED_QUERIES = "unmatched-queries"  # queries have no right answer in the gallery
    NO_CAMERAS = "no-cameras"  # a folder per person without cameras
    CHOSEN_QUERIES = "chosen-queries"  # the data set does not say which images are for training, or queries
    IGNORED_FILES = "ignored-files"  # images in other formats, pipes and other special files


@dataclass(frozen=True)
class DatasetWarning:
    """A problem: `text` is for people, the other fields for programs."""

    kind: DatasetWarningKind
    text: str
    split: str = ""  # train, query or gallery; empty if several are concerned
    pids: list[int] = field(default_factory=list)  # identities concerned, ascending
    images: int = 0  # number of images concerned, where it is known


@dataclass(frozen=True)
class Analysis:
    """Counts of a data set by split, the published sizes if it is a known one, and what is wrong with it."""

    splits: dict[str, SplitCounts]
    known: dict[str, SplitSize] | None
    warnings: list[DatasetWarning]


def analyze(dataset: ReidDataset) -> Analysis:
    """Count the images of a data set and check its labels. No image is opened."""
    found = [DatasetWarning(DatasetWarningKind.UNUSABLE, str(problem)) for problem in problems(dataset)]
    known, counts = KNOWN_SETS.get(dataset.layout), {}
    for name, split in dataset.splits.items():
        junk, distractors = (int((split.pids == pid).sum()) for pid in (JUNK_PID, DISTRACTOR_PID))
        size = split.size
        counts[name] = SplitCounts(size.identities, size.images, len(np.unique(split.camids)), distractors, junk)
        if known and size != (expected := known[name]):
            published = f"{expected.images:,} of {expected.identities:,}"
            text = f"{name} has {size.images:,} images of {size.identities:,} identities, not the published {published}"
            found.append(DatasetWarning(DatasetWarningKind.UNEXPECTED_SIZE, text, name, images=size.images))
    for pid in (DISTRACTOR_PID, JUNK_PID):  # a data set that numbers identities from 0 would silently lose one
        for name, kind, use in (
            ("train", DatasetWarningKind.UNTRAINED_IMAGES, "training"),
            ("query", DatasetWarningKind.UNCOUNTED_QUERIES, "evaluation"),
        ):
            if images := int((dataset.splits[name].pids == pid).sum()):
                text = f"{name}: identity {pid} means nobody, so {use} skips its {images:,} images; renumber it if not"
                found.append(DatasetWarning(kind, text, name, [pid], images))
    train, query, gallery = (split.pids[split.pids > DISTRACTOR_PID] for split in dataset.splits.values())
    if pids := np.intersect1d(train, [*query, *gallery]).tolist():
        text = f"identities in the training set and in query or gallery, which inflates results: {_listed(pids)}"
        found.append(DatasetWarning(DatasetWarningKind.TRAIN_TEST_OVERLAP, text, pids=pids))
    unmatched = np.delete(dataset.query.pids, queries_with_match(dataset))
    unmatched = unmatched[unmatched > DISTRACTOR_PID]
    if pids := np.unique(unmatched).tolist():
        share = f"{len(unmatched):,} of {len(dataset.query):,} queries"
        text = f"{share} have no match from another camera and do not count in an evaluation; pids: {_listed(pids)}"
        found.append(DatasetWarning(DatasetWarningKind.UNMATCHED_QUERIES, text, "query", pids, len(unmatched)))
    if dataset.reading.camera_rule is CameraRule.NONE:
        text = "no cameras are known, so queries match images of their own camera and figures are too high; name the"
        text += " cameras by sub-folders of each person, by file names like c1_001.jpg, or by --layout folders:REGEX"
        found.append(DatasetWarning(DatasetWarningKind.NO_CAMERAS, text))
    if (rule := dataset.reading.split_rule) is not SplitRule.GIVEN:
        half = "half of the people, by a hash of their names, are for training; " * (rule is SplitRule.BY_IDENTITY)
        images = dataset.query.tracks is None
        cause, unit = ("no split is given", "image") if images else ("info/ does not list the queries", "tracklet")
        text = f"{cause}: {half}a person's first {unit} in each camera that has several of them is a query"
        found.append(DatasetWarning(DatasetWarningKind.CHOSEN_QUERIES, text, "query", images=len(dataset.query)))
    if dataset.ignored:
        text, images = describe_ignored(dataset.ignored), sum(dataset.ignored.values())
        found.append(DatasetWarning(DatasetWarningKind.IGNORED_FILES, text, images=images))
    return Analysis(counts, known, found)


def warn_of_choices(dataset: ReidDataset) -> None:
    """Issue a PmmWarning for each choice, not a label of the data set, that decides which pairs are evaluated."""
    for warning in analyze(dataset).warnings:
        if warning.kind in (DatasetWarningKind.NO_CAMERAS, DatasetWarningKind.CHOSEN_QUERIES):
            warnings.warn(f"{dataset.root}: {warning.text}", PmmWarning, stacklevel=3)


def _listed(pids: Sequence[int]) -> str:
    """The number of identities and the first few of them."""
    return f"{len(pids):,} ({', '.join(map(str, pids[:5]))}{', …' if len(pids) > 5 else ''})"


def unreadable(paths: Sequence[Path], *, report: Report = silent) -> list[BadImage]:
    """Decode image files as training does, and return those that fail."""
    bad: list[BadImage] = []
    with ThreadPoolExecutor(threads(), thread_name_prefix="verify") as pool:  # Pillow decodes without the GIL
        for start in range(0, len(paths), 256):  # chunks keep Ctrl-C fast
            chunk = paths[start : start + 256]
            tried = pool.map(lambda path: try_crop(path, 1, 1), chunk)
            bad += [crop for crop in tried if isinstance(crop, BadImage)]
            report("images", start + len(chunk), len(paths), f"{len(bad)} unreadable")
    return bad
