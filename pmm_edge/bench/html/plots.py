"""The charts of a report: which figures, on which axes, and the same figures as a table behind each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pmm_edge.bench.html.charts import Axis, Point, Series, chart, legend, linear_axis, log_axis
from pmm_edge.bench.report import BenchReport, Latency, ModelReport, Scope
from pmm_edge.bench.tables import NONE, Table, milliseconds, named

LEAST_DEPARTURE = 1e-12
"""1 - cosine below this is rounding; it is drawn here."""
_RANKS = (1, 2, 5, 10, 20, 50)
_PERCENTILES = (0, 1, 5, 25, 50, 75, 100)


@dataclass(frozen=True)
class Plot:
    """A chart, the names of its lines, what it says and the figures behind it."""

    title: str
    svg: str
    legend: str
    caption: str
    table: Table


def cosine_plot(report: BenchReport) -> Plot | None:
    """How far each image's embedding departs from the reference's, from the worst to the best; None without parity."""
    compared = [(number, name, model.parity) for number, name, model in _numbered(report) if model.parity]
    if not compared:
        return None
    lines, rows = [], []
    for number, name, parity in compared:
        departures = [max(LEAST_DEPARTURE, 1 - _number(cosine)) for cosine in parity.cosine_quantiles]
        points = [Point(share, value) for share, value in enumerate(departures)]
        lines.append(Series(name, number, points, marked=range(0, len(points), 20)))
        rows.append((name, *(f"{_number(parity.cosine_quantiles[share]):.6f}" for share in _PERCENTILES)))
    gates: dict[float, list[str]] = {}
    for model in report.models:
        kinds = gates.setdefault(model.gates.min_cosine, [])
        kinds += [model.precision] * (model.precision not in kinds)
    levels = [(1 - least, f"{', '.join(kinds)}: at least {least:g}") for least, kinds in gates.items() if least < 1]
    drawn = [point.y for line in lines for point in line.points] + [level for level, _ in levels]
    title = "How far embeddings depart from the reference"
    described = "; ".join(f"{name}: least cosine {parity.whole.cosine_min:.6f}" for _, name, parity in compared)
    shares = Axis("images, the worst first (%)", 0, 100, [(share, str(share)) for share in range(0, 101, 20)])
    svg = chart("cosine", title, described, shares, log_axis("1 − cosine", drawn), lines, levels)
    caption = (
        "Lower is nearer. Each line goes from a model's worst image at the left to its best at the right; it passes"
        f" where its left end lies below its gate, the thin line. {LEAST_DEPARTURE:.0e} and less are drawn as that."
    )
    columns = ("model", *("least" if share == 0 else f"{share} %" for share in _PERCENTILES[:-1]), "largest")
    return Plot(title, svg, _legend(lines), caption, Table("Percentiles of cosine", columns, rows))


def cmc_plot(report: BenchReport) -> Plot | None:
    """The share of queries with a match among the first k; None where none was judged."""
    judged = [(number, name, model.cmc) for number, name, model in _numbered(report) if model.cmc]
    if not judged:
        return None
    lines, rows = [], []
    for number, name, cmc in judged:
        curve = [100 * _number(share) for share in cmc]
        marked = [rank - 1 for rank in (1, 10, 20, 30, 40, 50) if rank <= len(curve)]
        points = [Point(rank, share) for rank, share in enumerate(curve, start=1)]
        lines.append(Series(name, number, points, marked=marked))
        rows.append((name, *(f"{curve[rank - 1]:.2f}" if rank <= len(curve) else NONE for rank in _RANKS)))
    title = "CMC: queries with a match among the first k"
    described = "; ".join(f"{row[0]}: Rank-1 {row[1]} %" for row in rows)
    last = max(2, *(len(cmc) for _, _, cmc in judged))
    ranks = Axis("rank k", 1, last, [(rank, str(rank)) for rank in (1, 10, 20, 30, 40, 50) if rank <= last])
    values = [point.y for line in lines for point in line.points]
    svg = chart("cmc", title, described, ranks, linear_axis("queries (%)", values, highest=100), lines)
    caption = "Higher is better. Models that retrieve the same people lie on one line, the first of the list on top."
    table = Table("CMC in %", ("model", *(f"Rank-{rank}" for rank in _RANKS)), rows)
    return Plot(title, svg, _legend(lines), caption, table)


def latency_plot(report: BenchReport, scope: Scope) -> Plot | None:
    """The time of a batch over its size, from the median to the 90th percentile; None where not measured."""
    timed = [(number, name, _of_scope(model, scope)) for number, name, model in _numbered(report)]
    lines = [
        Series(name, number, [Point(own.batch, own.median_ms, own.median_ms, own.p90_ms) for own in latencies])
        for number, name, latencies in timed
        if latencies
    ]
    if not lines:
        return None
    sizes = sorted({int(point.x) for line in lines for point in line.points})
    values = [
        value
        for line in lines
        for point in line.points
        for value in (point.y, point.high)
        if value and 0 < value < math.inf
    ]
    title = f"Latency of a batch, {'model only' if scope == 'model' else 'from image files'}"
    described = "; ".join(f"{line.name}: {milliseconds(line.points[0].y)} ms at batch {sizes[0]}" for line in lines)
    low, high = (sizes[0], sizes[-1]) if len(sizes) > 1 else (sizes[0] / 2, sizes[0] * 2)
    batches = Axis("images in a batch", low, high, [(size, str(size)) for size in sizes], log=True)
    name = f"latency-{scope.replace(' ', '-')}"
    svg = chart(name, title, described, batches, log_axis("ms", values), lines)
    rows = [(line.name, *(_at(line, size) for size in sizes)) for line in lines]
    caption = "Lower is faster; both scales are logarithmic. Lines are medians, the band above each reaches to its p90."
    table = Table("Median – p90 in ms", ("model", *(f"batch {size}" for size in sizes)), rows)
    return Plot(title, svg, _legend(lines), caption, table)


def accuracy_plot(report: BenchReport) -> Plot | None:
    """MAP over the time of the smallest batch, all models; None where either was not measured."""
    found: list[tuple[int, str, float, Latency, ModelReport]] = []
    for number, name, model in _numbered(report):
        if model.retrieval and (latencies := _of_scope(model, "model")) and math.isfinite(model.retrieval.mAP):
            found.append((number, name, 100 * model.retrieval.mAP, latencies[0], model))
    if not found:
        return None
    lines, rows = [], []
    for number, name, accuracy, latency, model in found:
        change = model.retrieval_change.mAP if model.retrieval_change else None
        base = accuracy - 100 * change.difference if change else 0.0
        low, high = (base + 100 * change.low, base + 100 * change.high) if change else (None, None)
        lines.append(Series(name, number, [Point(latency.median_ms, accuracy, low, high)], joined=False))
        rows.append((name, f"{accuracy:.2f}", milliseconds(latency.median_ms), str(latency.batch)))
    title = "Accuracy against latency"
    described = "; ".join(f"{name}: mAP {accuracy} % at {median} ms" for name, accuracy, median, _ in rows)
    values = [
        value
        for line in lines
        for at in line.points
        for value in (at.y, at.low, at.high)
        if value is not None and math.isfinite(value)
    ]
    across = log_axis("median of a batch (ms)", [line.points[0].x for line in lines])
    svg = chart("accuracy", title, described, across, linear_axis("mAP (%)", values, 0, 100), lines)
    entries = [
        (name, number, f"{accuracy:.2f} %, {milliseconds(latency.median_ms)} ms")
        for number, name, accuracy, latency, _ in found
    ]
    caption = (
        f"Up and to the left is better. Batches of {found[0][3].batch}, model only; bars are 95 % intervals of the"
        " change against the reference."
    )
    table = Table("mAP and latency", ("model", "mAP %", "median ms", "batch"), rows)
    return Plot(title, svg, legend(entries, joined=False), caption, table)


def _numbered(report: BenchReport) -> list[tuple[int, str, ModelReport]]:
    return [(number, name, model) for number, (name, model) in enumerate(named(report))]


def _of_scope(model: ModelReport, scope: Scope) -> list[Latency]:
    """By batch size. Where a batch was timed with and without a CUDA graph, the faster one."""
    best: dict[int, Latency] = {}
    for latency in sorted(model.latency, key=lambda own: -own.median_ms):
        if latency.scope == scope:
            best[latency.batch] = latency
    return [best[batch] for batch in sorted(best)]


def _at(line: Series, size: int) -> str:
    found = [point for point in line.points if point.x == size]
    return f"{milliseconds(found[0].y)} – {milliseconds(_number(found[0].high))}" if found else NONE


def _legend(lines: Sequence[Series]) -> str:
    return legend([(line.name, line.number, "") for line in lines])


def _number(value: float | None) -> float:
    """0 for what is not finite: of such an embedding nothing agrees."""
    return value if value is not None and math.isfinite(value) else 0.0
