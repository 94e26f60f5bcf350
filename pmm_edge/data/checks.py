"""What is in a data set, and what looks wrong with it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pmm_edge.console import Report, silent
from pmm_edge.data.dataset import DISTRACTOR_PID, ReidDataset, Split, problems, queries_with_match
from pmm_edge.data.layouts import KNOWN_SETS, Expected, KnownSet
from pmm_edge.errors import DataError
from pmm_edge.images import read_crop
from pmm_edge.machine import threads
from pmm_edge.retrieval.metrics import JUNK_PID

_CHUNK = 256
_PIDS_NAMED = 5


@dataclass(frozen=True)
class SplitCounts:
    """What a split holds."""

    identities: int
    """People; junk and distractors are none."""
    cameras: int
    images: int
    """As papers count them: with distractors, without junk."""
    distractors: int
    junk: int


@dataclass(frozen=True)
class Finding:
    """Something that looks wrong. `kind` is for programs, `text` for people."""

    kind: str
    text: str


@dataclass(frozen=True)
class Analysis:
    """What `pmm data` shows."""

    splits: dict[str, SplitCounts]
    """By name: train, query, gallery."""
    known: KnownSet | None
    """What a set that is known should hold."""
    warnings: list[Finding]


@dataclass(frozen=True)
class BadImage:
    """A file that training or evaluation would stop at."""

    path: Path
    reason: str


def analyse(dataset: ReidDataset) -> Analysis:
    """Count a data set and look for what is wrong with its labels; no image is opened."""
    splits = {name: count(split) for name, split in dataset.splits.items()}
    known = KNOWN_SETS.get(dataset.layout)
    warnings = [
        *(Finding("unusable", str(problem)) for problem in problems(dataset)),
        *(_other_counts(splits, known) if known else ()),
        *not_trained_on(dataset.train),
        *_train_and_test_overlap(dataset),
        *_queries_without_match(dataset),
        *_seen_by_one_camera(dataset, known.one_camera if known else 0),
    ]
    return Analysis(splits, known, warnings)


def not_trained_on(train: Split) -> list[Finding]:
    """Warn of training images that training leaves out, because their number says that they show nobody.

    A set whose people are numbered from 0 would lose one of them and never know.
    """
    counts = count(train)
    found = [
        f"{_images(number)} numbered {pid}"
        for number, pid in ((counts.distractors, DISTRACTOR_PID), (counts.junk, JUNK_PID))
        if number
    ]
    if not found:
        return []
    return [
        Finding(
            "nobody-in-train",
            f"train: {' and '.join(found)} left out of training, for {DISTRACTOR_PID} and {JUNK_PID} stand for nobody:"
            " if they show a person, give that person a free number above 0 in the names of all images",
        )
    ]


def count(split: Split) -> SplitCounts:
    """Count the identities, cameras and images of a split."""
    junk = int((split.pids == JUNK_PID).sum())
    distractors = int((split.pids == DISTRACTOR_PID).sum())
    return SplitCounts(split.identities, split.cameras, len(split) - junk, distractors, junk)


def unreadable(paths: Sequence[Path], *, report: Report = silent) -> list[BadImage]:
    """Decode every image, as training will, and say which cannot be read."""
    bad: list[BadImage] = []
    # Pillow decodes without the interpreter's lock.
    with ThreadPoolExecutor(threads(), thread_name_prefix="verify") as pool:
        # In chunks, so that Ctrl-C has little to wait for and MSMT17 does not queue 126,441 futures.
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


def _other_counts(splits: dict[str, SplitCounts], known: KnownSet) -> Iterator[Finding]:
    for name, expected in (("train", known.train), ("query", known.query), ("gallery", known.gallery)):
        got = Expected(splits[name].identities, splits[name].images)
        if got != expected:
            yield Finding("counts", f"{name} shows {_said(got)}; {known.title} has {_said(expected)}")


def _said(counts: Expected) -> str:
    return f"{_people(counts.identities)} in {_images(counts.images)}"


def _train_and_test_overlap(dataset: ReidDataset) -> Iterator[Finding]:
    trained = set(_cameras_by_pid(dataset.train))
    both = sorted(trained & set(_cameras_by_pid(dataset.query, dataset.gallery)))
    if both:
        yield Finding(
            "train-test-overlap",
            f"{_people(len(both))} of the training set also in query or gallery ({_named(both)}): figures would tell"
            " of people whom the network has seen",
        )


def _queries_without_match(dataset: ReidDataset) -> Iterator[Finding]:
    alone = np.delete(dataset.query.pids, queries_with_match(dataset))
    if len(alone):
        people = np.unique(alone).tolist()
        yield Finding(
            "query-without-match",
            f"{len(alone):,} of {len(dataset.query):,} queries, of {_people(len(people))} ({_named(people)}), without a"
            " gallery image from another camera: they are left out of the figures",
        )


def _seen_by_one_camera(dataset: ReidDataset, expected_in_test: int) -> Iterator[Finding]:
    for name, splits, expected, effect in (
        ("train", (dataset.train,), 0, "they teach nothing about other cameras"),
        ("query and gallery", (dataset.query, dataset.gallery), expected_in_test, "nobody can find them in another"),
    ):
        cameras = _cameras_by_pid(*splits)
        once = sorted(pid for pid, seen_by in cameras.items() if len(seen_by) == 1)
        # Some sets are made so: DukeMTMC-reID puts 408 such people into its gallery.
        if len(once) not in (0, expected):
            yield Finding(
                "one-camera",
                f"{name}: {len(once):,} of {_people(len(cameras))} seen by one camera only ({_named(once)}): {effect}",
            )


def _cameras_by_pid(*splits: Split) -> dict[int, set[int]]:
    """The cameras that saw each person; junk and distractors are nobody."""
    seen_by: dict[int, set[int]] = defaultdict(set)
    for split in splits:
        labels = np.stack([split.pids, split.camids], axis=1)[split.pids > DISTRACTOR_PID]
        for pid, camid in np.unique(labels, axis=0).tolist():
            seen_by[pid].add(camid)
    return dict(seen_by)


def _people(number: int) -> str:
    return f"{number:,} {'identity' if number == 1 else 'identities'}"


def _images(number: int) -> str:
    return f"{number:,} {'image' if number == 1 else 'images'}"


def _named(pids: Sequence[int]) -> str:
    """The first few identities, for a message."""
    return ", ".join(map(str, pids[:_PIDS_NAMED])) + (", …" if len(pids) > _PIDS_NAMED else "")
