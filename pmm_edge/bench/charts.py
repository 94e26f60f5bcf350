"""Charts of a bench report as SVG, and the plots of `pmm eval` and `pmm calibrate`; with matplotlib (extra `train`)."""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import numpy as np

from pmm_edge.bench.report import BenchReport
from pmm_edge.bench.tables import fastest, named
from pmm_edge.errors import OutputError, install
from pmm_edge.files import check_output, written_whole
from pmm_edge.retrieval.thresholds import MIN_FALSE_MATCHES, FoundThresholds
from pmm_edge.spec import Distance

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
_BINS_DRAWN = 256  # of a histogram of thresholds, as one bar
Points = Mapping[str, Sequence[tuple[float, float]]]
"""For each model the points of its line, none if nothing was measured. The position determines the look."""


def charts(report: BenchReport) -> dict[str, list[tuple[str, str]]]:
    """Draw title and SVG of the charts for the sections `parity`, `retrieval` and `speed`, as far as measured."""
    found: dict[str, list[tuple[str, str]]] = {"parity": [], "retrieval": [], "speed": []}
    if find_spec("matplotlib") is None:
        return found
    models, limits = named(report), set[float]()
    distances: dict[str, list[tuple[float, float]]] = {name: [] for name, _ in models}
    for name, model in models:
        if model.parity:
            quantiles = 1 - np.nan_to_num(model.parity.cosine_quantiles)
            distances[name] = list(enumerate(np.maximum(quantiles, MIN_DISTANCE).tolist()))
            limits |= {model.gates.min_cosine} - {1.0}

    def cosine_axes(axes: Any) -> None:
        axes.set(xlabel="images, worst first (%)", ylabel="1 − cosine", yscale="log", xlim=(0, 100))
        axes.yaxis.set_major_formatter("{x:.0e}")
        for limit in sorted(limits):
            axes.axhline(1 - limit, color=_TEXT, linewidth=1, linestyle=(0, (1, 2)))
            axes.text(101, 1 - limit, f"≥ {limit:g}", va="center")

    cmc = {name: _cmc_points(model.cmc) for name, model in models}
    latency, end_to_end = (
        {name: [(one.batch, one.median_ms) for one in fastest(model, scope)] for name, model in models}
        for scope in ("model", "end to end")
    )
    accuracy = {
        name: [(median, 100 * model.retrieval.mAP) for _, median in latency[name][:1]] if model.retrieval else []
        for name, model in models
    }
    for section, title, lines, adjust in (
        ("parity", "Cosine distance to the reference; a model fails above its limit (dotted)", distances, cosine_axes),
        ("retrieval", "Cumulative matching characteristic (CMC), the reference on top", cmc, _cmc_axes),
        ("speed", "Accuracy and latency of the smallest batch, model only; up and left is better", accuracy, _map_axes),
        ("speed", "Median latency per batch, model only", latency, _latency_axes),
        ("speed", "Median latency per batch, from image files", end_to_end, _latency_axes),
    ):
        if any(lines.values()):
            found[section].append((title, _svg(title, lines, adjust)))
    return found


def check_plot(path: Path) -> None:
    """Check before an evaluation or a calibration that its plot can be written.

    Raises OutputError if matplotlib is missing, the suffix is not .png or .svg, or the folder is not writable.
    """
    check_output(path, (".png", ".svg"))
    if find_spec("matplotlib") is None:
        raise OutputError(f"cannot draw {path}: matplotlib is missing", install("train"))


def save_cmc_plot(path: Path, title: str, curves: Mapping[str, Sequence[float]]) -> None:
    """Plot CMC curves, fractions by rank, into a file that `check_plot` accepts."""
    from matplotlib import rc_context

    with rc_context(_STYLE), written_whole(path) as temporary:
        figure = _draw(7, 5, {label: _cmc_points(curve) for label, curve in curves.items()}, _cmc_axes)
        figure.axes[0].set_title(title)
        figure.axes[0].legend(loc="lower right")
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150)


def save_threshold_plot(path: Path, title: str, found: FoundThresholds) -> None:
    """Plot ROC and DET curves and the histograms of distances into a file that `check_plot` accepts."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names: tuple[Distance, ...] = get_args(Distance)
    with rc_context(_STYLE), written_whole(path) as temporary:
        figure = Figure(figsize=(11, 8), layout="constrained")
        figure.suptitle(title)
        (roc, det), panels = figure.subplots(2, 2)
        for number, (name, panel) in enumerate(zip(names, panels, strict=True)):
            histogram, result = found.histograms[name], getattr(found.calibration, name)
            fmr, tmr = histogram.rates()
            look: dict[str, Any] = {kind: values[number] for kind, values in _LOOKS if kind != "marker"}
            roc.plot(fmr, 100 * tmr, label=f"{name}, EER {100 * result.eer:.1f} %", **look)
            det.plot(fmr, 100 * (1 - tmr), **look)
            for one in result.thresholds:
                roc.plot(one.fmr, 100 * one.tmr, "o", color=look["color"])
                det.plot(one.fmr, 100 * (1 - one.tmr), "o", color=look["color"])
                panel.axvline(one.distance, color=_TEXT, linewidth=1, linestyle=":")
                place = {"ha": "right", "va": "top", "rotation": 90, "transform": panel.get_xaxis_transform()}
                panel.text(one.distance, 0.98, f"{one.fmr:g}", **place)
            for which, counts in enumerate((histogram.genuine, histogram.impostor)):
                shares = counts.reshape(-1, _BINS_DRAWN).sum(axis=1) / counts.sum()
                used = np.flatnonzero(histogram.genuine + histogram.impostor)[[0, -1]] // _BINS_DRAWN
                edges = histogram.width * _BINS_DRAWN * np.arange(len(shares) + 1)
                label, drawn = ("one person", "different people")[which], slice(used[0], used[1] + 1)
                style = {kind: values[which] for kind, values in _LOOKS[:2]}
                panel.stairs(100 * shares[drawn], edges[used[0] : used[1] + 2], label=label, linewidth=1.5, **style)
            panel.set(xlabel=f"{name} distance; dotted: thresholds and their false-match rates", ylabel="pairs (%)")
            panel.legend(loc="upper right")
        lowest = max(MIN_FALSE_MATCHES / found.calibration.impostor_pairs, 1e-6)
        roc.set(xlabel="false-match rate", ylabel="true-match rate (%)", xscale="log", xlim=(lowest, 1))
        det.set(xlabel="false-match rate", ylabel="missed matches (%)", xscale="log", yscale="log", xlim=(lowest, 1))
        for axis in (roc.xaxis, det.xaxis, det.yaxis):
            axis.set_major_formatter("{x:g}")
        roc.legend(loc="lower right")
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=120)


def _cmc_points(curve: Sequence[float]) -> list[tuple[float, float]]:
    return [(rank, 100 * share) for rank, share in enumerate(curve, 1)]


def _cmc_axes(axes: Any) -> None:
    last = max(len(line.get_xdata()) for line in axes.lines)
    axes.set(xlabel="rank k", ylabel="queries matched (%)", xlim=(1, max(2, last)), ylim=(None, 100.5))
    axes.set_xticks([1, *range(10, last + 1, 10)])


def _map_axes(axes: Any) -> None:
    axes.set(xlabel="ms", ylabel="mAP (%)", xscale="log")
    log_ticks(axes.xaxis)


def log_ticks(axis: Any) -> None:
    """Label 1, 2 and 5 of each decade of a logarithmic axis: latencies often span less than a decade."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _latency_axes(axes: Any) -> None:
    sizes = sorted({int(batch) for line in axes.lines for batch in line.get_xdata()})
    axes.set(xlabel="batch size", ylabel="ms", xscale="log", yscale="log")
    axes.set_xticks(sizes, map(str, sizes))
    axes.set_xticks([], minor=True)
    log_ticks(axes.yaxis)


def _svg(title: str, lines: Points, adjust: Callable[[Any], None]) -> str:
    """Draw one chart as inline SVG. The same report gives the same bytes; titles are unique."""
    from matplotlib import rc_context

    out, drawn = io.StringIO(), sum(map(bool, lines.values()))
    with rc_context({**_STYLE, "svg.hashsalt": title, "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a font without the characters of a file name: the browser has others
        figure = _draw(5.2, 3.2 + 0.22 * drawn, lines, adjust)
        figure.legend(loc="outside lower left", frameon=False, handlelength=3.2)
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = "<svg" + re.sub(r"<(metadata|style)\b.*?</\1>", "", out.getvalue().partition("<svg")[2], flags=re.DOTALL)
    svg = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", svg)  # keep the ids of markers and clip paths
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    return svg


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
