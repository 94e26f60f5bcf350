"""The layouts that data sets have on disk, recognised or named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pmm_edge.data.layouts import cuhk03, market, msmt17
from pmm_edge.data.layouts.known import KNOWN_SETS, Expected, KnownSet
from pmm_edge.data.layouts.records import ANY_MARKET, Files, Record
from pmm_edge.errors import DataError, did_you_mean

__all__ = ["ANY_MARKET", "KNOWN_SETS", "LAYOUTS", "Expected", "Files", "Found", "KnownSet", "Record", "find"]

LAYOUTS = (*market.LAYOUTS, *msmt17.LAYOUTS)

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
    if not market.holds(root):
        root = _one_kind(root, named)
    if msmt17.holds(root):
        found = Found(root, msmt17.version(root), msmt17.read(root))
    elif cuhk03.holds(root):
        found = Found(root, cuhk03.layout(root), cuhk03.read(root))
    elif market.holds(root):
        files = market.read(root)
        found = Found(root, named if named in market.LAYOUTS else market.which(root, files), files)
    else:
        cuhk03.refuse_unconverted(root)
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
    kinds = cuhk03.kinds_in(root)
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
        remedy = f"It must hold {market.TRAIN}, {market.QUERY}, {market.GALLERY}; docs/datasets.md shows other layouts"
    return DataError(f"{root} is not in the layout of Market-1501 or of another set that is known", remedy)


def _nearby(root: Path) -> list[Path]:
    """Data sets one level below `root`, otherwise up to two above it."""
    children = [child for child in sorted(root.iterdir()) if child.is_dir()]
    below = [inner for child in children for inner in (cuhk03.kinds_in(child).values() or [child]) if _holds(inner)]
    return below or [parent for parent in list(root.resolve().parents)[:2] if _holds(parent)]


def _holds(root: Path) -> bool:
    return msmt17.holds(root) or cuhk03.holds(root) or market.holds(root)
