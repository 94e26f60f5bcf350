"""Where bodies are drawn: a view that projects three dimensions, and the shapes that bodies are made of.

The body frame has its origin on the ground between the feet: x to the person's left, y up, z forward, one unit
to a body's height. A heading of 0 faces the camera, 90 walks to the image's right, 180 shows the back.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import ImageDraw

from pmm_edge.data.synthetic.person import Colour, Garment

Pixel = tuple[float, float]
EDGE = 82.0
"""Degrees from the line of sight at which a body's surface turns away."""
LIT, SHADE = (255, 255, 255, 26), (0, 0, 0, 50)


class Point(NamedTuple):
    """A place in the body frame."""

    x: float
    y: float
    z: float


class Ring(NamedTuple):
    """A horizontal cross-section of the body: an ellipse around the vertical axis."""

    y: float
    width: float
    depth: float
    z: float = 0.0


@dataclass(frozen=True)
class Pose:
    """One moment of walking: angles in degrees, `phase` of the gait in radians, `stride` 0 (standing) to 1."""

    heading: float
    pitch: float
    phase: float
    stride: float


@dataclass(frozen=True)
class View:
    """A body placed on a canvas: its ground point, its height in pixels and its pose."""

    draw: ImageDraw.ImageDraw
    x: float
    ground: float
    size: float
    pose: Pose
    light: float
    """-1: light from the image's left; 1: from its right."""

    def at(self, p: Point) -> Pixel:
        """Project to the canvas (orthographic: a detector's crop has next to no perspective)."""
        sin, cos = self._turn()
        tilt = math.radians(self.pose.pitch)
        lower = self.depth(p) * math.sin(tilt) - p.y * math.cos(tilt)
        return self.x + self.size * (p.x * cos + p.z * sin), self.ground + self.size * lower

    def depth(self, p: Point) -> float:
        """How much nearer to the camera than the body's axis."""
        sin, cos = self._turn()
        return p.z * cos - p.x * sin

    def reach(self, ring: Ring) -> float:
        """Half the width of a ring's silhouette, in pixels."""
        sin, cos = self._turn()
        return self.size * math.hypot(ring.width * cos, ring.depth * sin)

    def on(self, ring: Ring, angle: float) -> Point:
        """A point on a ring; angle 0 is the front, 90 the person's left, in degrees."""
        turn = math.radians(angle)
        return Point(ring.width * math.sin(turn), ring.y, ring.z + ring.depth * math.cos(turn))

    def seen(self, angle: float) -> bool:
        """Whether the side of a ring at `angle` faces the camera."""
        return abs(self.off_centre(angle)) < EDGE

    def off_centre(self, angle: float) -> float:
        """Degrees (-180..180) between the camera and the side of a ring at `angle`."""
        return (angle + self.pose.heading + 180) % 360 - 180

    def _turn(self) -> tuple[float, float]:
        turn = math.radians(self.pose.heading)
        return math.sin(turn), math.cos(turn)


def disc(view: View, centre: Pixel, rx: float, ry: float, colour: tuple[int, ...]) -> None:
    """An ellipse with its radii in pixels."""
    x, y = centre
    view.draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=colour)


def bone(view: View, a: Pixel, b: Pixel, ra: float, rb: float, colour: tuple[int, ...], cuff: bool = False) -> None:
    """A limb segment: two discs and the quadrilateral between them, radii in pixels; a cuff has a flat end."""
    length = math.hypot(b[0] - a[0], b[1] - a[1]) or 1.0
    nx, ny = (a[1] - b[1]) / length, (b[0] - a[0]) / length
    corners = [
        (a[0] + nx * ra, a[1] + ny * ra), (b[0] + nx * rb, b[1] + ny * rb),
        (b[0] - nx * rb, b[1] - ny * rb), (a[0] - nx * ra, a[1] - ny * ra),
    ]  # fmt: skip
    view.draw.polygon(corners, fill=colour)
    if len(colour) == 3:  # translucent discs would show where they overlap the quadrilateral
        disc(view, a, ra, ra, colour)
        disc(view, b, rb, rb * 0.35 if cuff else rb, colour)


def limb(view: View, a: Point, b: Point, ra: float, rb: float, colour: Colour, cuff: bool = False) -> None:
    """A bone in body units, shaded on the side away from the light."""
    pa, pb = view.at(a), view.at(b)
    ra, rb = ra * view.size, rb * view.size
    bone(view, pa, pb, ra, rb, colour, cuff)
    off = -view.light * 0.55
    bone(view, (pa[0] + off * ra, pa[1]), (pb[0] + off * rb, pb[1]), ra * 0.5, rb * 0.5, SHADE)


def _outline(view: View, rings: Sequence[Ring], left: float, right: float) -> list[Pixel]:
    """The polygon between two fractions (-1..1) of a tube's silhouette."""
    centres = [view.at(Point(0, ring.y, ring.z)) for ring in rings]
    reaches = [view.reach(ring) for ring in rings]
    down = [(c[0] + left * r, c[1]) for c, r in zip(centres, reaches, strict=True)]
    up = [(c[0] + right * r, c[1]) for c, r in zip(centres, reaches, strict=True)]
    return down + up[::-1]


def _between(rings: Sequence[Ring], top: float, bottom: float) -> list[Ring]:
    """The part of a tube from fraction `top` to fraction `bottom` of its height."""
    return [ring_at(rings, top + (bottom - top) * k / 4) for k in range(5)]


def ring_at(rings: Sequence[Ring], v: float) -> Ring:
    """The cross-section of a tube at fraction `v` of its height, from the top."""
    y = rings[0].y + (rings[-1].y - rings[0].y) * min(max(v, 0.0), 1.0)
    for upper, lower in itertools.pairwise(rings):
        if y >= lower.y:
            t = (upper.y - y) / ((upper.y - lower.y) or 1.0)
            return Ring(*(p + (q - p) * t for p, q in zip(upper, lower, strict=True)))
    return rings[-1]


def stamp(
    view: View, rings: Sequence[Ring], centre: tuple[float, float], reach: tuple[float, float],
    outline: Sequence[Pixel], colour: Colour,
) -> None:  # fmt: skip
    """Paint a shape onto a tube's surface, bent around it and cut off where it turns away.

    `centre` and `reach` are (degrees around the tube, fraction of its height); `outline` is in -1..1.
    """
    middle = view.off_centre(centre[0])
    offs = [min(max(middle + reach[0] * x, -EDGE), EDGE) for x, _ in outline]
    if max(offs) - min(offs) > 4:
        turned = [off - view.pose.heading for off in offs]
        rows = [ring_at(rings, centre[1] + reach[1] * y) for _, y in outline]
        corners = [view.at(view.on(ring, angle)) for ring, angle in zip(rows, turned, strict=True)]
        view.draw.polygon(corners, fill=colour)


def patch(
    view: View, rings: Sequence[Ring], angle: float, half: float, top: float, bottom: float, colour: Colour
) -> None:
    """Paint the part of a tube's surface that lies within `half` degrees of `angle`."""
    steps = [k / 4 for k in range(-4, 5)]
    outline = [(-1.0, y) for y in steps] + [(1.0, -y) for y in steps]
    stamp(view, rings, (angle, (top + bottom) / 2), (half, (bottom - top) / 2), outline, colour)


def tube(view: View, rings: Sequence[Ring], garment: Garment) -> None:
    """A torso, a skirt or a coat: a stack of rings from top to bottom, with pattern and shading."""
    view.draw.polygon(_outline(view, rings, -1, 1), fill=garment.colour)
    hem = view.at(Point(0, rings[-1].y, rings[-1].z))
    sag = view.size * rings[-1].depth * math.sin(math.radians(view.pose.pitch)) + 1
    disc(view, hem, view.reach(rings[-1]), sag, garment.colour)
    _pattern(view, rings, garment)
    view.draw.polygon(_outline(view, rings, -0.15 * view.light, -view.light), fill=SHADE)
    view.draw.polygon(_outline(view, rings, 0.3 * view.light, 0.8 * view.light), fill=LIT)


def _pattern(view: View, rings: Sequence[Ring], garment: Garment) -> None:
    height = rings[0].y - rings[-1].y
    if garment.pattern in ("stripes", "checks"):
        count = max(2, round(height / 0.09))
        for k in range(count):
            band = _between(rings, (k + 0.3) / count, (k + 0.75) / count)
            view.draw.polygon(_outline(view, band, -1, 1), fill=garment.second)
    if garment.pattern in ("columns", "checks"):
        for angle in range(0, 360, 45):
            patch(view, rings, angle, 9, 0, 1, garment.second)
    if garment.pattern == "block":
        view.draw.polygon(_outline(view, _between(rings, 0, 0.42), -1, 1), fill=garment.second)
    if garment.pattern == "side stripe":
        for angle in (90, 270):
            patch(view, rings, angle, 14, 0, 1, garment.second)


def darker(colour: Colour, factor: float) -> Colour:
    """The colour times `factor`."""
    r, g, b = (int(c * factor) for c in colour)
    return r, g, b


def along(a: Point, b: Point, t: float) -> Point:
    """The point at fraction `t` of the way from `a` to `b`."""
    return Point(*(p + (q - p) * t for p, q in zip(a, b, strict=True)))
