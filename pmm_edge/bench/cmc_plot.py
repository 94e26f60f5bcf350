"""The CMC as a picture: the share of queries with a match among the first k, over k."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pmm_edge.bench.parity import Row
from pmm_edge.errors import OutputError
from pmm_edge.files import check_output, written_whole

SUFFIXES = (".png", ".svg")
RANKS = 50

_STYLES = ("-", "--", "-.", ":")  # lines that lie on each other, or are printed in grey, stay apart


def check_cmc_plot(path: Path) -> None:
    """Refuse, before the evaluation, a plot that could not be written after it.

    Raises:
        OutputError: matplotlib is missing, the name is that of no PNG or SVG file, or its folder cannot be written.
    """
    check_output(path, SUFFIXES)
    try:
        import matplotlib.figure  # noqa: F401  an edge box has none, and needs none but here
    except ModuleNotFoundError as error:
        raise OutputError(f"cannot draw {path}: matplotlib is missing", "pip install 'pmm-edge[train]'") from error


def save_cmc_plot(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Draw a line for each row, ranks 1 to 50, into a PNG or SVG file.

    Raises:
        OutputError: see `check_cmc_plot`; or the disk is full.
    """
    check_cmc_plot(path)
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure and looks for a display

    figure = Figure(figsize=(7, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for number, row in enumerate(rows):
        curve = 100 * row.result.cmc[:RANKS]
        label = f"{row.name}: Rank-1 {curve[0]:.1f}, mAP {100 * row.result.mAP:.1f}"
        axes.plot(range(1, len(curve) + 1), curve, _STYLES[number % len(_STYLES)], label=label)
    axes.set_title(title, parse_math=False)
    axes.set_xlabel("rank k")
    axes.set_ylabel("queries with a match among the first k (%)")
    axes.set_xlim(1, RANKS)
    axes.set_xticks([1, *range(5, RANKS + 1, 5)])
    axes.set_ylim(top=100.5)  # the bottom follows the data
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    with written_whole(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower())
