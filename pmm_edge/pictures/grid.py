"""Pictures in rows and columns with captions, drawn with Pillow alone: no plotting library, no font on the system."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from PIL import Image, ImageDraw, ImageFont

MARGIN, GAP, WIDE_GAP = 20, 10, 30
FRAME = 5
"""Width of a right or wrong hit's frame."""
INK, FAINT, PAPER = "#1a1a1a", "#5c5c5c", "#ffffff"
RIGHT, WRONG = "#0a7d33", "#c8102e"
_DASH, _DASH_GAP = 14, 9
_BADGE = 24
_TITLE, _HEAD, _CAPTION = 24, 18, 15
"""Sizes of the text in pixels."""
_LEAST_HEIGHT, _LEAST_WIDTH = 256, 560
"""Of a picture, and of the grid."""

Box = tuple[int, int, int, int]
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, eq=False)
class Cell:
    """A picture with what is written under it."""

    picture: Image.Image
    caption: str = ""
    """Lines; one that is wider than its column is shortened in the middle."""
    right: bool | None = None
    """True frames it solid green with a tick, False dashed red with a cross; None leaves it as it is."""


def grid(
    rows: Sequence[Sequence[Cell | None]],
    heads: Sequence[str] = (),
    *,
    title: str = "",
    notes: Sequence[str] = (),
    wide_before: Sequence[int] = (),
) -> Image.Image:
    """Lay out pictures; a column is as wide as its widest picture, a row as high as its highest.

    Args:
        rows: None leaves a place empty; rows may differ in length.
        heads: above the columns.
        notes: paragraphs under the pictures, wrapped.
        wide_before: columns that stand apart from the one before.
    """
    columns = max(map(len, rows))
    widths = [
        max((cell.picture.width for row in rows for cell in row[c : c + 1] if cell), default=0) for c in range(columns)
    ]
    lefts = _starts(widths, wide_before)
    width = max(lefts[-1] + widths[-1] + MARGIN, _LEAST_WIDTH)
    titles = _wrapped(title, _font(_TITLE), width - 2 * MARGIN)
    under = [line for note in notes for line in _wrapped(note, _font(_CAPTION), width - 2 * MARGIN)]
    top = MARGIN + len(titles) * _line(_TITLE) + (GAP if titles else 0)
    heads_top = top
    if heads:
        top += max(head.count("\n") + 1 for head in heads) * _line(_HEAD) + GAP // 2
    tops, bottom = [], top
    for row in rows:
        tops.append(bottom)
        bottom += max(map(_height, filter(None, row)), default=0) + GAP
    sheet = Image.new("RGB", (width, bottom + len(under) * _line(_CAPTION) + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, (MARGIN, MARGIN), titles, _TITLE, INK)
    for head, left, room in zip(heads, lefts, widths, strict=False):
        _write(draw, (left, heads_top), [_fitted(line, _font(_HEAD), room) for line in head.split("\n")], _HEAD, INK)
    for row, y in zip(rows, tops, strict=True):
        for cell, left, room in zip(row, lefts, widths, strict=False):
            if cell:
                _place(sheet, draw, cell, (left, y), room)
    _write(draw, (MARGIN, bottom), under, _CAPTION, FAINT)
    return sheet


def enlargement(height: int) -> int:
    """How many times as large a picture of this height must be to look at; whole, so that blocks end on pixels."""
    return max(1, ceil(_LEAST_HEIGHT / height))


def enlarged(picture: Image.Image) -> Image.Image:
    """A picture a whole number of times as large."""
    factor = enlargement(picture.height)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)


def _starts(widths: Sequence[int], wide_before: Sequence[int]) -> list[int]:
    left, lefts = MARGIN, []
    for column, width in enumerate(widths):
        left += WIDE_GAP - GAP if column in wide_before else 0
        lefts.append(left)
        left += width + GAP
    return lefts


def _height(cell: Cell) -> int:
    return cell.picture.height + (_line(_CAPTION) * (cell.caption.count("\n") + 1) + 4 if cell.caption else 0)


def _place(sheet: Image.Image, draw: ImageDraw.ImageDraw, cell: Cell, corner: tuple[int, int], room: int) -> None:
    x, y = corner
    sheet.paste(cell.picture, corner)
    if cell.right is not None:
        box = (x, y, x + cell.picture.width - 1, y + cell.picture.height - 1)
        (_solid_frame if cell.right else _dashed_frame)(draw, box)
        (_tick if cell.right else _cross)(draw, (box[2] - _BADGE, y + 1))
    if cell.caption:
        lines = [_fitted(line, _font(_CAPTION), room) for line in cell.caption.split("\n")]
        _write(draw, (x, y + cell.picture.height + 4), lines, _CAPTION, INK)


def _solid_frame(draw: ImageDraw.ImageDraw, box: Box) -> None:
    draw.rectangle(box, outline=RIGHT, width=FRAME)


def _dashed_frame(draw: ImageDraw.ImageDraw, box: Box) -> None:
    left, top, right, bottom = box
    draw.rectangle(box, outline=PAPER, width=FRAME)
    for x in range(left, right, _DASH + _DASH_GAP):
        for y in (top, bottom - FRAME + 1):
            draw.rectangle((x, y, min(x + _DASH, right), y + FRAME - 1), fill=WRONG)
    for y in range(top, bottom, _DASH + _DASH_GAP):
        for x in (left, right - FRAME + 1):
            draw.rectangle((x, y, x + FRAME - 1, min(y + _DASH, bottom)), fill=WRONG)


def _tick(draw: ImageDraw.ImageDraw, corner: tuple[int, int]) -> None:
    x, y = corner
    draw.ellipse((x, y, x + _BADGE - 1, y + _BADGE - 1), fill=RIGHT, outline=PAPER, width=2)
    draw.line([(x + 6, y + 12), (x + 10, y + 16), (x + 17, y + 8)], fill=PAPER, width=3, joint="curve")


def _cross(draw: ImageDraw.ImageDraw, corner: tuple[int, int]) -> None:
    x, y = corner
    draw.rectangle((x, y, x + _BADGE - 1, y + _BADGE - 1), fill=WRONG, outline=PAPER, width=2)
    draw.line([(x + 7, y + 7), (x + 16, y + 16)], fill=PAPER, width=3)
    draw.line([(x + 16, y + 7), (x + 7, y + 16)], fill=PAPER, width=3)


def _font(size: int) -> _Font:
    return ImageFont.load_default(size)


def _line(size: int) -> int:
    return round(size * 1.35)


def _write(draw: ImageDraw.ImageDraw, corner: tuple[int, int], lines: Sequence[str], size: int, ink: str) -> None:
    x, y = corner
    for line in lines:
        draw.text((x, y), _drawable(line), fill=ink, font=_font(size))
        y += _line(size)


def _drawable(text: str) -> str:
    """Pillow's own font has no letters beyond ASCII but these; a file's name may have any."""
    return "".join(c if c.isprintable() and (c.isascii() or c in "·…") else "?" for c in text)


def _fitted(text: str, font: _Font, width: int) -> str:
    text, kept = _drawable(text), len(text)
    fitted = text
    while font.getlength(fitted) > width and kept > 2:
        kept -= 1
        fitted = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
    return fitted


def _wrapped(text: str, font: _Font, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(_drawable(f"{lines[-1]} {word}")) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return [_fitted(line, font, width) for line in lines]
