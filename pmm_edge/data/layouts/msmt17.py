"""MSMT17's layout: a folder for each identity, and lists that say what is in which split.

    MSMT17_V1/train/0000/0000_000_01_0303morning_0015_0.jpg    camera 1
    MSMT17_V1/test/
    MSMT17_V1/list_train.txt, list_val.txt                     relative to train/
    MSMT17_V1/list_query.txt, list_gallery.txt                 relative to test/

    Each line of a list: 0000/0000_000_01_0303morning_0015_0.jpg 0

V2, the version with masked faces, calls its folders mask_train_v2 and mask_test_v2.
"""

from __future__ import annotations

import re
from pathlib import Path

from pmm_edge.data.layouts.records import Files, Record, read_list, require_files, shown
from pmm_edge.errors import DataError

_FOLDERS = {"msmt17-v1": ("train", "test"), "msmt17-v2": ("mask_train_v2", "mask_test_v2")}
LAYOUTS = tuple(_FOLDERS)

# The published count of 32,621 training images is that of both lists together.
_TRAIN_LISTS = ("list_train.txt", "list_val.txt")
_QUERY_LIST, _GALLERY_LIST = "list_query.txt", "list_gallery.txt"

_CAMERA = re.compile(r"\d+_\d+_(\d{1,9})_", re.ASCII)
_PID = re.compile(r"\d{1,9}", re.ASCII)


def holds(root: Path) -> bool:
    """Whether a folder is meant to be in this layout, complete or not."""
    if any((root / name).is_file() for name in (*_TRAIN_LISTS, _QUERY_LIST, _GALLERY_LIST)):
        return True
    named_so = root.name.lower().startswith("msmt17") and (root / "train").is_dir()
    return named_so or (root / "mask_train_v2").is_dir()


def version(root: Path) -> str:
    """The layout's name, by the names of the image folders."""
    return "msmt17-v2" if (root / "mask_train_v2").is_dir() else "msmt17-v1"


def read(root: Path) -> Files:
    """Read the four lists; no image is opened.

    Training is `list_train.txt` and `list_val.txt` together. MSMT17 numbers the people of training and those of
    testing from 0 each, where 0 elsewhere means a distractor; so numbers go up by one, and those of testing go on
    from those of training: different people have different numbers.

    Raises:
        DataError: a list or folder is missing, a line does not parse or leads out of its folder, an image that is
            listed is not there.
    """
    train_folder, test_folder = (root / name for name in _FOLDERS[version(root)])
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
