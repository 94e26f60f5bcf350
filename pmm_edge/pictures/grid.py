"""Pictures in rows and columns with captions, drawn by matplotlib without global state."""

import textwrap
import warnings
from collections.abc import Sequence
from math import ceil
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pmm_edge.console import printable

MARGIN, GAP, WIDE_GAP = 20, 10, 30
RIGHT, WRONG, INK, FAINT = "#0a7d33", "#c8102e", "#1a1a1a", "#5c5c5c"
TITLE, HEAD, CAPTION = 20, 15, 12
"""Text sizes in pixels."""
MIN_HEIGHT, MIN_WIDTH = 256, 560
"""Of a picture, and of the grid, in pixels."""
DPI = 100


class Cell(NamedTuple):
    """A picture with a caption below it; lines that are wider than the picture are shortened in the middle.

    `right` True draws a solid green frame and a tick, False a dashed red frame and a cross, None neither.
    """

    picture: Image.Image
    caption: str = ""
    right: bool | None = None


def grid(
    rows: Sequence[Sequence[Cell]],
    heads: Sequence[str] = (),
    *,
    title: str = "",
    note: str = "",
    wide_before: Sequence[int] = (),
) -> Image.Image:
    """Lay out pictures; a column is as wide as its widest picture, a row as high as its highest.

    Rows may differ in length. `heads` are titles of the columns, `note` is a paragraph below the pictures, and the
    columns `wide_before` have a wider gap on their left.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = range(max(map(len, rows)))
    widths = [max(cell.picture.width for row in rows for cell in row[column : column + 1]) for column in columns]
    gaps = [WIDE_GAP if column in wide_before else GAP for column in columns]
    lefts = [MARGIN + sum(widths[:column]) + sum(gaps[1 : column + 1]) for column in columns]
    width = max(lefts[-1] + widths[-1] + MARGIN, MIN_WIDTH)
    titles, under = (
        textwrap.wrap(printable(text), _characters(size, width - 2 * MARGIN))
        for text, size in ((title, TITLE), (note, CAPTION))
    )
    head_lines = max((head.count("\n") + 1 for head in heads), default=0)
    tops = [MARGIN + len(titles) * _line(TITLE) + head_lines * _line(HEAD) + GAP]
    for row in rows:
        lines = [cell.caption.count("\n") + 1 if cell.caption else 0 for cell in row]
        below = [count and count * _line(CAPTION) + 4 for count in lines]
        tops.append(tops[-1] + max(cell.picture.height + room for cell, room in zip(row, below, strict=True)) + GAP)
    height = tops[-1] + len(under) * _line(CAPTION) + MARGIN

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")

    def write(lines: Sequence[str], x: float, y: float, size: int, color: str) -> None:
        for number, line in enumerate(lines):
            text: dict[str, Any] = {"va": "top", "size": size * 72 / DPI, "color": color, "parse_math": False}
            figure.text(x / width, 1 - (y + number * _line(size)) / height, line, **text)

    write(titles, MARGIN, MARGIN, TITLE, INK)
    for head, left, room in zip(heads, lefts, widths, strict=False):
        write(_fit(head, HEAD, room), left, tops[0] - GAP - head_lines * _line(HEAD), HEAD, INK)
    for row, y in zip(rows, tops, strict=False):
        for cell, left, room in zip(row, lefts, widths, strict=False):
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


def _line(size: int) -> int:
    return round(1.35 * size)


def _characters(size: int, room: int) -> int:
    return max(3, int(room / (0.57 * size)))  # average width of DejaVu Sans, the font that matplotlib ships


def _fit(text: str, size: int, room: int) -> list[str]:
    most = _characters(size, room)
    lines = [printable(line) for line in text.split("\n")]
    return [x if len(x) <= most else f"{x[: most // 2]}…{x[len(x) - (most - 1) // 2 :]}" for x in lines]
