"""Pictures in rows and columns with captions, drawn by matplotlib without global state."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from PIL import Image

MARGIN, GAP, WIDE_GAP = 20, 10, 30
RIGHT, WRONG, INK, FAINT = "#0a7d33", "#c8102e", "#1a1a1a", "#5c5c5c"
TITLE, HEAD, CAPTION = 20, 15, 12
"""Text sizes in pixels."""
MIN_HEIGHT, MIN_WIDTH = 256, 560
"""Of a picture, and of the grid, in pixels."""
DPI = 100


@dataclass(frozen=True, eq=False)
class Cell:
    """A picture with a caption below it."""

    picture: Image.Image
    caption: str = ""
    """Lines; a line that is wider than the picture is shortened in the middle."""
    right: bool | None = None
    """True draws a solid green frame and a tick, False a dashed red frame and a cross, None neither."""


def grid(
    rows: Sequence[Sequence[Cell | None]],
    heads: Sequence[str] = (),
    *,
    title: str = "",
    notes: Sequence[str] = (),
    wide_before: Sequence[int] = (),
) -> Image.Image:
    """Lay out pictures; a column is as wide as its widest picture, a row as high as its highest.

    In `rows`, None leaves a place empty, and rows may differ in length. `heads` are titles of the columns, `notes`
    paragraphs below the pictures, `wide_before` the columns with a wider gap on their left.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = range(max(map(len, rows)))
    widths = [max((cell.picture.width for row in rows for cell in row[c : c + 1] if cell), default=0) for c in columns]
    gaps = [WIDE_GAP if column in wide_before else GAP for column in columns]
    lefts = [MARGIN + sum(widths[:column]) + sum(gaps[1 : column + 1]) for column in columns]
    width = max(lefts[-1] + widths[-1] + MARGIN, MIN_WIDTH)
    titles, under = _wrap([title], TITLE, width), _wrap(notes, CAPTION, width)
    head_lines = max((head.count("\n") + 1 for head in heads), default=0)
    top = MARGIN + len(titles) * _line(TITLE) + head_lines * _line(HEAD) + GAP
    tops = [top]
    for row in rows:
        tops.append(tops[-1] + max((_height(cell) for cell in row if cell), default=0) + GAP)
    height = tops[-1] + len(under) * _line(CAPTION) + MARGIN

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")

    def write(lines: Sequence[str], x: float, y: float, size: int, color: str) -> None:
        for number, line in enumerate(lines):
            text: dict[str, Any] = {"va": "top", "size": size * 72 / DPI, "color": color, "parse_math": False}
            figure.text(x / width, 1 - (y + number * _line(size)) / height, line, **text)

    write(titles, MARGIN, MARGIN, TITLE, INK)
    for head, left, room in zip(heads, lefts, widths, strict=False):
        write(_fit(head, HEAD, room), left, top - GAP - head_lines * _line(HEAD), HEAD, INK)
    for row, y in zip(rows, tops, strict=False):
        for cell, left, room in zip(row, lefts, widths, strict=False):
            if cell is None:
                continue
            wide, high = cell.picture.size
            axes = figure.add_axes((left / width, 1 - (y + high) / height, wide / width, high / height))
            axes.imshow(np.asarray(cell.picture.convert("RGB")), interpolation="nearest", aspect="auto")
            axes.set_xticks([]), axes.set_yticks([])
            color = {True: RIGHT, False: WRONG, None: "none"}[cell.right]
            for spine in axes.spines.values():
                spine.set(color=color, linewidth=4, linestyle="-" if cell.right else (0, (3, 2)))
            if cell.right is not None:
                mark: dict[str, Any] = {"ha": "right", "va": "top", "color": "white", "weight": "bold", "size": CAPTION}
                box = {"facecolor": color, "edgecolor": "white", "boxstyle": "circle" if cell.right else "square"}
                axes.text(0.95, 0.97, "✓" if cell.right else "✗", transform=axes.transAxes, bbox=box, **mark)
            write(_fit(cell.caption, CAPTION, room), left, y + high + 4, CAPTION, INK)
    write(under, MARGIN, tops[-1], CAPTION, FAINT)
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a file name in a script that the font lacks
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def enlargement(height: int) -> int:
    """Factor by which a picture must be enlarged to be readable; whole, so that blocks end on pixels."""
    return max(1, ceil(MIN_HEIGHT / height))


def enlarged(picture: Image.Image) -> Image.Image:
    """A copy of a picture, enlarged by `enlargement`."""
    factor = enlargement(picture.height)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)


def _line(size: int) -> int:
    return round(1.35 * size)


def _height(cell: Cell) -> int:
    return cell.picture.height + (_line(CAPTION) * (cell.caption.count("\n") + 1) + 4 if cell.caption else 0)


def _characters(size: int, room: int) -> int:
    return max(3, int(room / (0.57 * size)))  # average width of DejaVu Sans, the font that matplotlib ships


def _fit(text: str, size: int, room: int) -> list[str]:
    most = _characters(size, room)
    lines = ["".join(char if char.isprintable() else "?" for char in line) for line in text.split("\n")]
    return [x if len(x) <= most else f"{x[: most // 2]}…{x[len(x) - (most - 1) // 2 :]}" for x in lines]


def _wrap(paragraphs: Sequence[str], size: int, width: int) -> list[str]:
    most = _characters(size, width - 2 * MARGIN)
    return [line for text in paragraphs for line in textwrap.wrap(text, most)]
