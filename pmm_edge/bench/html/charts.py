"""Line charts as SVG text: axes, lines that differ in colour, dashes and markers, bands, levels.

Drawn for a width of 420 units, so that text of 12 units stays readable on a telephone. Colours are classes of
`style.css`, which knows light, dark and paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 12, 46
COLOURS = 8
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "14 4")
_MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",  # circle
    "M-3.6-3.6h7.2v7.2h-7.2z",  # square
    "M0-4.8L4.6 3.6h-9.2z",  # triangle
    "M0-5.2L5.2 0L0 5.2L-5.2 0z",  # diamond
    "M0 4.8L4.6-3.6h-9.2z",  # triangle on its point
    "M-1.5-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",  # plus
    "M0-5L4.8-1.5L2.9 4H-2.9L-4.8-1.5z",  # pentagon
)
_EXPONENTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """One direction of a chart: what it measures, its ends, and the values that are named."""

    title: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies, 0 at `low` and 1 at `high`; values beyond the ends lie on them, NaN at `low`."""
        if math.isnan(value):
            return 0.0
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)


@dataclass(frozen=True)
class Point:
    """A value, and where known the interval around it."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """A line. `number` chooses colour, dashes and marker: the same model has the same in all charts."""

    name: str
    number: int
    points: Sequence[Point]
    marked: Sequence[int] | None = None
    """Indices of the points that get a marker; None for all."""
    joined: bool = True
    """False for points that no line connects."""


def linear_axis(title: str, values: Sequence[float], lowest: float = -math.inf, highest: float = math.inf) -> Axis:
    """An axis around values, from one round number to another, within `lowest` and `highest`."""
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    step = _round_step((high - low) / 5)
    low, high = max(lowest, math.floor(low / step) * step), min(highest, math.ceil(high / step) * step)
    if high <= low:  # both were cut to one limit
        low, high = low - step, high + step
    digits = max(0, -math.floor(math.log10(step)))
    count = int((high - low) / step + 1e-6) + 1
    first = math.ceil(low / step - 1e-6)
    ticks = [((first + number) * step, f"{(first + number) * step + 0.0:,.{digits}f}") for number in range(count)]
    return Axis(title, low, high, [tick for tick in ticks if tick[0] <= high + 1e-9 * step])


def log_axis(title: str, values: Sequence[float]) -> Axis:
    """A logarithmic axis around values above 0: named at powers of ten, on a short one at 2 and 5 of each as well."""
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    steps = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    low = max(step for step in steps if step <= min(values) * (1 + 1e-9))
    high = next((step for step in steps if step >= max(values)), 10.0 ** (last + 1))
    if high / low < 5:
        low, high = low / 2, high * 2
    decades = math.log10(high / low)
    if decades <= 3:
        named = [(step, f"{step:,g}") for step in steps if low * 0.999 <= step <= high * 1.001]
        return Axis(title, low, high, named, log=True)
    every = math.ceil(decades / 7)
    low, high = 10.0 ** math.floor(math.log10(low) + 1e-9), 10.0 ** math.ceil(math.log10(high) - 1e-9)
    first, last = round(math.log10(low)), round(math.log10(high))
    powers = range(last, first - 1, -every)
    return Axis(title, low, high, [(10.0**power, "1" if power == 0 else _power(power)) for power in powers], log=True)


def chart(
    name: str,
    title: str,
    description: str,
    x: Axis,
    y: Axis,
    series: Sequence[Series],
    levels: Sequence[tuple[float, str]] = (),
) -> str:
    """An `<svg>` for HTML.

    Args:
        name: what its parts' ids begin with, unique on the page.
        title: for those who do not see it: what it shows.
        description: what is to be seen there.
        x: from left to right.
        y: from bottom to top.
        series: the lines, the first on top.
        levels: values of y that a thin line names.
    """
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"',
        f' aria-labelledby="{name}-title" aria-describedby="{name}-desc">',
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>',
        *_frame(x, y),
    ]
    for value, text in levels:
        if y.low <= value <= y.high:
            height = _y(y, value)
            parts.append(f'<path class="level" d="M{_LEFT} {height}H{WIDTH - _RIGHT}"/>')
            parts.append(f'<text class="label" x="{WIDTH - _RIGHT - 4}" y="{height - 4}">{escape(text)}</text>')
    drawn = list(reversed(series))
    parts += [_band(line, x, y) for line in drawn]
    parts += [_line(line, x, y) for line in drawn]
    return "".join([*parts, "</svg>"])


def legend(entries: Sequence[tuple[str, int, str]], joined: bool = True) -> str:
    """A list of names with their line and marker, for entries of name, number and a note."""
    items = []
    for name, number, note in entries:
        line = f'<path class="line" {_dash(number)} d="M1 8H33"/>' if joined else ""
        swatch = f'<path class="mark" d="{_MARKERS[number % len(_MARKERS)]}" transform="translate(17 8)"/>'
        picture = f'<svg class="s{number % COLOURS}" viewBox="0 0 34 16" aria-hidden="true">{line}{swatch}</svg>'
        said = f' <span class="note">{escape(note)}</span>' if note else ""
        items.append(f"<li>{picture}<span>{escape(name)}{said}</span></li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _frame(x: Axis, y: Axis) -> list[str]:
    """Grid, numbers and titles of both axes."""
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = []
    for value, text in y.ticks:
        height = _y(y, value)
        parts.append(f'<path class="grid" d="M{_LEFT} {height}H{right}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 6}" y="{height + 4}">{escape(text)}</text>')
    for value, text in x.ticks:
        place = _x(x, value)
        parts.append(f'<path class="grid" d="M{place} {_TOP}V{bottom}"/>')
        parts.append(f'<text class="tick middle" x="{place}" y="{bottom + 16}">{escape(text)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>')
    middle, centre = (_TOP + bottom) / 2, (_LEFT + right) / 2
    parts.append(f'<text class="title middle" x="{centre}" y="{HEIGHT - 8}">{escape(x.title)}</text>')
    turned = f'transform="rotate(-90 13 {middle})"'
    parts.append(f'<text class="title middle" x="13" y="{middle}" {turned}>{escape(y.title)}</text>')
    return parts


def _band(line: Series, x: Axis, y: Axis) -> str:
    """The intervals: an area between the points where a line joins them, and a bar at each."""
    ranged = [
        (_x(x, at.x), _y(y, at.low), _y(y, at.high)) for at in line.points if at.low is not None and at.high is not None
    ]
    if not ranged:
        return ""
    area = ""
    if line.joined and len(ranged) > 1:
        edge = [f"{place} {high}" for place, _, high in ranged] + [f"{place} {low}" for place, low, _ in ranged[::-1]]
        area = f'<path class="band" d="M{"L".join(edge)}z"/>'
    bars = "".join(f"M{place} {low}V{high}M{place - 3} {high}h6" for place, low, high in ranged)
    return f'<g class="s{line.number % COLOURS}">{area}<path class="bar" d="{bars}"/></g>'


def _line(line: Series, x: Axis, y: Axis) -> str:
    places = [(_x(x, at.x), _y(y, at.y)) for at in line.points]
    if not places:
        return ""
    path = ""
    if line.joined and len(places) > 1:
        way = "L".join(f"{across} {up}" for across, up in places)
        path = f'<path class="line" {_dash(line.number)} d="M{way}"/>'
    shape = _MARKERS[line.number % len(_MARKERS)]
    marked = range(len(places)) if line.marked is None else line.marked
    size = "" if line.joined else " scale(1.5)"
    marks = "".join(
        f'<path class="mark" d="{shape}" transform="translate({places[n][0]} {places[n][1]}){size}"/>' for n in marked
    )
    return f'<g class="s{line.number % COLOURS}">{path}{marks}</g>'


def _dash(number: int) -> str:
    dash = _DASHES[number % len(_DASHES)]
    return f'stroke-dasharray="{dash}"' if dash else ""


def _x(axis: Axis, value: float) -> float:
    return round(_LEFT + axis.share(value) * (WIDTH - _LEFT - _RIGHT), 1)


def _y(axis: Axis, value: float) -> float:
    return round(HEIGHT - _BOTTOM - axis.share(value) * (HEIGHT - _TOP - _BOTTOM), 1)


def _round_step(step: float) -> float:
    """The next number from `step` up that is 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def _power(exponent: int) -> str:
    return "10" + str(exponent).translate(_EXPONENTS)
