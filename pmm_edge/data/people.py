"""Label images that lie in a folder for each person, as in MARS and in most data of one's own, or in a CSV file.

Nothing here depends on the layouts of `dataset`, which lists the files and chooses what to call. docs/datasets.md shows
each form. No image is opened.
"""

import csv
import hashlib
import os
import re
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmm_edge.errors import DataError, did_you_mean
from pmm_edge.retrieval.metrics import DISTRACTOR_PID, JUNK_PID

SPLITS = ("train", "query", "gallery")
COLUMNS = ("path", "pid", "camid", "split")
NOBODY = {"-1": JUNK_PID, "0000": DISTRACTOR_PID}
"""Names that mean no person, as in Market-1501. `0` is a person."""
_CAMERA_TOKEN = re.compile(r"(?<![a-z])c(?:am(?:era)?)?[_-]?(\d{1,9})(?!\d)", re.IGNORECASE | re.ASCII)
_MARS_NAME = re.compile(r"(\d{4}|00-1)C(\d)T(\d{4,9})F\d{3,}\.jpg", re.ASCII)
_MATLAB_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_MATLAB_MATRIX, _MATLAB_COMPRESSED, _MATLAB_BYTES = 14, 15, 1 << 26

Row = tuple[Any, ...]
"""Path, identity and camera of an image, and the number of its tracklet where there are tracklets."""
Rows = dict[str, list[Row]]  # by split


class CameraRule(str, Enum):
    """Where the camera of an image is read from."""

    FILE_NAMES = "file-names"
    SUBFOLDERS = "sub-folders"
    PATTERN = "pattern"
    COLUMN = "camid-column"
    NONE = "none"  # queries get camera 1 and gallery images camera 2, so that every other image of a person matches


class SplitRule(str, Enum):
    """What decides whether an image is for training, a query or in the gallery."""

    GIVEN = "given"
    QUERIES_CHOSEN = "chosen-queries"  # by `choose_queries`
    BY_IDENTITY = "by-identity"  # half of the people are for training, the others are for testing, as above


@dataclass(frozen=True)
class Reading:
    """By which rules a data set was read."""

    camera_rule: CameraRule = CameraRule.FILE_NAMES
    split_rule: SplitRule = SplitRule.GIVEN
    people: Mapping[int, str] = field(default_factory=dict)  # names by identity, where they are not its number
    cameras: Mapping[int, str] = field(default_factory=dict)


def number_names(names: Iterable[str], nobody: Mapping[str, int], least: int) -> dict[str, int]:
    """Numbers for names: their own if all are different integers from `least`, otherwise 1, 2, ... in sorted order."""
    known = sorted({*names} - nobody.keys())
    own = [int(name) if re.fullmatch(r"\d{1,9}", name, re.ASCII) else -1 for name in known]
    kept = len({*own}) == len(own) and min(own, default=0) >= least
    return dict(zip(known, own if kept else range(1, len(known) + 1), strict=True)) | {**nobody}


def _texts(numbers: Mapping[str, int]) -> dict[int, str]:
    """The names by number, without those that are the number."""
    names = ((number, name) for name, number in numbers.items() if name not in NOBODY)
    return {number: name for number, name in names if (name.lstrip("0") or "0") != str(number)}


def choose_queries(pids: Sequence[int], camids: Sequence[int], units: Sequence[Any], across: bool) -> set[Any]:
    """Choose queries from test images of (N,) identities and cameras; `units` are the images or their tracklets.

    The first of several units of a person in a camera is a query. If a person has a single unit in each camera, the
    first one is. All others are the gallery, which holds a match of each query: `across` cameras, a person of one
    camera has no query.
    """
    seen: dict[int, dict[int, dict[Any, None]]] = defaultdict(lambda: defaultdict(dict))
    for pid, camid, unit in zip(pids, camids, units, strict=True):
        seen[pid][camid][unit] = None
    chosen = set()
    for pid, cameras in seen.items():
        if pid not in NOBODY.values() and len(cameras) > across:
            found = [[*of_camera] for of_camera in cameras.values()]
            chosen |= {several[0] for several in found if len(several) > 1} or {one[0] for one in found[:across]}
    return chosen


def label_people(files: Mapping[str, Sequence[Path]], root: Path, pattern: str = "") -> tuple[Rows, Reading]:
    """Label images that lie in a folder for each person.

    `files` are the images in `root/train`, `query`, `gallery` and `test`, or in `root` itself ("" is the key).
    The camera is what the first group of the regular expression `pattern` matches in the path below `root`. Without a
    pattern, it is the sub-folder of the person's folder, or a part of the file name like `c1` or `cam1`, if every image
    has one and they differ. Raises DataError if the pattern is wrong or does not match an image.
    """
    paths = [path for found in files.values() for path in found]
    splits = [split for split, found in files.items() for _ in found]
    below = [path.relative_to(root / split).parts for path, split in zip(paths, splits, strict=True)]
    camera_rule, names = _find_cameras(paths, below, root, pattern)
    people, cameras = number_names((parts[0] for parts in below), NOBODY, 1), number_names(names, {}, 0)
    pids, camids, split_rule = [people[parts[0]] for parts in below], [cameras[name] for name in names], SplitRule.GIVEN
    if "" in files:
        # By a hash, so that a new person moves at most one other to the other side.
        order = sorted(people.keys() - NOBODY.keys(), key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
        trained = {people[name] for name in order[: -(-len(order) // 2)]}
        splits, split_rule = ["train" if pid in trained else "test" for pid in pids], SplitRule.BY_IDENTITY
    elif "test" in files:
        split_rule = SplitRule.QUERIES_CHOSEN
    test = [row for row, split in enumerate(splits) if split == "test"]
    labels = [pids[row] for row in test], [camids[row] for row in test]
    queries = choose_queries(*labels, test, across=camera_rule is not CameraRule.NONE)
    rows: Rows = {split: [] for split in SPLITS}
    for row, (path, pid, camid, split) in enumerate(zip(paths, pids, camids, splits, strict=True)):
        split = split if split in rows else "query" if row in queries else "gallery"
        if camera_rule is CameraRule.NONE:
            camid = 2 if split == "gallery" else 1
        rows[split].append((path, pid, camid))
    of_cameras = {} if camera_rule is CameraRule.NONE else _texts(cameras)
    return rows, Reading(camera_rule, split_rule, _texts(people), of_cameras)


def _find_cameras(
    paths: Sequence[Path], below: Sequence[tuple[str, ...]], root: Path, pattern: str
) -> tuple[CameraRule, list[str]]:
    """The name of each image's camera; `below` are the parts of the paths from the person's folder on."""
    if pattern:
        try:
            found = [re.search(pattern, path.relative_to(root).as_posix()) for path in paths]
        except re.error as error:
            problem = f"'{pattern}' is not a regular expression: {error}"
            raise DataError(problem, r"Write for example 'cam(\d+)'") from error
        names = [(match[1] if match.re.groups else match[0]) if match else None for match in found]
        if None in names:
            remedy = "Correct the pattern, whose first group is the camera, or the name"
            raise DataError(f"'{pattern}' finds no camera in {paths[names.index(None)]}", remedy)
        return CameraRule.PATTERN, [name or "" for name in names]
    tokens = [_CAMERA_TOKEN.search(parts[-1]) for parts in below]
    for rule, names in (
        (CameraRule.SUBFOLDERS, [parts[1] if len(parts) > 2 else None for parts in below]),
        (CameraRule.FILE_NAMES, [match and str(int(match[1])) for match in tokens]),
    ):
        if None not in names and len({*names}) > 1:
            return rule, [name or "" for name in names]
    return CameraRule.NONE, [""] * len(paths)


def is_csv(path: Path) -> bool:
    """Whether a file is a CSV file of labels: its first line names the four columns."""
    if path.suffix.lower() != ".csv" or not path.is_file():
        return False
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return {*COLUMNS} <= {name.strip() for name in file.readline(1000).split(",")}


def read_csv(source: Path) -> tuple[Rows, Reading]:
    """Read the columns path, pid, camid and split of a CSV file. Other columns are ignored.

    Relative paths start at the folder of the file and must stay in it; absolute paths may lead anywhere. Raises
    DataError that names the row, counted in lines from 1, if an entry is wrong, a file is missing or listed twice.
    """
    rows: Rows = {split: [] for split in SPLITS}  # with the names of the people
    lines: dict[str, int] = {}  # where each image is listed first

    def wrong(problem: str, remedy: str) -> DataError:
        return DataError(f"row {reader.line_num} of {source} {problem}", remedy)

    with source.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, strict=True, skipinitialspace=True)
        try:
            if missing := [name for name in COLUMNS if name not in (reader.fieldnames or [])]:
                remedy = f"Its first line must be {','.join(COLUMNS)}, separated by commas"
                raise DataError(f"{source} has no column {', '.join(missing)}", remedy)
            for entry in reader:
                if None in entry or None in entry.values():
                    raise wrong("has more or fewer entries than the first line", "Quote entries that contain commas")
                path, pid, camid, split = (entry[name].strip() for name in COLUMNS)
                if split not in SPLITS:
                    raise wrong(f"has the split '{split}'", f"{did_you_mean(split, SPLITS)}Choose {', '.join(SPLITS)}")
                if not re.fullmatch(r"\d{1,9}", camid, re.ASCII):
                    raise wrong(f"has the camid '{camid}'", "Number the cameras")
                if not path or not pid:
                    raise wrong("has no path or no pid", "Complete the row, or remove it")
                image = source.parent / path
                if not Path(path).is_absolute() and ".." in Path(path).parts:
                    raise wrong(f"leads out of the folder of the file: {path}", "Write an absolute path")
                if not image.is_file():
                    raise wrong(f"names {image}, which does not exist", "Correct the path, or remove the row")
                first = lines.setdefault(os.path.normpath(image), reader.line_num)
                if first != reader.line_num:
                    raise wrong(f"repeats {image} of row {first}", "Remove one of the rows")
                rows[split].append((image, pid, int(camid)))
        except (csv.Error, ValueError) as error:  # ValueError: a null character in a path
            raise wrong(f"cannot be read: {error}", "Save it as comma-separated text in UTF-8") from error
    people = number_names((pid for found in rows.values() for _, pid, _ in found), NOBODY, 1)
    numbered = {split: [(path, people[pid], camid) for path, pid, camid in found] for split, found in rows.items()}
    return numbered, Reading(CameraRule.COLUMN, people=_texts(people))


def label_mars(train: Sequence[Path], test: Sequence[Path], info: Path) -> tuple[Rows, Reading]:
    """Label the images of MARS by their names, and find the queries, which are whole tracklets, by the lists in `info`.

    Where these cannot be read, `choose_queries` chooses tracklets. Raises DataError if a name is wrong.
    """
    numbers: dict[tuple[int, int, int], int] = {}  # of the tracklets
    rows: list[Row] = []
    for path in (*train, *test):
        if (key := _mars_key(path.name)) is None:
            remedy = "It must be like 0001C1T0001F001.jpg; unpack the data set again"
            raise DataError(f"the name of {path} has no identity, camera and tracklet", remedy)
        rows.append((path, *key[:2], numbers.setdefault(key, len(numbers))))
    tests, queries, rule = rows[len(train) :], _mars_queries(info), SplitRule.GIVEN
    if queries is None:
        pids, camids, tracks = ([row[column] for row in tests] for column in (1, 2, 3))
        queries, rule = choose_queries(pids, camids, tracks, across=True), SplitRule.QUERIES_CHOSEN
    else:
        queries = {numbers.get(key) for key in queries}
    splits: Rows = {"train": rows[: len(train)], "query": [], "gallery": []}
    for row in tests:
        splits["query" if row[3] in queries else "gallery"].append(row)
    return splits, Reading(split_rule=rule)


def _mars_key(name: str) -> tuple[int, int, int] | None:
    """Identity, camera and number of the tracklet; None if it is not a name of MARS."""
    match = _MARS_NAME.fullmatch(name)
    return match and (JUNK_PID if match[1] == "00-1" else int(match[1]), int(match[2]), int(match[3]))


def _mars_queries(info: Path) -> set[Any] | None:
    """The keys of the query tracklets; None if the lists are missing, damaged or do not fit each other."""
    try:
        names = (info / "test_name.txt").read_text("ascii").split()
        tracks = _matlab_matrix(info / "tracks_test_info.mat")  # (T, 4): first and last image from 1, identity, camera
        chosen = tracks[_matlab_matrix(info / "query_IDX.mat").ravel() - 1]
        keys = [_mars_key(names[first - 1]) for first in chosen[:, 0].tolist()]
        return {*keys} if [key and key[:2] for key in keys] == [*map(tuple, chosen[:, 2:].tolist())] else None
    except (OSError, ValueError, LookupError, struct.error, zlib.error):
        return None


def _matlab_matrix(path: Path) -> NDArray[np.int64]:
    """Read the first matrix of a MATLAB 5 file, (rows, columns); raise an error if it is not one of integers.

    "MAT-File Format", The MathWorks: a header of 128 bytes, and elements of a type, a size and content.
    """
    content = path.read_bytes()[128:]
    while True:
        (kind, size), content = struct.unpack_from("<II", content), content[8:]
        if kind == _MATLAB_COMPRESSED:
            content = zlib.decompressobj().decompress(content[:size], _MATLAB_BYTES)
        elif kind == _MATLAB_MATRIX:
            break
        else:
            content = content[size:]
    parts = []
    for _ in range(4):  # flags, shape, name, values
        kind, size = struct.unpack_from("<II", content)
        short = kind >> 16  # up to four bytes are stored in place of the size
        parts.append((kind & 0xFFFF, content[4 : 4 + short] if short else content[8 : 8 + size]))
        content = content[8 if short else 8 + -(-size // 8) * 8 :]
    shape = np.frombuffer(parts[1][1], "<i4")
    values = np.frombuffer(parts[3][1], "<" + _MATLAB_TYPES[parts[3][0]])
    with np.errstate(invalid="ignore"):
        integers = values.astype(np.int64)
    if not (integers == values).all():
        raise ValueError("not integers")
    return integers.reshape(shape, order="F")
