"""Charts of a bench report as SVG, and the CMC plot of `pmm eval --cmc`. They need matplotlib (extra `train`)."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pmm_edge.bench.report import BenchReport
from pmm_edge.bench.tables import fastest, named
from pmm_edge.errors import OutputError, install
from pmm_edge.files import check_output, written_whole

COLORS = ("#3b4149", "#0068b3", "#c44601", "#00795a", "#a63d86", "#8a6100", "#2b8cbe", "#6a51a3")
DARK_COLORS = ("#ccd2da", "#56b4e9", "#ff8f4a", "#2cc596", "#e08ac4", "#e6b93c", "#8fd0f5", "#b9a5f0")
_TEXT, _GRID = "#565d68", "#e7eaef"
_VARIABLES = {_TEXT: "var(--soft)", _GRID: "var(--grid)"} | {c: f"var(--s{n})" for n, c in enumerate(COLORS)}
"""The page's CSS variables replace colors in the SVG, so that charts follow the light or dark scheme."""
_LOOKS = (("color", COLORS), ("linestyle", ("-", "--", ":", "-.", (0, (8, 2)))), ("marker", "os^DvPp"))
"""A model looks the same in all charts, and color is never the only difference."""
_COLORED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
_STYLE: dict[Any, Any] = dict.fromkeys(_COLORED, _TEXT) | {"axes.spines.top": False, "axes.spines.right": False}
_STYLE |= {"font.size": 11, "text.parse_math": False, "axes.grid": True, "grid.color": _GRID, "axes.axisbelow": True}
MIN_DISTANCE = 1e-12
"""Cosine distances below this are rounding errors and drawn at this height."""


Points = Mapping[str, Sequence[tuple[float, float]]]
"""For each model the points of its line, none if nothing was measured. The position determines the look."""


class Chart(NamedTuple):
    """One chart: title, how to read it, and inline SVG."""

    title: str
    caption: str
    svg: str


def charts(report: BenchReport) -> dict[str, Chart]:
    """Draw `cosine`, `cmc`, `accuracy`, `latency` and `end_to_end`, as far as measured; none without matplotlib."""
    if find_spec("matplotlib") is None:
        return {}
    models = named(report)
    distances: dict[str, list[tuple[float, float]]] = {}
    for name, model in models:
        cosines = np.nan_to_num(model.parity.cosine_quantiles if model.parity else [])
        distances[name] = list(enumerate(np.maximum(1 - cosines, MIN_DISTANCE).tolist()))
    cmc = {name: _cmc_points(model.cmc) for name, model in models}
    model_only, end_to_end = (
        {name: [(one.batch, one.median_ms) for one in fastest(model, scope)] for name, model in models}
        for scope in ("model", "end to end")
    )
    accuracy = {
        name: [(median, 100 * model.retrieval.mAP) for _, median in model_only[name][:1]] if model.retrieval else []
        for name, model in models
    }
    limits = {model.gates.min_cosine for _, model in models if model.parity and model.gates.min_cosine < 1}
    read_cosine = (
        "Lower is closer. Each line runs from a model's worst image to its best one. A model passes if the left"
    )
    read_cosine += f" end of its line is below its limit (dotted). Values below {MIN_DISTANCE:.0e} are drawn there."
    read_cmc = "Queries with a match in the first k ranks; higher is better. Lines of models that retrieve the same"
    read_cmc += " people coincide; the reference is on top."
    read_accuracy = "Up and left is better. Smallest batch size, model only."
    read_latency = "Median; lower is faster. Both axes are logarithmic."
    drawn = {
        "cosine": _chart("Cosine distance to the reference", read_cosine, distances, partial(_cosine_axes, limits)),
        "cmc": _chart("Cumulative matching characteristic (CMC)", read_cmc, cmc, _cmc_axes),
        "accuracy": _chart("Accuracy and latency", read_accuracy, accuracy, _accuracy_axes),
        "latency": _chart("Latency per batch, model only", read_latency, model_only, _latency_axes),
        "end_to_end": _chart("Latency per batch, from image files", read_latency, end_to_end, _latency_axes),
    }
    return {name: chart for name, chart in drawn.items() if chart}


def check_cmc_plot(path: Path) -> None:
    """Check before an evaluation that its plot can be written.

    Raises OutputError if matplotlib is missing, the suffix is not .png or .svg, or the folder is not writable.
    """
    check_output(path, (".png", ".svg"))
    if find_spec("matplotlib") is None:
        raise OutputError(f"cannot draw {path}: matplotlib is missing", install("train"))


def save_cmc_plot(path: Path, title: str, curves: Mapping[str, Sequence[float]]) -> None:
    """Plot CMC curves, fractions by rank, into a PNG or SVG file; see `check_cmc_plot` for errors."""
    check_cmc_plot(path)
    from matplotlib import rc_context

    with rc_context(_STYLE), written_whole(path) as temporary:
        figure = _draw(7, 5, {label: _cmc_points(curve) for label, curve in curves.items()}, _cmc_axes)
        figure.axes[0].set_title(title)
        figure.axes[0].legend(loc="lower right")
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150)


def _cmc_points(curve: Sequence[float]) -> list[tuple[float, float]]:
    return [(rank, 100 * share) for rank, share in enumerate(curve, 1)]


def _cmc_axes(axes: Any) -> None:
    last = max(len(line.get_xdata()) for line in axes.lines)
    axes.set(
        xlabel="rank k", ylabel="queries matched (%)", xlim=(1, max(2, last)), xticks=[1, *range(10, last + 1, 10)]
    )
    axes.set_ylim(top=100.5)


def _cosine_axes(limits: set[float], axes: Any) -> None:
    axes.set(xlabel="images, worst first (%)", ylabel="1 − cosine", yscale="log", xlim=(0, 100))
    axes.yaxis.set_major_formatter("{x:.0e}")
    for limit in sorted(limits):
        axes.axhline(1 - limit, color=_TEXT, linewidth=1, linestyle=(0, (1, 2)))
        axes.text(101, 1 - limit, f"≥ {limit:g}", va="center")


def _accuracy_axes(axes: Any) -> None:
    axes.set(xlabel="median latency (ms)", ylabel="mAP (%)", xscale="log")
    _log_ticks(axes.xaxis)


def _latency_axes(axes: Any) -> None:
    axes.set(xlabel="batch size", ylabel="ms", xscale="log", yscale="log")
    _log_ticks(axes.yaxis)
    sizes = sorted({int(batch) for line in axes.lines for batch in line.get_xdata()})
    axes.set_xticks(sizes, map(str, sizes))
    axes.set_xticks([], minor=True)


def _log_ticks(axis: Any) -> None:
    """Label 1, 2 and 5 times each power of ten: latencies often span less than a decade."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _chart(title: str, caption: str, lines: Points, adjust: Callable[[Any], None]) -> Chart | None:
    """Draw one chart as inline SVG; None without points. The same report gives the same bytes; titles are unique."""
    drawn = [name for name, points in lines.items() if points]
    if not drawn:
        return None
    from matplotlib import rc_context

    out, columns = io.StringIO(), 1 if max(map(len, drawn)) > 22 else 2
    with rc_context({**_STYLE, "svg.hashsalt": title, "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a font without the characters of a file name: the browser has others
        figure = _draw(5.2, 3.2 + 0.22 * math.ceil(len(drawn) / columns), lines, adjust)
        figure.legend(loc="outside lower left", ncols=columns, frameon=False, handlelength=3.2)
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = "<svg" + re.sub(r"<(metadata|style)\b.*?</\1>", "", out.getvalue().partition("<svg")[2], flags=re.DOTALL)
    svg = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", svg)  # keep the ids of markers and clip paths
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    return Chart(title, caption, svg)


def _draw(width: float, height: float, lines: Points, adjust: Callable[[Any], None]) -> Any:
    """Return a matplotlib figure with the lines, the first on top."""
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure and looks for a display

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(lines.items()):
        if points:
            look: dict[str, Any] = {kind: values[number % len(values)] for kind, values in _LOOKS}
            look |= {"linewidth": 1.8, "markersize": 5, "markevery": len(points) // 5 or 1, "zorder": 3 - number / 100}
            label = f" {name}" if name.startswith("_") else name  # matplotlib hides labels such as _a
            axes.plot(*zip(*points, strict=True), label=label, **look)
    adjust(axes)
    return figure
