"""Charts of a bench report as SVG, and the CMC plot of `pmm eval --cmc`. They need matplotlib (extra `train`)."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from pmm_edge.bench.report import BenchReport, Scope
from pmm_edge.bench.tables import fastest, milliseconds, named
from pmm_edge.errors import OutputError
from pmm_edge.files import check_output, written_whole

COLORS = ("#3b4149", "#0068b3", "#c44601", "#00795a", "#a63d86", "#8a6100", "#2b8cbe", "#6a51a3")
DARK_COLORS = ("#ccd2da", "#56b4e9", "#ff8f4a", "#2cc596", "#e08ac4", "#e6b93c", "#8fd0f5", "#b9a5f0")
_TEXT, _GRID = "#565d68", "#e7eaef"
_VARIABLES = {_TEXT: "var(--soft)", _GRID: "var(--grid)"} | {c: f"var(--s{n})" for n, c in enumerate(COLORS)}
"""The page's CSS variables replace colors in the SVG, so that charts follow the light or dark scheme."""
_LINES = (("color", COLORS), ("linestyle", ("-", "--", ":", "-.", (0, (8, 2)))), ("marker", "os^DvPp"))
"""A model looks the same in all charts, and color is never the only difference."""
_COLORED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
_STYLE: dict[Any, Any] = dict.fromkeys(_COLORED, _TEXT) | {"axes.spines.top": False, "axes.spines.right": False}
_STYLE |= {"font.size": 11, "text.parse_math": False, "axes.grid": True, "grid.color": _GRID, "axes.axisbelow": True}
MIN_DISTANCE = 1e-12
"""Cosine distances below this are rounding errors and drawn at this height."""


class Chart(NamedTuple):
    """One chart: title, the figures in words for screen readers, how to read it, and inline SVG."""

    title: str
    description: str
    caption: str
    svg: str


def charts(report: BenchReport) -> dict[str, Chart]:
    """Draw `cosine`, `cmc`, `accuracy`, `latency` and `end_to_end`, as far as they were measured.

    Returns:
        The charts by name; empty without matplotlib.
    """
    if find_spec("matplotlib") is None:
        return {}
    drawn = {"cosine": _cosine(report), "cmc": _cmc(report), "accuracy": _accuracy(report)}
    drawn |= {"latency": _latency(report, "model"), "end_to_end": _latency(report, "end to end")}
    return {name: chart for name, chart in drawn.items() if chart}


def check_cmc_plot(path: Path) -> None:
    """Check before an evaluation that its plot can be written.

    Raises:
        OutputError: matplotlib is missing, the suffix is not .png or .svg, or the folder is not writable.
    """
    check_output(path, (".png", ".svg"))
    if find_spec("matplotlib") is None:
        raise OutputError(f"cannot draw {path}: matplotlib is missing", "pip install 'pmm-edge[train]'")


def save_cmc_plot(path: Path, title: str, curves: Sequence[tuple[str, Sequence[float]]]) -> None:
    """Plot CMC curves, each a label and fractions by rank, into a PNG or SVG file; see `check_cmc_plot` for errors."""
    check_cmc_plot(path)
    from matplotlib import rc_context

    with rc_context(_STYLE), written_whole(path) as temporary:
        figure, axes = _figure(7, 5)
        axes.set_title(title)
        plot_cmc(axes, [(curve, _style(number, label)) for number, (label, curve) in enumerate(curves)])
        axes.legend(loc="lower right")
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150)


def plot_cmc(axes: Any, curves: Sequence[tuple[Sequence[float], dict[str, Any]]]) -> None:
    """Draw CMC curves, each with its fractions by rank and its line style, into matplotlib axes."""
    for curve, style in curves:
        axes.plot(range(1, len(curve) + 1), [100 * share for share in curve], markevery=10, **style)
    last = max(2, *(len(curve) for curve, _ in curves))
    axes.set(xlabel="rank k", ylabel="queries matched (%)", xlim=(1, last), xticks=[1, *range(10, last + 1, 10)])
    axes.set_ylim(top=100.5)


def _cosine(report: BenchReport) -> Chart | None:
    compared = [(n, name, model, model.parity) for n, (name, model) in enumerate(named(report)) if model.parity]

    def draw(axes: Any) -> None:
        for number, name, _, parity in compared:
            distances = [max(MIN_DISTANCE, 1 - _finite(cosine)) for cosine in parity.cosine_quantiles]
            axes.plot(range(len(distances)), distances, markevery=20, **_style(number, name))
        axes.set(xlabel="images, worst first (%)", ylabel="1 − cosine", yscale="log", xlim=(0, 100))
        axes.yaxis.set_major_formatter("{x:.0e}")
        for limit in {model.gates.min_cosine for _, _, model, _ in compared if model.gates.min_cosine < 1}:
            axes.axhline(1 - limit, color=_TEXT, linewidth=1, linestyle=(0, (1, 2)))
            axes.text(101, 1 - limit, f"≥ {limit:g}", va="center")

    figures = [(name, f"minimum cosine {parity.whole.cosine_min:.6f}") for _, name, _, parity in compared]
    caption = "Lower is closer. Each line runs from a model's worst image to its best one. A model passes if the left"
    caption += f" end of its line is below its limit (dotted). Values below {MIN_DISTANCE:.0e} are drawn there."
    return _chart("Cosine distance to the reference", figures, caption, draw)


def _cmc(report: BenchReport) -> Chart | None:
    judged = [(n, name, [*map(_finite, model.cmc)]) for n, (name, model) in enumerate(named(report)) if model.cmc]
    figures = [(name, f"Rank-1 {100 * curve[0]:.2f} %") for _, name, curve in judged]
    caption = (
        "Queries with a match in the first k ranks; higher is better. Lines of models that retrieve the same people"
    )
    caption += " coincide; the reference is on top."
    curves = [(curve, _style(number, name)) for number, name, curve in judged]
    return _chart("Cumulative matching characteristic (CMC)", figures, caption, lambda axes: plot_cmc(axes, curves))


def _accuracy(report: BenchReport) -> Chart | None:
    found = [(n, name, model, fastest(model, "model")) for n, (name, model) in enumerate(named(report))]
    judged = [
        (number, name, model.retrieval_change, model.retrieval.mAP, timed[0].median_ms, timed[0].batch)
        for number, name, model, timed in found
        if timed and model.retrieval and math.isfinite(model.retrieval.mAP)
    ]

    def draw(axes: Any) -> None:
        for number, name, change, accuracy, median, _ in judged:
            mean = change.mAP.difference if change else 0.0
            ends = (mean - change.mAP.low, change.mAP.high - mean) if change else (0.0, 0.0)
            bars = [[100 * max(0.0, _finite(end))] for end in ends]
            axes.errorbar(median, 100 * accuracy, bars, capsize=3, **_style(number, name) | {"markersize": 8})
        axes.set(xlabel="median latency (ms)", ylabel="mAP (%)", xscale="log")
        _log_ticks(axes.xaxis)

    figures = [(name, f"mAP {100 * mAP:.2f} % at {milliseconds(median)} ms") for _, name, _, mAP, median, _ in judged]
    caption = "Up and left is better; bars are 95 % intervals of the change in mAP."
    caption += f" Batch size {judged[0][-1]}, model only." if judged else ""
    return _chart("Accuracy and latency", figures, caption, draw)


def _latency(report: BenchReport, scope: Scope) -> Chart | None:
    found = [(number, name, fastest(model, scope)) for number, (name, model) in enumerate(named(report))]
    timed = [(number, name, latencies) for number, name, latencies in found if latencies]

    def draw(axes: Any) -> None:
        for number, name, latencies in timed:
            batches, medians = [one.batch for one in latencies], [one.median_ms for one in latencies]
            (line,) = axes.plot(batches, medians, **_style(number, name))
            axes.fill_between(batches, medians, [one.p90_ms for one in latencies], color=line.get_color(), alpha=0.16)
        axes.set(xlabel="batch size", ylabel="ms", xscale="log", yscale="log")
        _log_ticks(axes.yaxis)
        sizes = sorted({one.batch for _, _, latencies in timed for one in latencies})
        axes.set_xticks(sizes, map(str, sizes))
        axes.set_xticks([], minor=True)

    title = "Latency per batch, model only" if scope == "model" else "Latency per batch, from image files"
    figures = [(name, f"{milliseconds(own[0].median_ms)} ms at batch size {own[0].batch}") for _, name, own in timed]
    caption = "Lower is faster; both axes are logarithmic. Lines are medians; bands reach up to the 90th percentile."
    return _chart(title, figures, caption, draw)


def _chart(title: str, figures: Sequence[tuple[str, str]], caption: str, draw: Callable[[Any], None]) -> Chart | None:
    """Draw one chart as inline SVG; the same report gives the same bytes. None without figures.

    `title` is unique on the page, and `figures` are the name of each model with its figures in words.
    """
    if not figures:
        return None
    from matplotlib import rc_context

    out, columns = io.StringIO(), 1 if max(len(name) for name, _ in figures) > 22 else 2
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context({**_STYLE, "svg.hashsalt": title, "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a font without the characters of a file name: the browser has others
        figure, axes = _figure(5.2, 3.2 + 0.22 * math.ceil(len(figures) / columns))
        draw(axes)
        figure.legend(loc="outside lower left", ncols=columns, frameon=False, handlelength=3.2)
        figure.savefig(out, format="svg", transparent=True, metadata=metadata)
    svg = "<svg" + re.sub(r"<(metadata|style)\b.*?</\1>", "", out.getvalue().partition("<svg")[2], flags=re.DOTALL)
    svg = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", svg)  # keep the ids of markers and clip paths
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    return Chart(title, "; ".join(f"{name}: {text}" for name, text in figures), caption, svg)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure and looks for a display

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _style(number: int, name: str) -> dict[str, Any]:
    label = f" {name}" if name.startswith("_") else name  # matplotlib hides labels with an underscore in front
    style = {kind: values[number % len(values)] for kind, values in _LINES}
    return style | {"label": label, "linewidth": 1.8, "markersize": 5, "zorder": 3 - number / 100}  # first one on top


def _log_ticks(axis: Any) -> None:
    """Label 1, 2 and 5 times each power of ten: latencies often span less than a decade."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _finite(value: float) -> float:
    """Return 0 for a value that is not finite: such an embedding matches nothing."""
    return value if math.isfinite(value) else 0.0
