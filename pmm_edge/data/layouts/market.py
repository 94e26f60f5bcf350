"""Market-1501's layout: three folders, labels in the file names. DukeMTMC-reID and CUHK03-NP share it.

bounding_box_train/0002_c1s1_000451_03.jpg    identity 2, camera 1
query/                                        the same of other people
bounding_box_test/                            the gallery: with -1 (junk) and 0000 (distractors) as well
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pmm_edge.data.layouts.known import KNOWN_SETS, Expected
from pmm_edge.data.layouts.records import ANY_MARKET, Files, Record
from pmm_edge.errors import DataError
from pmm_edge.images import IMAGE_SUFFIXES

TRAIN, QUERY, GALLERY = "bounding_box_train", "query", "bounding_box_test"

# Nine digits at most: what is longer is no label and would not fit an integer of numpy.
_LABELS = re.compile(r"(-1|\d{1,9})_c(\d{1,9})(?!\d)", re.ASCII)


@dataclass(frozen=True)
class _Signs:
    """What tells a set that is known from others in this layout."""

    layout: str
    folder: re.Pattern[str]
    """Starts the folder's name, in lower case and without punctuation."""
    file: re.Pattern[str]
    """Starts every training image's name."""


_SIGNS = (
    _Signs("market1501", re.compile(r"market1501|market$"), re.compile(r"\d{4}_c\ds\d_\d{6}_\d\d")),
    _Signs("dukemtmc-reid", re.compile(r"duke(mtmc)?(reid)?$"), re.compile(r"\d{4}_c\d_f\d{7}")),
    _Signs("cuhk03-np-detected", re.compile(r"(cuhk03(np)?)?detected$"), re.compile(r"\d{4}_c[12]_\d+\.")),
    _Signs("cuhk03-np-labeled", re.compile(r"(cuhk03(np)?)?labell?ed$"), re.compile(r"\d{4}_c[12]_\d+\.")),
)
LAYOUTS = (*(signs.layout for signs in _SIGNS), ANY_MARKET)


def holds(root: Path) -> bool:
    """Whether a folder is meant to be in this layout, complete or not."""
    return any((root / folder).is_dir() for folder in (TRAIN, GALLERY))


def read(root: Path) -> Files:
    """Read the folders and file names; no image is opened.

    Raises:
        DataError: a folder is missing or empty, or a name does not say who it shows.
    """
    missing = [folder for folder in (TRAIN, QUERY, GALLERY) if not (root / folder).is_dir()]
    if missing:
        raise DataError(
            f"{root} has no folder {', '.join(missing)}: it is not in the layout of Market-1501",
            f"It must hold {TRAIN}, {QUERY}, {GALLERY}",
        )
    return Files(*(_read_folder(root / folder) for folder in (TRAIN, QUERY, GALLERY)))


def which(root: Path, files: Files) -> str:
    """Say which set it is: by the form of its names, and by the folder's name or the count of training images.

    The form alone does not tell: other sets, the synthetic one among them, take over Market-1501's names.
    """
    folder = re.sub(r"[^a-z0-9]", "", root.name.lower())
    people = {record.pid for record in files.train if record.pid > 0}
    counted = Expected(len(people), len(files.train))
    for signs in _SIGNS:
        if not all(signs.file.match(record.path.name) for record in files.train):
            continue
        if signs.folder.match(folder) or counted == KNOWN_SETS[signs.layout].train:
            return signs.layout
    return ANY_MARKET


def _read_folder(folder: Path) -> list[Record]:
    # Market-1501 itself ships Thumbs.db files, and some systems leave ._NAME.jpg: what is no image is passed over.
    paths = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )
    if not paths:
        raise DataError(f"{folder} holds no images", "Fetch or unpack the data set again")
    return [_record(path) for path in paths]


def _record(path: Path) -> Record:
    match = _LABELS.match(path.name)
    if match is None:
        raise DataError(
            f"the name of {path} does not say who it shows and which camera took it",
            "Name files IDENTITY_cCAMERA..., such as 0002_c1s1_000451_03.jpg, or remove this one",
        )
    return Record(path, int(match[1]), int(match[2]))
