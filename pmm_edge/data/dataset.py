"""A reID data set on disk: recognize its layout, and read identities and cameras from names and lists of files.

Market-1501, DukeMTMC-reID and CUHK03-NP share one form of folder; MSMT17 and the CUHK03 that torchreid and fast-reid
convert have their own. `people` reads MARS, folders per person and CSV files. docs/datasets.md shows each. No image is
opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PureWindowsPath

import numpy as np
from numpy.typing import NDArray

from pmm_edge.console import Report, printable, silent
from pmm_edge.data import people
from pmm_edge.data.people import Reading
from pmm_edge.errors import DataError, PmmWarning, did_you_mean
from pmm_edge.files import sha256
from pmm_edge.images import IMAGE_SUFFIXES
from pmm_edge.retrieval.metrics import DISTRACTOR_PID, JUNK_PID

TRAIN, QUERY, GALLERY = "bounding_box_train", "query", "bounding_box_test"  # the folders of Market-1501
ANY_MARKET = "market-layout"
"""The layout of a folder in Market-1501's form that is not a known data set."""
MARS, FOLDERS, CSV = "mars", "folders", "csv"


@dataclass(frozen=True)
class SplitSize:
    """Size of a split as papers count it: identities without distractors, images with distractors and without junk."""

    identities: int
    images: int


# How the name of the folder (in lower case, without punctuation) and those of the training images start, and the
# published numbers of identities and images in training set, queries and gallery; docs/datasets.md names the sources.
# The readme of Market-1501 counts 19,732 gallery images, of which 3,819 are junk.
_MARKET_SETS = {
    "market1501": (r"market1501|market$", r"\d{4}_c\ds\d_\d{6}_\d\d", (751, 12_936, 750, 3_368, 750, 15_913)),
    "dukemtmc-reid": (r"duke(mtmc)?(reid)?$", r"\d{4}_c\d_f\d{7}", (702, 16_522, 702, 2_228, 1_110, 17_661)),
    "occluded-duke": (r"occludedduke(mtmc)?(reid)?$", r"\d{4}_c\d_f\d{7}", (702, 15_618, 519, 2_210, 1_110, 17_661)),
    "cuhk03-np-detected": (r"(cuhk03(np)?)?detected$", r"\d{4}_c[12]_\d+\.", (767, 7_365, 700, 1_400, 700, 5_332)),
    "cuhk03-np-labeled": (r"(cuhk03(np)?)?labell?ed$", r"\d{4}_c[12]_\d+\.", (767, 7_368, 700, 1_400, 700, 5_328)),
}
# Training and test folder, and the same numbers.
_MSMT17_SETS = {
    "msmt17-v1": ("train", "test", (1_041, 32_621, 3_060, 11_659, 3_060, 82_161)),
    "msmt17-v2": ("mask_train_v2", "mask_test_v2", (1_041, 32_621, 3_060, 11_659, 3_060, 82_161)),
}
KNOWN_SETS = {
    layout: {"train": SplitSize(*size[:2]), "query": SplitSize(*size[2:4]), "gallery": SplitSize(*size[4:])}
    for layout, (_, _, size) in (_MARKET_SETS | _MSMT17_SETS).items()
}
"""Published sizes of the splits of known data sets, by layout."""
LAYOUTS = (*KNOWN_SETS, MARS, ANY_MARKET, FOLDERS, CSV)
# Up to nine digits: longer numbers are not labels and would overflow.
_MARKET_NAME = re.compile(r"(-1|\d{1,9})_c(\d{1,9})(?!\d)", re.ASCII)
# The published 32,621 training images are those of the first two lists.
_MSMT17_LISTS = ("list_train.txt", "list_val.txt", "list_query.txt", "list_gallery.txt")
_MSMT17_LINE = re.compile(r"((?:[^/]*/)*\d+_\d+_(\d{1,9})_[^/]*)\s+(\d{1,9})\s*", re.ASCII)

# Camera pair, person of that pair, view and number. No pair has 10,000 people.
_CUHK03_NAME = re.compile(r"([1-9])_(\d{3,4})_([12])_\d{1,3}\.png", re.ASCII)
# Folders that hold a split, not a person.
_SPLIT_NAMES = {*people.SPLITS, "test", "val", "validation", "train_all", TRAIN, GALLERY, "bbox_train", "bbox_test"}
_PER_PERSON = "For a folder per person, name the folders train, query and gallery, or put the people into one folder"
_OTHER_FORMATS = re.compile(r"\.(avif|cr2|dng|gif|hei[cf]|j2k|jfif|jp2|jpe|jxl|nef|p[bgnp]m|tga|tiff?)")


@dataclass(frozen=True)
class Split:
    """The images of one split, sorted by path: N files with (N,) identities and (N,) cameras."""

    paths: list[Path]
    pids: NDArray[np.int64]
    camids: NDArray[np.int64]
    tracks: NDArray[np.int64] | None = None
    """(N,): images of one tracklet, frames of one person in one camera, have the same number in the whole data set."""

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, rows: Sequence[int] | NDArray[np.intp]) -> Split:
        rows = np.asarray(rows, np.intp)
        tracks = None if self.tracks is None else self.tracks[rows]
        return Split([self.paths[row] for row in rows], self.pids[rows], self.camids[rows], tracks)

    def without(self, bad: Collection[Path]) -> Split:
        return self.select([row for row, path in enumerate(self.paths) if path not in bad])

    @property
    def identities(self) -> int:
        """Number of people, without junk and distractors."""
        return int((np.unique(self.pids) > DISTRACTOR_PID).sum())

    @property
    def size(self) -> SplitSize:
        return SplitSize(self.identities, int((self.pids != JUNK_PID).sum()))


@dataclass(frozen=True)
class ReidDataset:
    """Training images, and query and gallery images of other identities for evaluation."""

    name: str  # the layout if it is a known data set of the published size, otherwise the name of its folder, escaped
    root: Path
    train: Split
    query: Split
    gallery: Split
    layout: str = ANY_MARKET
    ignored: Mapping[str, int] = field(default_factory=dict)  # see `walk_files`
    reading: Reading = field(default_factory=Reading)

    @property
    def splits(self) -> dict[str, Split]:
        return {"train": self.train, "query": self.query, "gallery": self.gallery}

    @property
    def labels(self) -> tuple[NDArray[np.int64], ...]:
        """Query pids, gallery pids, query camids and gallery camids, in the order of `pmm_edge.evaluate`."""
        return self.query.pids, self.gallery.pids, self.query.camids, self.gallery.camids

    def without_junk(self) -> ReidDataset:
        """What an evaluation needs to read: no metric counts junk in the gallery."""
        return replace(self, gallery=self.gallery.select(np.flatnonzero(self.gallery.pids != JUNK_PID)))

    def fingerprint(self) -> str:
        """SHA-256 of the names and labels of all images and the file sizes of the training images.

        A query or gallery image may be replaced by a readable copy: no weight depends on it.
        """
        digest = hashlib.sha256()
        for split in self.splits.values():
            for path, pid, camid in zip(split.paths, split.pids, split.camids, strict=True):
                size = path.stat().st_size if split is self.train and path.exists() else ""
                digest.update(os.fsencode(f"{path.name} {pid} {camid} {size}\n"))
        return digest.hexdigest()


def scan(root: Path, layout: str | None = None, training: bool = True) -> ReidDataset:
    """Read a data set and require that it can be evaluated and, with `training`, trained on. No image is opened.

    `layout`, one of `LAYOUTS`, is recognized if None, and otherwise used; it selects one of the kinds of CUHK03-NP.
    `folders:REGEX` is a folder per person with the camera in the first group of the expression. Raises DataError if
    `root` is not a data set, has another layout or is incomplete, if a file name or a row has no labels, or
    if `problems` finds something.
    """
    dataset = read(root, layout)
    for problem in problems(dataset, training):
        raise problem
    return dataset


def read(root: Path, layout: str | None = None) -> ReidDataset:
    """Read a data set like `scan`, but accept splits that cannot be trained or evaluated on."""
    kind, _, pattern = (layout or "").partition(":")
    if (kind and kind not in LAYOUTS) or (pattern and kind != FOLDERS):
        remedy = f"{did_you_mean(layout, LAYOUTS)}Choose one of {', '.join(LAYOUTS)}"
        raise DataError(f"unknown layout {layout}", remedy)
    ignored, rows, reading = Counter[str](), people.Rows(), Reading()
    try:
        is_csv = kind == CSV or (not kind and root.suffix.lower() == ".csv" and root.is_file())
        if not (root.is_file() if is_csv else root.is_dir()):
            remedy = "Name a CSV file" if is_csv else f"Pass the folder that contains {TRAIN}/, or run pmm synth"
            raise DataError(f"{root} is not a {'file' if is_csv else 'folder'}", remedy)
        if root.name in ("", ".."):  # folder names matter below, and "." has none
            root = root.resolve()
        kinds = _cuhk03_kinds(root)
        if layout in kinds:
            root = kinds[layout]
        elif layout is None and len(kinds) > 1:
            problem = f"{root} contains CUHK03-NP with detected and with labeled boxes"
            raise DataError(problem, f"Pass {' or '.join(map(str, kinds.values()))}")
        if is_csv:
            found, (rows, reading) = CSV, people.read_csv(root)
        elif kind == FOLDERS:
            found, (rows, reading) = layout or "", _read_people(root, layout, ignored)
        elif kind == MARS or (not kind and _is_mars(root)):
            trained, tested = ([*walk_files(root / name, True, ignored)] for name in ("bbox_train", "bbox_test"))
            found, (rows, reading) = MARS, people.label_mars(trained, tested, root / "info")
        elif _is_converted_cuhk03(root) and layout in (None, kind := f"cuhk03-np-{root.name.removeprefix('images_')}"):
            found, splits = kind, _read_converted_cuhk03(root)
        elif layout in (*_MARKET_SETS, ANY_MARKET) or (layout is None and _is_market(root)):
            found, splits = _read_market(root, layout, ignored)
        elif layout or _is_msmt17(root):
            found, splits = _read_msmt17(root, layout)
        elif nearby := [str(child) for child in (*sorted(root.iterdir()), root.resolve().parent) if is_dataset(child)]:
            problem = f"{root} does not contain {TRAIN}, {QUERY} and {GALLERY}"
            raise DataError(problem, f"Did you mean {' or '.join(nearby[:3])}?")
        else:
            found, (rows, reading) = FOLDERS, _read_people(root, None, ignored)
    except OSError as error:
        remedy = "Check permissions and --layout; docs/datasets.md shows which files a data set needs"
        raise DataError(f"cannot read {error.filename or root}: {error.strerror}", remedy) from error
    if rows:
        if empty := [split for split in ("query", "gallery") if not rows[split]]:
            remedy = "Add people whom two cameras saw, or choose the images by folders named query and gallery"
            raise DataError(f"{root} has no images for {empty[0]}", remedy)
        nobody = Split([], *np.empty((3 if found == MARS else 2, 0), np.int64))  # to train on
        splits = [_split(rows[split], root) if rows[split] else nobody for split in people.SPLITS]
    published = KNOWN_SETS.get(found, {}).values()
    name = found if [split.size for split in splits] == [*published] else printable(root.name)
    train, query, gallery = splits
    return ReidDataset(name, root, train, query, gallery, found, ignored, reading)


def is_dataset(root: Path) -> bool:
    """Whether a folder has one of the known layouts, complete or not, or a file is a CSV file of labels.

    A folder per person could be any folder of images, so it must be named explicitly: `--layout folders`.
    """
    known = _is_msmt17(root) or _is_market(root) or _is_mars(root) or _is_converted_cuhk03(root)
    return known or bool(_cuhk03_kinds(root)) or people.is_csv(root)


def _is_mars(root: Path) -> bool:
    return (root / "bbox_train").is_dir() and (root / "bbox_test").is_dir()


def _is_market(root: Path) -> bool:
    return (root / TRAIN).is_dir() or (root / GALLERY).is_dir()


def _is_msmt17(root: Path) -> bool:
    # A single list may have strayed into any folder.
    listed = sum((root / name).exists() for name in _MSMT17_LISTS) > 1 or root.name.lower().startswith("msmt17")
    return (listed and (root / "train").is_dir()) or (root / "mask_train_v2").is_dir()


def _cuhk03_kinds(root: Path) -> dict[str | None, Path]:
    """The folders of the two kinds in `root`, by layout."""
    folders = [root / kind for kind in ("detected", "labeled")]
    found = [folder for kind in folders if _is_converted_cuhk03(folder := root / f"images_{kind.name}")]
    found += [folder for folder in folders if _is_market(folder)]
    return {f"cuhk03-np-{folder.name.removeprefix('images_')}": folder for folder in found}


def _is_converted_cuhk03(root: Path) -> bool:
    return root.name in ("images_detected", "images_labeled") and _cuhk03_lists(root).exists() and not _is_market(root)


def _cuhk03_lists(root: Path) -> Path:
    return root.with_name(f"splits_new_{root.name.removeprefix('images_')}.json")


def walk_files(
    folder: Path,
    deep: bool,
    ignored: Counter[str],
    suffixes: Collection[str] = IMAGE_SUFFIXES,
    above: tuple[str, ...] = (),
) -> Iterator[Path]:
    """Yield the files of a folder with one of these suffixes, sorted, without hidden ones; with `deep`, also below it.

    Only the names of one folder at a time are in memory. Symbolic links are followed. `ignored` counts images of other
    formats by suffix, pipes and other special files, and unreadable folders. `above` are the real paths of the folders
    that this one is in, to end loops of links.
    """
    here = os.path.realpath(folder)
    try:
        names = sorted(os.listdir(folder))  # noqa: PTH208  paths take six times the memory
    except OSError:
        if not above:
            raise
        ignored["unreadable folder"] += 1
        return
    for name in names:  # in the order of sorted paths: a folder comes where its name does
        if name.startswith("."):  # macOS leaves ._NAME.jpg
            continue
        path = folder / name
        suffix = path.suffix.lower()
        try:
            mode = path.stat().st_mode
        except OSError:
            mode = stat.S_IFREG  # a broken link is an unreadable image
        if stat.S_ISDIR(mode):
            if deep and os.path.realpath(path) not in (*above, here):
                yield from walk_files(path, deep, ignored, suffixes, (*above, here))
        elif not stat.S_ISREG(mode):
            ignored["pipe, device or socket"] += 1
        elif suffix in suffixes:
            yield path
        elif _OTHER_FORMATS.fullmatch(suffix):
            ignored[suffix] += 1


def describe_ignored(ignored: Mapping[str, int]) -> str:
    """What `walk_files` ignored; empty if nothing."""
    counts = ", ".join(f"{kind} ({count:,})" for kind, count in sorted(ignored.items()))
    return counts and f"skipped: {counts}; only {', '.join(sorted(IMAGE_SUFFIXES))} files are read"


def warn_ignored(source: Path, ignored: Mapping[str, int]) -> None:
    """Issue a PmmWarning if `walk_files` ignored anything."""
    if ignored:
        warnings.warn(f"{source}: {describe_ignored(ignored)}", PmmWarning, stacklevel=3)


def no_images(source: Path, ignored: Mapping[str, int], remedy: str = "") -> DataError:
    """The error for a folder or list without images."""
    problem = f"{source} contains no images" + (f" ({describe_ignored(ignored)})" if ignored else "")
    return DataError(problem, remedy or f"Name a folder or list of {', '.join(sorted(IMAGE_SUFFIXES))} files")


def _read_market(root: Path, layout: str | None, ignored: Counter[str]) -> tuple[str, list[Split]]:
    splits = [_read_market_folder(root / name, ignored) for name in (TRAIN, QUERY, GALLERY)]
    if layout:
        return layout, splits
    # File names alone do not tell: other data sets, including the synthetic one, copy those of Market-1501.
    train, folder = splits[0], re.sub(r"[^a-z0-9]", "", root.name.lower())
    for known, (folder_name, file_name, _) in _MARKET_SETS.items():
        if all(re.match(file_name, path.name) for path in train.paths) and (
            re.match(folder_name, folder) or train.size == KNOWN_SETS[known]["train"]
        ):
            return known, splits
    return ANY_MARKET, splits


def _read_market_folder(folder: Path, ignored: Counter[str]) -> Split:
    images, skipped = [], Counter[str]()
    for path in walk_files(folder, deep=False, ignored=skipped):
        match = _MARKET_NAME.match(path.name)
        if match is None:
            remedy = "Rename it to IDENTITY_cCAMERA..., such as 0002_c1s1_000451_03.jpg, or remove it"
            raise DataError(f"the name of {path} has no identity and camera", remedy)
        images.append((path, int(match[1]), int(match[2])))
    ignored.update(skipped)
    return _split(images, folder, skipped)


def _read_converted_cuhk03(root: Path) -> list[Split]:
    """Read the lists beside the folder, and labels from the file names: the lists number training identities from 0."""
    source, splits = _cuhk03_lists(root), []
    try:
        (lists,) = json.loads(source.read_bytes())
        for name in ("train", "query", "gallery"):
            images = []
            for path, *_ in lists[name]:  # a path on another machine; a Windows path accepts both slashes
                pair, person, view = _CUHK03_NAME.fullmatch(PureWindowsPath(path).name).groups()  # type: ignore[union-attr]
                images.append((root / PureWindowsPath(path).name, int(pair) * 10_000 + int(person), int(view)))
            splits.append(_split(images, source))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        remedy = "Convert the release again with the script in docs/datasets.md"
        raise DataError(f"{source} does not list the images of the new protocol", remedy) from error
    if missing := [path for split in splits for path in split.paths if not path.is_file()]:
        raise DataError(f"{source} lists {missing[0]}, which does not exist", "Convert the release again")
    return splits


def _read_msmt17(root: Path, layout: str | None) -> tuple[str, list[Split]]:
    """Read the four lists, in which the identities for training and those for testing are both numbered from 0.

    Elsewhere 0 is a distractor: training identities are shifted by one, and test identities follow the last of them.
    """
    version = layout or ("msmt17-v2" if (root / "mask_train_v2").is_dir() else "msmt17-v1")
    train_folder, test_folder = (root / name for name in _MSMT17_SETS[version][:2])
    train = [image for name in _MSMT17_LISTS[:2] for image in _read_msmt17_list(root / name, train_folder, 1)]
    splits = [_split(train, root / _MSMT17_LISTS[0])]
    first_pid = 1 + int(splits[0].pids.max())
    tests = [root / name for name in _MSMT17_LISTS[2:]]
    return version, splits + [_split(_read_msmt17_list(path, test_folder, first_pid), path) for path in tests]


def _read_msmt17_list(path: Path, folder: Path, first_pid: int) -> list[tuple[Path, int, int]]:
    images = []
    for number, line in enumerate(path.read_text("utf-8-sig", "surrogateescape").splitlines(), 1):
        match = _MSMT17_LINE.fullmatch(line)
        # A downloaded name, joined to a folder, must stay inside of it on any operating system.
        if match is None or not {"..", ".", ""}.isdisjoint(match[1].split("/")) or set(match[1]) & set("\\:\0"):
            raise DataError(
                f"line {number} of {path} is not an image of the data set and an identity: {line[:80]!r}",
                "It must read like 0000/0000_000_01_0303morning_0015_0.jpg 0; download the list again",
            )
        image = folder / match[1]
        if not image.is_file():
            raise DataError(f"{path} lists {image}, which does not exist", "Unpack the data set again")
        images.append((image, first_pid + int(match[3]), int(match[2])))
    return images


def _read_people(root: Path, layout: str | None, ignored: Counter[str]) -> tuple[people.Rows, Reading]:
    """Read a folder per person, in folders for the splits or in `root` itself."""
    names = {child.name for child in root.iterdir() if child.is_dir()}
    kinds = people.SPLITS, ("train", "test"), ("query", "gallery"), ("test",)
    splits = next((given for given in kinds if {*given} <= names), ("",))
    unused = {name for name in names - {*splits} if (name in _SPLIT_NAMES or splits[0]) and name[0] != "."}
    if unused and not splits[0]:
        problem = f"{root} contains {', '.join(sorted(unused))}, which are not people"
        raise DataError(problem, _PER_PERSON)
    found = Counter({f"folder {name}": 1 for name in unused})
    files = {}
    for split in splits:
        images = [*walk_files(root / split, deep=True, ignored=found)]
        files[split] = [path for path in images if path.parent != root / split]
        found["image in no person's folder"] += len(images) - len(files[split])
    if not any(files.values()):
        remedy = _PER_PERSON if found["image in no person's folder"] else "docs/datasets.md shows the layouts"
        raise DataError(f"{root} does not contain {TRAIN}, {QUERY} and {GALLERY}, or a folder per person", remedy)
    deepest = max((path for images in files.values() for path in images), key=lambda path: len(path.parts))
    if layout is None and len(deepest.relative_to(root).parts) - bool(splits[0]) > 3:  # any folder of images
        problem = f"{root} is not a known data set: {deepest} is deeper than PERSON/CAMERA/IMAGE"
        raise DataError(problem, "Pass --layout folders if its folders are people, or see docs/datasets.md")
    ignored.update(+found)
    return people.label_people(files, root, (layout or "").partition(":")[2])


def _split(images: Sequence[people.Row], source: Path, ignored: Mapping[str, int] | None = None) -> Split:
    """The split of (path, identity, camera[, tracklet]) of each image, read from `source`."""
    if not images:
        nested = source.is_dir() and any(path.suffix.lower() in IMAGE_SUFFIXES for path in source.glob("*/*"))
        raise no_images(source, ignored or {}, _PER_PERSON if nested else "")
    paths, *labels = zip(*sorted(images), strict=True)
    return Split(list(paths), *(np.array(label, np.int64) for label in labels))


def combine(datasets: Sequence[ReidDataset]) -> ReidDataset:
    """The training images of all data sets, and query and gallery of the first; people and cameras are kept apart.

    Raises DataError if a data set is named twice or has no people to train on.
    """
    first, *others = datasets
    if not others:
        return first
    parts, splits = [first.train], first.splits.values()
    last_pid, last_camid = max(split.pids.max() for split in splits), max(split.camids.max() for split in splits)
    for number, one in enumerate(others, 1):
        train = one.train
        if any(one.root.resolve() == other.root.resolve() for other in datasets[:number]):
            raise DataError(f"{one.root} is named twice", "Name each data set once")
        if not train.identities:
            raise DataError(f"the training set of {one.root} has no identities", "Leave it out, or correct its labels")
        pids = np.where(train.pids > DISTRACTOR_PID, train.pids + last_pid, train.pids)
        camids = train.camids + last_camid + 1
        parts.append(Split(train.paths, pids, camids))
        last_pid, last_camid = max(last_pid, pids.max()), camids.max()
    pids, camids = (np.concatenate([getattr(part, name) for part in parts]) for name in ("pids", "camids"))
    train = Split([path for part in parts for path in part.paths], pids, camids)
    return replace(first, name="+".join(one.name for one in datasets), train=train)


def problems(dataset: ReidDataset, training: bool = True) -> list[DataError]:
    """Return the reasons why a network cannot be evaluated or, with `training`, trained on a data set."""
    found = []
    if training and (identities := dataset.train.identities) < 2:
        problem = f"the training set of {dataset.root} has {identities} identities"
        found.append(DataError(problem, "Training needs at least two"))
    if not len(queries_with_match(dataset)):
        problem = f"no query of {dataset.root} has a match in the gallery from another camera"
        found.append(DataError(problem, "Query and gallery must show the same identities, seen by two cameras"))
    return found


def queries_with_match(dataset: ReidDataset) -> NDArray[np.intp]:
    """Indices of the queries that count in an evaluation: another camera's gallery image shows the same identity."""
    query, gallery = dataset.query, dataset.gallery
    cameras = defaultdict[int, set[int]](set)
    for pid, camid in zip(gallery.pids.tolist(), gallery.camids.tolist(), strict=True):
        cameras[pid].add(camid)
    for nobody in (JUNK_PID, DISTRACTOR_PID):
        cameras.pop(nobody, None)
    queries = zip(query.pids.tolist(), query.camids.tolist(), strict=True)
    return np.flatnonzero([bool(cameras[pid] - {camid}) for pid, camid in queries])


def data_sha256(paths: Sequence[Path], root: Path, report: Report = silent) -> str:
    """The SHA-256 of the names, relative to `root`, and contents of images, in the given order."""
    digest = hashlib.sha256()
    for number, path in enumerate(paths, 1):
        try:
            line = f"{Path(os.path.relpath(path, root)).as_posix()}\0{sha256(path)}\n"
        except OSError as error:
            raise DataError(f"cannot hash {path} ({error})", "Check the data set with pmm data --decode") from error
        digest.update(os.fsencode(line))
        report("hashing the data", number, len(paths))
    return digest.hexdigest()
