"""What the public data sets hold when they are whole. docs/datasets.md says more of each."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from pmm_edge.errors import DataError, did_you_mean
from pmm_edge.images import IMAGE_SUFFIXES


@dataclass(frozen=True)
class Expected:
    """Figures of a split as papers count them."""

    identities: int
    """People; distractors are none."""
    images: int
    """With distractors, without junk."""


@dataclass(frozen=True)
class KnownSet:
    """The figures of a public data set, and where they stand."""

    title: str
    train: Expected
    query: Expected
    gallery: Expected
    source: str
    one_camera: int = 0
    """Test identities that one camera alone has seen, by the set's own description."""


_CUHK03_NP = "https://github.com/zhunzhong07/person-re-ranking/tree/master/CUHK03-NP"
_MSMT17 = "Wei et al., Person Transfer GAN to Bridge Domain Gap for Person Re-Identification, CVPR 2018"

KNOWN_SETS = {
    "market1501": KnownSet(
        "Market-1501",
        train=Expected(751, 12_936),
        query=Expected(750, 3_368),
        # Its readme counts 19,732 gallery images; 3,819 of them are junk.
        gallery=Expected(750, 15_913),
        source="readme.txt of the set; Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015",
    ),
    "dukemtmc-reid": KnownSet(
        "DukeMTMC-reID",
        train=Expected(702, 16_522),
        query=Expected(702, 2_228),
        gallery=Expected(1_110, 17_661),
        source="https://github.com/sxzrt/DukeMTMC-reID_evaluation",
        one_camera=408,
    ),
    "cuhk03-np-detected": KnownSet(
        "CUHK03-NP detected",
        train=Expected(767, 7_365),
        query=Expected(700, 1_400),
        gallery=Expected(700, 5_332),
        source=_CUHK03_NP,
    ),
    "cuhk03-np-labeled": KnownSet(
        "CUHK03-NP labeled",
        train=Expected(767, 7_368),
        query=Expected(700, 1_400),
        gallery=Expected(700, 5_328),
        source=_CUHK03_NP,
    ),
    "msmt17-v1": KnownSet(
        "MSMT17",
        train=Expected(1_041, 32_621),
        query=Expected(3_060, 11_659),
        gallery=Expected(3_060, 82_161),
        source=_MSMT17,
    ),
    "msmt17-v2": KnownSet(
        "MSMT17 V2",
        train=Expected(1_041, 32_621),
        query=Expected(3_060, 11_659),
        gallery=Expected(3_060, 82_161),
        source=_MSMT17 + "; the same images with faces masked",
    ),
}


ANY_MARKET = "market layout"
"""A folder in Market-1501's layout that is no set that is known by name."""

_TEXT_SHOWN = 80


class Record(NamedTuple):
    """An image file, the identity it shows and the camera that took it."""

    path: Path
    pid: int
    camid: int


class Files(NamedTuple):
    """The records of the three splits, each in the order of its paths."""

    train: list[Record]
    query: list[Record]
    gallery: list[Record]


def shown(text: str) -> str:
    """A stranger's text for a message: quoted, control characters escaped, cut to a bearable length."""
    return repr(text if len(text) <= _TEXT_SHOWN else text[:_TEXT_SHOWN] + "…")


def read_list(path: Path) -> str:
    """Read a list file.

    Raises:
        DataError: it is not there, or no UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist", "Fetch the data set's list files and put them there") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text file", "Fetch it again") from error


def require_files(folder: Path, names: Sequence[str], listed_in: Path) -> None:
    """Check that a list's files are there, with one look into each folder instead of one at each file.

    Args:
        folder: what the names are relative to.
        names: `FILE` or `FOLDER/FILE`, with forward slashes.
        listed_in: the list, for the message.

    Raises:
        DataError: some are not there.
    """
    present: dict[str, set[str]] = {}
    missing = []
    for name in names:
        inner, _, file = name.rpartition("/")
        if inner not in present:
            present[inner] = _names_in(folder / inner)
        if file not in present[inner]:
            missing.append(name)
    if missing:
        raise DataError(
            f"{len(missing):,} of {len(names):,} images that {listed_in} lists are not there, such as"
            f" {folder / missing[0]}",
            "Unpack the data set again",
        )


def _names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


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
MARKET_LAYOUTS = (*(signs.layout for signs in _SIGNS), ANY_MARKET)


def market_holds(root: Path) -> bool:
    """Whether a folder is meant to be in this layout, complete or not."""
    return any((root / folder).is_dir() for folder in (TRAIN, GALLERY))


def market_read(root: Path) -> Files:
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


def market_which(root: Path, files: Files) -> str:
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
    return [_market_record(path) for path in paths]


def _market_record(path: Path) -> Record:
    match = _LABELS.match(path.name)
    if match is None:
        raise DataError(
            f"the name of {path} does not say who it shows and which camera took it",
            "Name files IDENTITY_cCAMERA..., such as 0002_c1s1_000451_03.jpg, or remove this one",
        )
    return Record(path, int(match[1]), int(match[2]))


KINDS = {"cuhk03-np-detected": "detected", "cuhk03-np-labeled": "labeled"}

_NAME = re.compile(r"([1-9])_(\d{3,4})_([12])_\d{1,3}\.png", re.ASCII)
_PAIR = 10_000
"""Above the people of a camera pair; identity = pair * this + person."""


def cuhk03_holds(root: Path) -> bool:
    """Whether a folder holds the images of the release, and is named as the conversion names it."""
    return _kind(root) is not None and not market_holds(root)


def kinds_in(root: Path) -> dict[str, Path]:
    """The folders of the two kinds that `root` holds, by layout; of either form."""
    found: dict[str, Path] = {}
    for layout, kind in KINDS.items():
        if market_holds(root / kind):
            found[layout] = root / kind
        elif (root / f"images_{kind}").is_dir():
            found[layout] = root / f"images_{kind}"
    return found


def refuse_unconverted(root: Path) -> None:
    """Refuse the release as it is downloaded.

    Raises:
        DataError: `root` holds the MATLAB files alone.
    """
    signs = ("cuhk-03.mat", "cuhk03_release", *(f"cuhk03_new_protocol_config_{kind}.mat" for kind in KINDS.values()))
    if any((root / sign).exists() for sign in signs):
        raise DataError(
            f"{root} holds CUHK03 as MATLAB files, which are not read",
            "Take the images of CUHK03-NP (detected/, labeled/), or convert them with the script in docs/datasets.md",
        )


def cuhk03_layout(root: Path) -> str:
    """The layout's name, by the folder's."""
    return f"cuhk03-np-{_kind(root)}"


def cuhk03_read(root: Path) -> Files:
    """Read the split of the new protocol and the labels in the file names; no image is opened.

    The split's own labels are not used: it numbers the people of training from 0, and those of testing otherwise.

    Args:
        root: `images_detected` or `images_labeled`, with the split beside it.

    Raises:
        DataError: the split is missing or of another form, or an image that it lists is not there.
    """
    path = root.parent / f"splits_new_{_kind(root)}.json"
    if not path.exists():
        refuse_unconverted(root.parent)
    names = _split(path)
    for listed in names.values():
        require_files(root, listed, path)
    return Files(**{split: sorted(_cuhk03_record(root, name) for name in listed) for split, listed in names.items()})


def _kind(root: Path) -> str | None:
    return next((kind for kind in KINDS.values() if root.name == f"images_{kind}"), None)


def _split(path: Path) -> dict[str, list[str]]:
    """The file names of each split, without the folders that they had where the split was written."""
    text = read_list(path)
    try:
        (content,) = json.loads(text)
        # Of Windows' kind, because it takes both slashes as separators.
        names = {split: [PureWindowsPath(entry[0]).name for entry in content[split]] for split in Files._fields}
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} is no split of the new protocol", "Convert the release again with the script in docs/datasets.md"
        ) from error
    for split, listed in names.items():
        wrong = next((name for name in listed if not _NAME.fullmatch(name)), None)
        if wrong is not None or not listed:
            reason = f"lists {shown(wrong)}" if wrong is not None else "lists no images"
            raise DataError(f"{split} of {path} {reason}", "It must list images such as 1_001_1_01.png")
    return names


def _cuhk03_record(root: Path, name: str) -> Record:
    match = _NAME.fullmatch(name)
    assert match is not None  # _split has seen to it
    return Record(root / name, int(match[1]) * _PAIR + int(match[2]), int(match[3]))


_FOLDERS = {"msmt17-v1": ("train", "test"), "msmt17-v2": ("mask_train_v2", "mask_test_v2")}
MSMT17_LAYOUTS = tuple(_FOLDERS)

# The published count of 32,621 training images is that of both lists together.
_TRAIN_LISTS = ("list_train.txt", "list_val.txt")
_QUERY_LIST, _GALLERY_LIST = "list_query.txt", "list_gallery.txt"

_CAMERA = re.compile(r"\d+_\d+_(\d{1,9})_", re.ASCII)
_PID = re.compile(r"\d{1,9}", re.ASCII)


def msmt17_holds(root: Path) -> bool:
    """Whether a folder is meant to be in this layout, complete or not."""
    if any((root / name).is_file() for name in (*_TRAIN_LISTS, _QUERY_LIST, _GALLERY_LIST)):
        return True
    named_so = root.name.lower().startswith("msmt17") and (root / "train").is_dir()
    return named_so or (root / "mask_train_v2").is_dir()


def msmt17_version(root: Path) -> str:
    """The layout's name, by the names of the image folders."""
    return "msmt17-v2" if (root / "mask_train_v2").is_dir() else "msmt17-v1"


def msmt17_read(root: Path) -> Files:
    """Read the four lists; no image is opened.

    Training is `list_train.txt` and `list_val.txt` together. MSMT17 numbers the people of training and those of
    testing from 0 each, where 0 elsewhere means a distractor; so numbers go up by one, and those of testing go on
    from those of training: different people have different numbers.

    Raises:
        DataError: a list or folder is missing, a line does not parse or leads out of its folder, an image that is
            listed is not there.
    """
    train_folder, test_folder = (root / name for name in _FOLDERS[msmt17_version(root)])
    train = [record for name in _TRAIN_LISTS for record in _read(root / name, train_folder, first_pid=1)]
    first_pid = max(record.pid for record in train) + 1
    query, gallery = (_read(root / name, test_folder, first_pid) for name in (_QUERY_LIST, _GALLERY_LIST))
    return Files(sorted(train), query, gallery)


def _read(path: Path, folder: Path, first_pid: int) -> list[Record]:
    lines = read_list(path).splitlines()
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder", "Unpack the data set again")
    labelled = [_parse(line, f"line {number} of {path}") for number, line in enumerate(lines, 1) if line.strip()]
    if not labelled:
        raise DataError(f"{path} lists no images", "Fetch it again")
    require_files(folder, [name for name, _, _ in labelled], path)
    return sorted(Record(folder / name, first_pid + pid, camid) for name, pid, camid in labelled)


def _parse(line: str, where: str) -> tuple[str, int, int]:
    """Split a line into the image's relative name, its identity as written, and its camera."""
    name, pid = [*line.rsplit(maxsplit=1), ""][:2]
    if _leads_out(name):
        raise DataError(f"{where} names {shown(name)}, which is no file inside of the data set", "Fetch the list again")
    camera = _CAMERA.match(name.rpartition("/")[2])
    if camera is None or not _PID.fullmatch(pid):
        raise DataError(
            f"{where} is no image and identity: {shown(line)}",
            "It must read like 0000/0000_000_01_0303morning_0015_0.jpg 0",
        )
    return name, int(pid), int(camera[1])


def _leads_out(name: str) -> bool:
    """Whether a stranger's file name, joined to a folder, could name a file outside of it, on any system."""
    return not {"..", ".", ""}.isdisjoint(name.split("/")) or any(sign in name for sign in "\\:\0")


__all__ = ["ANY_MARKET", "KNOWN_SETS", "LAYOUTS", "Expected", "Files", "Found", "KnownSet", "Record", "find"]

LAYOUTS = (*MARKET_LAYOUTS, *MSMT17_LAYOUTS)

_SUGGESTIONS = 3


@dataclass(frozen=True)
class Found:
    """A data set's files, the folder they were found in, and its layout's name, one of `LAYOUTS`."""

    root: Path
    layout: str
    files: Files


def find(root: Path, layout: str | None = None) -> Found:
    """Recognise a data set and list its files; no image is opened.

    Args:
        root: the data set's folder.
        layout: one of `LAYOUTS` where it is known. It says which of CUHK03-NP's two kinds is meant, and which set
            a folder in Market-1501's layout is.

    Raises:
        DataError: no data set is there, it is another than `layout` says, or its files are not as they should be.
    """
    if not root.is_dir():
        raise DataError(f"{root} is no folder", "Name the folder that holds bounding_box_train/, or run pmm synth")
    if root.name in ("", ".."):  # layouts are told apart by folder names as well, and . has none
        root = root.resolve()
    named = _checked_name(layout) if layout is not None else None
    if not market_holds(root):
        root = _one_kind(root, named)
    if msmt17_holds(root):
        found = Found(root, msmt17_version(root), msmt17_read(root))
    elif cuhk03_holds(root):
        found = Found(root, cuhk03_layout(root), cuhk03_read(root))
    elif market_holds(root):
        files = market_read(root)
        found = Found(root, named if named in MARKET_LAYOUTS else market_which(root, files), files)
    else:
        refuse_unconverted(root)
        raise _not_recognised(root)
    if named is not None and found.layout != named:
        raise DataError(f"{root} is in the layout of {found.layout}, not of {named}", "Name another folder or layout")
    return found


def _checked_name(layout: str) -> str:
    """A layout's name; a hyphen may stand for the space in `market layout`, which is easier to type in a shell."""
    by_spelling = {spelling: name for name in LAYOUTS for spelling in (name, name.replace(" ", "-"))}
    if layout in by_spelling:
        return by_spelling[layout]
    names = ", ".join(name.replace(" ", "-") for name in LAYOUTS)
    raise DataError(f"there is no layout {layout}", f"{did_you_mean(layout, by_spelling)}Choose one of {names}")


def _one_kind(root: Path, named: str | None) -> Path:
    """Go down from CUHK03-NP's folder to the kind that is named.

    Raises:
        DataError: it holds both, and none is named.
    """
    kinds = kinds_in(root)
    if named in kinds:
        return kinds[named]
    if len(kinds) > 1:
        raise DataError(
            f"{root} holds CUHK03-NP twice, with detected and with labeled boxes",
            f"Name {' or '.join(map(str, kinds.values()))}",
        )
    return root


def _not_recognised(root: Path) -> DataError:
    meant = _nearby(root)
    if meant:
        remedy = f"Did you mean {' or '.join(map(str, meant[:_SUGGESTIONS]))}?"
    else:
        remedy = f"It must hold {TRAIN}, {QUERY}, {GALLERY}; docs/datasets.md shows other layouts"
    return DataError(f"{root} is not in the layout of Market-1501 or of another set that is known", remedy)


def _nearby(root: Path) -> list[Path]:
    """Data sets one level below `root`, otherwise up to two above it."""
    children = [child for child in sorted(root.iterdir()) if child.is_dir()]
    below = [inner for child in children for inner in (kinds_in(child).values() or [child]) if _holds(inner)]
    return below or [parent for parent in list(root.resolve().parents)[:2] if _holds(parent)]


def _holds(root: Path) -> bool:
    return msmt17_holds(root) or cuhk03_holds(root) or market_holds(root)
