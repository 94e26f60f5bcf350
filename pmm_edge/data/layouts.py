"""Recognize the folder layouts of public reID data sets and list their images.

Market-1501, DukeMTMC-reID and CUHK03-NP share one form of folder, the converted release of CUHK03 and MSMT17 have
their own. `_FORMS`, at the end of this file, lists the forms. Labels come from file names and list files; no image is
opened. docs/datasets.md shows each layout.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from pmm_edge.errors import DataError, did_you_mean
from pmm_edge.images import IMAGE_SUFFIXES

TRAIN, QUERY, GALLERY = "bounding_box_train", "query", "bounding_box_test"
"""The folders of Market-1501."""
ANY_MARKET = "market-layout"
"""The layout of a folder in Market-1501's form that is not a known data set."""


class Record(NamedTuple):
    """An image file, its identity and its camera."""

    path: Path
    pid: int
    camid: int


@dataclass(frozen=True)
class Listing:
    """The images of a data set: its root folder, its layout (one of `LAYOUTS`), and the splits, each sorted by path."""

    root: Path
    layout: str
    train: list[Record]
    query: list[Record]
    gallery: list[Record]


@dataclass(frozen=True)
class SplitSize:
    """Size of a split as papers count it: identities without distractors, images with distractors and without junk."""

    identities: int
    images: int


@dataclass(frozen=True)
class KnownSet:
    """Published size of a data set; docs/datasets.md names the sources."""

    title: str
    train: SplitSize
    query: SplitSize
    gallery: SplitSize
    one_camera: int = 0  # test identities that only one camera has seen, according to the authors


_DUKE_GALLERY = SplitSize(1_110, 17_661)
_MSMT17_SIZES = SplitSize(1_041, 32_621), SplitSize(3_060, 11_659), SplitSize(3_060, 82_161)
KNOWN_SETS = {
    # The readme of Market-1501 counts 19,732 gallery images, of which 3,819 are junk.
    "market1501": KnownSet("Market-1501", SplitSize(751, 12_936), SplitSize(750, 3_368), SplitSize(750, 15_913)),
    "dukemtmc-reid": KnownSet("DukeMTMC-reID", SplitSize(702, 16_522), SplitSize(702, 2_228), _DUKE_GALLERY, 408),
    "cuhk03-np-detected": KnownSet("CUHK03-NP", SplitSize(767, 7_365), SplitSize(700, 1_400), SplitSize(700, 5_332)),
    "cuhk03-np-labeled": KnownSet("CUHK03-NP", SplitSize(767, 7_368), SplitSize(700, 1_400), SplitSize(700, 5_328)),
    "msmt17-v1": KnownSet("MSMT17", *_MSMT17_SIZES),
    "msmt17-v2": KnownSet("MSMT17 V2", *_MSMT17_SIZES),
}
"""Published sizes of the known data sets, by layout."""


def list_images(root: Path, layout: str | None = None) -> Listing:
    """Recognize a data set and list its images.

    `layout`, one of `LAYOUTS`, selects one of the two kinds of CUHK03-NP, and tells which data set a folder in
    Market-1501's form is. Raises DataError if `root` is not a data set, has another layout or is incomplete.
    """
    if layout is not None and layout not in LAYOUTS:
        remedy = f"{did_you_mean(layout, LAYOUTS)}Choose one of {', '.join(LAYOUTS)}"
        raise DataError(f"unknown layout {layout}", remedy)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder", f"Pass the folder that contains {TRAIN}/, or run pmm synth")
    if root.name in ("", ".."):  # folder names matter below, and "." has none
        root = root.resolve()
    kinds = {} if _is_market(root) else _cuhk03_kinds(root)
    if layout in kinds:
        root = kinds[layout]
    elif len(kinds) > 1:
        problem = f"{root} contains CUHK03-NP with detected and with labeled boxes"
        raise DataError(problem, f"Pass {' or '.join(map(str, kinds.values()))}")
    read = next((read for detect, read in _FORMS if detect(root)), None)
    if read is None:
        raise _not_recognized(root)
    listing = read(root, layout)
    if layout not in (None, listing.layout):
        raise DataError(f"{root} has the layout {listing.layout}, not {layout}", "Pass another folder or --layout")
    return listing


def is_dataset(root: Path) -> bool:
    """Whether a folder has one of the known layouts, complete or not."""
    return any(detect(root) for detect, _ in _FORMS) or bool(_cuhk03_kinds(root))


def _not_recognized(root: Path) -> DataError:
    """The error for a folder that is not a data set; names data sets one level below it or up to two above it."""
    children = [child for child in sorted(root.iterdir()) if child.is_dir()]
    below = [kind for child in children if is_dataset(child) for kind in _cuhk03_kinds(child).values() or [child]]
    nearby = below or [parent for parent in list(root.resolve().parents)[:2] if is_dataset(parent)]
    remedy = f"It must contain {TRAIN}, {QUERY} and {GALLERY}; docs/datasets.md shows other layouts"
    if nearby:
        remedy = f"Did you mean {' or '.join(map(str, nearby[:3]))}?"
    return DataError(f"{root} is not a data set with a known layout", remedy)


# --- Market-1501, and sets that share its form ---------------------------------------------------------------

# Up to nine digits: longer numbers are not labels and would overflow.
_MARKET_NAME = re.compile(r"(-1|\d{1,9})_c(\d{1,9})(?!\d)", re.ASCII)
# How the name of the folder (in lower case, without punctuation) and those of the training images start.
_MARKET_SETS = {
    "market1501": (r"market1501|market$", r"\d{4}_c\ds\d_\d{6}_\d\d"),
    "dukemtmc-reid": (r"duke(mtmc)?(reid)?$", r"\d{4}_c\d_f\d{7}"),
    "cuhk03-np-detected": (r"(cuhk03(np)?)?detected$", r"\d{4}_c[12]_\d+\."),
    "cuhk03-np-labeled": (r"(cuhk03(np)?)?labell?ed$", r"\d{4}_c[12]_\d+\."),
}
_MARKET_LAYOUTS = (*_MARKET_SETS, ANY_MARKET)


def _is_market(root: Path) -> bool:
    return (root / TRAIN).is_dir() or (root / GALLERY).is_dir()


def _read_market(root: Path, layout: str | None) -> Listing:
    missing = [name for name in (TRAIN, QUERY, GALLERY) if not (root / name).is_dir()]
    if missing:
        problem = f"{root} has no folder {', '.join(missing)}"
        raise DataError(problem, f"It must contain {TRAIN}, {QUERY} and {GALLERY}")
    train, query, gallery = (_read_market_folder(root / name) for name in (TRAIN, QUERY, GALLERY))
    known = layout if layout in _MARKET_LAYOUTS else _which_market_set(root, train)
    return Listing(root, known, train, query, gallery)


def _which_market_set(root: Path, train: Sequence[Record]) -> str:
    """Recognize a set by the form of its file names, and by the name of the folder or the size of the training set.

    The file names alone do not tell: other data sets, including the synthetic one, copy those of Market-1501.
    """
    folder = re.sub(r"[^a-z0-9]", "", root.name.lower())
    size = SplitSize(len({record.pid for record in train if record.pid > 0}), len(train))
    for layout, (folder_name, file_name) in _MARKET_SETS.items():
        if all(re.match(file_name, record.path.name) for record in train) and (
            re.match(folder_name, folder) or size == KNOWN_SETS[layout].train
        ):
            return layout
    return ANY_MARKET


def _read_market_folder(folder: Path) -> list[Record]:
    # Market-1501 contains Thumbs.db files, and macOS leaves ._NAME.jpg.
    paths = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )
    if not paths:
        raise DataError(f"{folder} contains no images", "Download or unpack the data set again")
    records = []
    for path in paths:
        match = _MARKET_NAME.match(path.name)
        if match is None:
            remedy = "Rename it to IDENTITY_cCAMERA..., such as 0002_c1s1_000451_03.jpg, or remove it"
            raise DataError(f"the name of {path} has no identity and camera", remedy)
        records.append(Record(path, int(match[1]), int(match[2])))
    return records


# --- the release of CUHK03, converted ------------------------------------------------------------------------

_CUHK03_NAME = re.compile(r"([1-9])_(\d{3,4})_([12])_\d{1,3}\.png", re.ASCII)
_PEOPLE_PER_PAIR = 10_000
"""More than any pair of cameras has; identity = pair * this + person."""


def _is_cuhk03_release(root: Path) -> bool:
    return root.name in ("images_detected", "images_labeled") and not _is_market(root)


def _read_cuhk03_release(root: Path, layout: str | None) -> Listing:
    """Read `splits_new_KIND.json` next to the folder, and the labels in the file names.

    The labels in the file are not used: it numbers training identities from 0, and test identities otherwise.
    """
    kind = root.name.removeprefix("images_")
    path = root.parent / f"splits_new_{kind}.json"
    text = _read_text(path)
    splits = []
    try:
        (content,) = json.loads(text)
        for split in ("train", "query", "gallery"):
            records = []
            for entry in content[split]:
                # A path of the machine that converted the release; a Windows path accepts both slashes.
                match = _CUHK03_NAME.fullmatch(PureWindowsPath(entry[0]).name)
                if match is None:
                    raise ValueError(entry)
                records.append(Record(root / match[0], int(match[1]) * _PEOPLE_PER_PAIR + int(match[2]), int(match[3])))
            _require_files(records, path)
            splits.append(sorted(records))
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        remedy = "Convert the release again with the script in docs/datasets.md"
        raise DataError(f"{path} does not list the images of the new protocol", remedy) from error
    return Listing(root, f"cuhk03-np-{kind}", *splits)


def _cuhk03_kinds(root: Path) -> dict[str, Path]:
    """The folders of the two kinds in `root`, by layout, in either form."""
    found: dict[str, Path] = {}
    for kind in ("detected", "labeled"):
        if _is_market(root / kind):
            found[f"cuhk03-np-{kind}"] = root / kind
        elif (root / f"images_{kind}").is_dir():
            found[f"cuhk03-np-{kind}"] = root / f"images_{kind}"
    return found


# --- MSMT17 --------------------------------------------------------------------------------------------------

_MSMT17_FOLDERS = {"msmt17-v1": ("train", "test"), "msmt17-v2": ("mask_train_v2", "mask_test_v2")}
_MSMT17_TRAIN_LISTS = ("list_train.txt", "list_val.txt")  # the published 32,621 images are those of both
_MSMT17_TEST_LISTS = ("list_query.txt", "list_gallery.txt")
_MSMT17_LINE = re.compile(r"((?:[^/]*/)*\d+_\d+_(\d{1,9})_[^/]*)\s+(\d{1,9})", re.ASCII)


def _is_msmt17(root: Path) -> bool:
    if any((root / name).is_file() for name in (*_MSMT17_TRAIN_LISTS, *_MSMT17_TEST_LISTS)):
        return True
    return (root / "mask_train_v2").is_dir() or (root.name.lower().startswith("msmt17") and (root / "train").is_dir())


def _read_msmt17(root: Path, layout: str | None) -> Listing:
    """Read the four lists.

    MSMT17 numbers training and test identities from 0 each, and 0 elsewhere means a distractor. Therefore training
    identities are shifted by one, and test identities follow the last training identity.
    """
    version = "msmt17-v2" if (root / "mask_train_v2").is_dir() else "msmt17-v1"
    train_folder, test_folder = (root / name for name in _MSMT17_FOLDERS[version])
    train = sorted(record for name in _MSMT17_TRAIN_LISTS for record in _read_msmt17_list(root / name, train_folder, 1))
    first_pid = 1 + max(record.pid for record in train)
    query, gallery = (_read_msmt17_list(root / name, test_folder, first_pid) for name in _MSMT17_TEST_LISTS)
    return Listing(root, version, train, query, gallery)


def _read_msmt17_list(path: Path, folder: Path, first_pid: int) -> list[Record]:
    lines = _read_text(path).splitlines()
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder", "Unpack the data set again")
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = _MSMT17_LINE.fullmatch(line.strip())
        # A downloaded name, joined to a folder, must stay inside of it on any operating system.
        if match is None or not {"..", ".", ""}.isdisjoint(match[1].split("/")) or set(match[1]) & set("\\:\0"):
            raise DataError(
                f"line {number} of {path} is not an image of the data set and an identity: {line[:80]!r}",
                "It must read like 0000/0000_000_01_0303morning_0015_0.jpg 0; download the list again",
            )
        records.append(Record(folder / match[1], first_pid + int(match[3]), int(match[2])))
    _require_files(records, path)
    return sorted(records)


# --- list files ----------------------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist", "docs/datasets.md shows which files a data set needs") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text file", "Download it again") from error


def _require_files(records: Sequence[Record], listed_in: Path) -> None:
    if not records:
        raise DataError(f"{listed_in} lists no images", "Download it again")
    missing = next((record.path for record in records if not record.path.is_file()), None)
    if missing:
        raise DataError(f"{listed_in} lists {missing}, which does not exist", "Unpack the data set again")


# How to tell whether a folder has a form, complete or not, and how to read it, given the layout that the user named.
_FORMS: tuple[tuple[Callable[[Path], bool], Callable[[Path, str | None], Listing]], ...] = (
    (_is_msmt17, _read_msmt17),
    (_is_cuhk03_release, _read_cuhk03_release),
    (_is_market, _read_market),
)
LAYOUTS = (*_MARKET_LAYOUTS, *_MSMT17_FOLDERS)
"""Names of the layouts; those of the known data sets are the keys of `KNOWN_SETS`."""
