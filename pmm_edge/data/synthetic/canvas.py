"""Project a body into an image and paint the shapes that it is made of.

The body frame has its origin on the ground between the feet: x to the person's left, y up, z forward, in units of the
body's height. Heading 0 faces the camera, 90 walks to the right of the image, 180 shows the back.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from PIL import ImageDraw

from pmm_edge.data.synthetic.person import Color, Garment

Pixel = tuple[float, float]
EDGE = 82.0
"""Angle to the line of sight, in degrees, beyond which a surface is not painted."""
LIT, SHADE = (255, 255, 255, 26), (0, 0, 0, 50)
PATCH = [(-1.0, k / 4) for k in range(-4, 5)] + [(1.0, -k / 4) for k in range(-4, 5)]
VERTICAL_STRIPES: dict[str, tuple[Sequence[int], float]] = {
    "columns": (range(0, 360, 45), 9),
    "checks": (range(0, 360, 45), 9),
    "side stripe": ((90, 270), 14),
}
"""Pattern -> angles of the stripes around a garment, and half their width; all in degrees."""


class Point(NamedTuple):
    """A point in the body frame."""

    x: float
    y: float
    z: float


class Ring(NamedTuple):
    """A horizontal cross-section of the body: an ellipse around the vertical axis."""

    y: float
    width: float
    depth: float
    z: float = 0.0


class Pose(NamedTuple):
    """One moment of walking: angles in degrees, `phase` of the gait in radians, `stride` 0 (standing) to 1."""

    heading: float
    pitch: float
    phase: float
    stride: float


@dataclass(frozen=True)
class View:
    """A body placed in an image: its point on the ground and its height, in pixels, its pose, and the light."""

    draw: ImageDraw.ImageDraw
    x: float
    ground: float
    size: float
    pose: Pose
    light: float  # -1: from the left of the image; 1: from the right

    @cached_property
    def turn(self) -> tuple[float, float]:
        """Sine and cosine of the heading."""
        heading = math.radians(self.pose.heading)
        return math.sin(heading), math.cos(heading)

    def at(self, p: Point) -> Pixel:
        """Project to the image, orthographically: the crop of a detector has almost no perspective."""
        sin, cos = self.turn
        tilt = math.radians(self.pose.pitch)
        lower = self.depth(p) * math.sin(tilt) - p.y * math.cos(tilt)
        return self.x + self.size * (p.x * cos + p.z * sin), self.ground + self.size * lower

    def depth(self, p: Point) -> float:
        """How much nearer to the camera a point is than the axis of the body."""
        sin, cos = self.turn
        return p.z * cos - p.x * sin

    def reach(self, ring: Ring) -> float:
        """Half the width of a ring's silhouette, in pixels."""
        sin, cos = self.turn
        return self.size * math.hypot(ring.width * cos, ring.depth * sin)

    def on(self, ring: Ring, angle: float) -> Pixel:
        """Project a point of a ring; angle 0 is the front, 90 the person's left, in degrees."""
        turn = math.radians(angle)
        return self.at(Point(ring.width * math.sin(turn), ring.y, ring.z + ring.depth * math.cos(turn)))

    def off_center(self, angle: float) -> float:
        """Angle in -180..180 degrees between the camera and the side of a ring at `angle`."""
        return (angle + self.pose.heading + 180) % 360 - 180

    def sees(self, angle: float) -> bool:
        """Whether the side of a ring at `angle` faces the camera."""
        return abs(self.off_center(angle)) < EDGE

    def line(self, points: Sequence[Pixel], width: float, color: Color) -> None:
        """Paint a line of `width` body units, at least one pixel."""
        self.draw.line(points, fill=color, width=max(1, round(width * self.size)), joint="curve")

    def disc(self, center: Pixel, rx: float, ry: float, color: tuple[int, ...]) -> None:
        """Paint an ellipse with its radii in pixels."""
        x, y = center
        self.draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=color)

    def bone(self, a: Pixel, b: Pixel, ra: float, rb: float, color: tuple[int, ...], cuff: bool = False) -> None:
        """Paint two discs and the quadrilateral between them, radii in pixels; a cuff has a flat end."""
        length = math.hypot(b[0] - a[0], b[1] - a[1]) or 1.0
        nx, ny = (a[1] - b[1]) / length, (b[0] - a[0]) / length
        sides = ((a, ra), (b, rb), (b, -rb), (a, -ra))
        self.draw.polygon([(x + nx * r, y + ny * r) for (x, y), r in sides], fill=color)
        if len(color) == 3:  # the overlap of translucent shapes would be visible
            self.disc(a, ra, ra, color)
            self.disc(b, rb, rb * 0.35 if cuff else rb, color)

    def limb(self, a: Point, b: Point, ra: float, rb: float, color: Color, cuff: bool = False) -> None:
        """Paint a bone in body units, shaded on the side away from the light."""
        pa, pb = self.at(a), self.at(b)
        ra, rb = ra * self.size, rb * self.size
        self.bone(pa, pb, ra, rb, color, cuff)
        off = -self.light * 0.55
        self.bone((pa[0] + off * ra, pa[1]), (pb[0] + off * rb, pb[1]), ra * 0.5, rb * 0.5, SHADE)

    def band(self, rings: Sequence[Ring], left: float, right: float, color: tuple[int, ...]) -> None:
        """Paint the part of a tube's silhouette between two fractions (-1..1) of its width."""
        centers = [(self.at(Point(0, ring.y, ring.z)), self.reach(ring)) for ring in rings]
        down = [(x + left * reach, y) for (x, y), reach in centers]
        up = [(x + right * reach, y) for (x, y), reach in reversed(centers)]
        self.draw.polygon(down + up, fill=color)

    def stamp(self, rings: Sequence[Ring], center: Pixel, reach: Pixel, outline: Sequence[Pixel], color: Color) -> None:
        """Paint a shape onto the surface of a tube, bent around it and cut off where the surface turns away.

        `center` and `reach` are (degrees around the tube, fraction of its height); `outline` is in -1..1.
        """
        middle = self.off_center(center[0])
        offs = [min(max(middle + reach[0] * x, -EDGE), EDGE) for x, _ in outline]
        if max(offs) - min(offs) > 4:
            rows = [ring_at(rings, center[1] + reach[1] * y) for _, y in outline]
            corners = [self.on(ring, off - self.pose.heading) for ring, off in zip(rows, offs, strict=True)]
            self.draw.polygon(corners, fill=color)

    def patch(self, rings: Sequence[Ring], angle: float, half: float, top: float, bottom: float, color: Color) -> None:
        """Paint the surface of a tube within `half` degrees of `angle`, between two fractions of its height."""
        self.stamp(rings, (angle, (top + bottom) / 2), (half, (bottom - top) / 2), PATCH, color)

    def tube(self, rings: Sequence[Ring], garment: Garment) -> None:
        """Paint a torso, skirt or coat: rings from top to bottom, with pattern and shading."""
        self.band(rings, -1, 1, garment.color)
        hem = self.at(Point(0, rings[-1].y, rings[-1].z))
        sag = self.size * rings[-1].depth * math.sin(math.radians(self.pose.pitch)) + 1
        self.disc(hem, self.reach(rings[-1]), sag, garment.color)
        count = max(2, round((rings[0].y - rings[-1].y) / 0.09))
        stripes = [((k + 0.3) / count, (k + 0.75) / count) for k in range(count)]
        bands: dict[str, list[tuple[float, float]]] = {"stripes": stripes, "checks": stripes, "block": [(0, 0.42)]}
        for top, bottom in bands.get(garment.pattern, ()):
            between = [ring_at(rings, top + (bottom - top) * k / 4) for k in range(5)]
            self.band(between, -1, 1, garment.second)
        angles, half = VERTICAL_STRIPES.get(garment.pattern, ((), 0))
        for angle in angles:
            self.patch(rings, angle, half, 0, 1, garment.second)
        self.band(rings, -0.15 * self.light, -self.light, SHADE)
        self.band(rings, 0.3 * self.light, 0.8 * self.light, LIT)


def ring_at(rings: Sequence[Ring], v: float) -> Ring:
    """The cross-section of a tube at fraction `v` of its height, from the top."""
    y = rings[0].y + (rings[-1].y - rings[0].y) * min(max(v, 0.0), 1.0)
    for upper, lower in itertools.pairwise(rings):
        if y >= lower.y:
            t = (upper.y - y) / ((upper.y - lower.y) or 1.0)
            return Ring(*(p + (q - p) * t for p, q in zip(upper, lower, strict=True)))
    return rings[-1]


def along(a: Point, b: Point, t: float) -> Point:
    """The point at fraction `t` of the way from `a` to `b`."""
    return Point(*(p + (q - p) * t for p, q in zip(a, b, strict=True)))


def darker(color: Color, factor: float) -> Color:
    """The color times `factor`."""
    r, g, b = (int(c * factor) for c in color)
    return r, g, b
