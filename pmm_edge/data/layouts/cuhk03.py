"""CUHK03 under the new protocol (CUHK03-NP): 767 people to train, 700 to test; boxes detected or labeled by hand.

Two forms are read. The published images are in Market-1501's layout, twice:

    CUHK03-NP/detected/bounding_box_train/0001_c1_1.png
    CUHK03-NP/labeled/

The original release is one MATLAB file, with the protocol's split in two more. They need h5py and scipy, so what
torchreid and fast-reid make of them, and the script in docs/datasets.md as well, is read instead:

    cuhk03/images_detected/1_001_1_01.png    camera pair 1, person 1 of it, view 1, image 1
    cuhk03/splits_new_detected.json          [{"train": [[path, pid, camid], ...], "query": ..., "gallery": ...}]
    cuhk03/images_labeled/, cuhk03/splits_new_labeled.json

Protocol: Zhong et al., Re-ranking Person Re-identification with k-reciprocal Encoding, CVPR 2017.
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PureWindowsPath

from pmm_edge.data.layouts import market
from pmm_edge.data.layouts.records import Files, Record, read_list, require_files, shown
from pmm_edge.errors import DataError

KINDS = {"cuhk03-np-detected": "detected", "cuhk03-np-labeled": "labeled"}

_NAME = re.compile(r"([1-9])_(\d{3,4})_([12])_\d{1,3}\.png", re.ASCII)
_PAIR = 10_000
"""Above the people of a camera pair; identity = pair * this + person."""


def holds(root: Path) -> bool:
    """Whether a folder holds the images of the release, and is named as the conversion names it."""
    return _kind(root) is not None and not market.holds(root)


def kinds_in(root: Path) -> dict[str, Path]:
    """The folders of the two kinds that `root` holds, by layout; of either form."""
    found: dict[str, Path] = {}
    for layout, kind in KINDS.items():
        if market.holds(root / kind):
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


def layout(root: Path) -> str:
    """The layout's name, by the folder's."""
    return f"cuhk03-np-{_kind(root)}"


def read(root: Path) -> Files:
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
    return Files(**{split: sorted(_record(root, name) for name in listed) for split, listed in names.items()})


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


def _record(root: Path, name: str) -> Record:
    match = _NAME.fullmatch(name)
    assert match is not None  # _split has seen to it
    return Record(root / name, int(match[1]) * _PAIR + int(match[2]), int(match[3]))
