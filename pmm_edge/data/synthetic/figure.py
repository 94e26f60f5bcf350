"""Paint a person: the skeleton of a pose, clothes, head and bag.

The body frame has its origin on the ground between the feet: x to the person's left, y up, z forward, in units of the
body's height. Heading 0 faces the camera, 90 walks to the right of the image, 180 shows the back.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from PIL import ImageDraw

from pmm_edge.data.synthetic.person import Color, Item, Person


class Point(NamedTuple):
    """A point in the body frame."""

    x: float
    y: float
    z: float


Ring = Point
"""A cross-section of the body, an ellipse around the vertical axis: half the width, height, and half the depth."""
Pose = tuple[float, float, float, float]
"""One moment of walking: heading and pitch in degrees, phase of the gait in radians, stride from 0 (standing) to 1."""
Rings = Sequence[Ring]
Pixel = tuple[float, float]
Outline = Sequence[Pixel]
Joints = tuple[Point, Point, Point]  # hip, knee and ankle, or shoulder, elbow and hand
Part = tuple[float, Callable[[], None]]  # of the upper body: its depth, larger is nearer, and how to paint it

EDGE = 82.0  # angle to the line of sight, in degrees, beyond which a surface is not painted
SHADE = (0, 0, 0, 50)
STRIP = [(-1.0, k / 4) for k in range(-4, 5)] + [(1.0, -k / 4) for k in range(-4, 5)]
SQUARE = ((-1, -1), (0, -1), (1, -1), (1, 1), (0, 1), (-1, 1))
CIRCLE = tuple((math.cos(k * math.pi / 8), math.sin(k * math.pi / 8)) for k in range(16))
# Kind of logo -> its shapes: half the width in degrees, half the height as a factor, the outline in -1..1.
LOGO_SHAPES: dict[str, list[tuple[float, float, Outline]]] = {
    "square": [(36, 1.0, SQUARE)],
    "bar": [(62, 0.55, SQUARE)],
    "disc": [(42, 1.15, CIRCLE)],
    "triangle": [(46, 1.2, ((0, -1), (1, 1), (0, 1), (-1, 1)))],
    "cross": [(13, 1.4, SQUARE), (46, 0.45, SQUARE)],
}
# Hair style -> height above the head and z of its start and end, its radii.
FALLING_HAIR = {
    "long": ((0.0, -0.015), (-0.21, -0.06), (0.062, 0.066)),
    "bob": ((0.0, 0.018), (-0.055, -0.01), (0.064, 0.062)),
    "ponytail": ((0.03, -0.055), (-0.17, -0.1), (0.024, 0.02)),
}


class View:
    """A body placed in an image: its point on the ground and its height, in pixels, its pose, and the light."""

    def __init__(self, draw: ImageDraw.ImageDraw, place: tuple[float, float, float], pose: Pose, light: float) -> None:
        self.draw, (self.x, self.ground, self.size) = draw, place
        self.heading, self.pitch, self.phase, self.stride = pose
        self.light = light  # -1: from the left of the image; 1: from the right
        self.sin, self.cos = math.sin(math.radians(self.heading)), math.cos(math.radians(self.heading))

    def at(self, p: Point) -> Pixel:
        """Project to the image, orthographically: the crop of a detector has almost no perspective."""
        tilt = math.radians(self.pitch)
        lower = self.depth(p) * math.sin(tilt) - p.y * math.cos(tilt)
        return self.x + self.size * (p.x * self.cos + p.z * self.sin), self.ground + self.size * lower

    def depth(self, p: Point) -> float:
        """How much nearer to the camera a point is than the axis of the body."""
        return p.z * self.cos - p.x * self.sin

    def reach(self, ring: Ring) -> float:
        """Half the width of a ring's silhouette, in pixels."""
        return self.size * math.hypot(ring.x * self.cos, ring.z * self.sin)

    def on(self, ring: Ring, angle: float) -> Pixel:
        """Project a point of a ring; angle 0 is the front, 90 the person's left, in degrees."""
        turn = math.radians(angle)
        return self.at(Point(ring.x * math.sin(turn), ring.y, ring.z * math.cos(turn)))

    def off_center(self, angle: float) -> float:
        """Angle in -180..180 degrees between the camera and the side of a ring at `angle`."""
        return (angle + self.heading + 180) % 360 - 180

    def sees(self, angle: float) -> bool:
        """Whether the side of a ring at `angle` faces the camera."""
        return abs(self.off_center(angle)) < EDGE

    def line(self, points: Sequence[Pixel], width: float, color: Color) -> None:
        """Paint a line of `width` body units, at least one pixel."""
        self.draw.line(points, fill=color, width=max(1, round(width * self.size)), joint="curve")

    def disc(self, center: Pixel, rx: float, ry: float, color: Color) -> None:
        """Paint an ellipse with its radii in pixels."""
        x, y = center
        self.draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=color)

    def bone(self, a: Pixel, b: Pixel, ra: float, rb: float, color: Color, cuff: bool = False) -> None:
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
        pa, pb, ra, rb = self.at(a), self.at(b), ra * self.size, rb * self.size
        self.bone(pa, pb, ra, rb, color, cuff)
        off = -self.light * 0.55
        self.bone((pa[0] + off * ra, pa[1]), (pb[0] + off * rb, pb[1]), ra * 0.5, rb * 0.5, SHADE)

    def band(self, rings: Rings, left: float, right: float, color: Color) -> None:
        """Paint the part of a tube's silhouette between two fractions (-1..1) of its width."""
        centers = [(self.at(Point(0, ring.y, 0)), self.reach(ring)) for ring in rings]
        down = [(x + left * reach, y) for (x, y), reach in centers]
        up = [(x + right * reach, y) for (x, y), reach in reversed(centers)]
        self.draw.polygon(down + up, fill=color)

    def patch(self, rings: Rings, angle: float, half: float, v: Pixel, color: Color, outline: Outline = STRIP) -> None:
        """Paint an outline bent around a tube, within `half` degrees of `angle` and two fractions `v` of its height."""
        offs = [min(max(self.off_center(angle) + half * x, -EDGE), EDGE) for x, _ in outline]
        if max(offs) - min(offs) > 4:
            rows = [ring_at(rings, (v[0] + v[1]) / 2 + (v[1] - v[0]) / 2 * y) for _, y in outline]
            corners = [self.on(ring, off - self.heading) for ring, off in zip(rows, offs, strict=True)]
            self.draw.polygon(corners, fill=color)

    def tube(self, rings: Rings, garment: Item) -> None:
        """Paint a torso, skirt or coat: rings from top to bottom, with pattern and shading."""
        self.band(rings, -1, 1, garment.color)
        hem, pattern = rings[-1], garment.pattern
        sag = self.size * hem.z * math.sin(math.radians(self.pitch)) + 1
        self.disc(self.at(Point(0, hem.y, 0)), self.reach(hem), sag, garment.color)
        if pattern in ("stripes", "checks", "block"):
            count = max(2, round((rings[0].y - hem.y) / 0.09))
            stripes = [((k + 0.3) / count, (k + 0.75) / count) for k in range(count)]
            for top, bottom in [(0, 0.42)] if pattern == "block" else stripes:
                self.band([ring_at(rings, top + (bottom - top) * k / 4) for k in range(5)], -1, 1, garment.second)
        if pattern in ("columns", "checks", "side stripe"):
            angles, half = ((90, 270), 14) if pattern == "side stripe" else (range(0, 360, 45), 9)
            for angle in angles:
                self.patch(rings, angle, half, (0, 1), garment.second)
        self.band(rings, -0.15 * self.light, -self.light, SHADE)
        self.band(rings, 0.3 * self.light, 0.8 * self.light, (255, 255, 255, 26))


def ring_at(rings: Rings, v: float) -> Ring:
    """The cross-section of a tube at fraction `v` of its height, from the top."""
    y = rings[0].y + (rings[-1].y - rings[0].y) * min(max(v, 0.0), 1.0)
    for upper, lower in itertools.pairwise(rings):
        if y >= lower.y:
            return _along(upper, lower, (upper.y - y) / (upper.y - lower.y))
    return rings[-1]


def _along(a: Point, b: Point, t: float) -> Point:
    """The point at fraction `t` of the way from `a` to `b`."""
    return Point(*(p + (q - p) * t for p, q in zip(a, b, strict=True)))


def _darker(color: Color, factor: float) -> Color:
    return tuple(int(c * factor) for c in color)


def draw_person(view: View, person: Person) -> None:
    """Paint `person` and a soft shadow: legs, then the upper body from far to near, then the head."""
    for k in (1.0, 0.7, 0.45):  # away from the light
        center = view.x - view.light * 0.07 * view.size, view.ground
        view.disc(center, 0.2 * view.size * k, 0.035 * view.size * k, (0, 0, 0, 46))
    legs, arms, neck, head = _skeleton(person, view)
    for leg in sorted(legs, key=lambda leg: view.depth(leg[0]) + 0.1 * view.depth(leg[1])):
        _leg(view, person, *leg)
    bulk, hip, lower = person.bulk, legs[0][0].y, person.lower
    if lower.kind in ("skirt", "long skirt"):
        length = 0.24 if lower.kind == "skirt" else 0.4
        flare = 0.02 + 0.1 * view.stride * abs(math.sin(view.phase))
        waist, hips = Ring(0.098 * bulk, hip + 0.06, 0.075 * bulk), Ring(0.125 * bulk, hip - 0.05, 0.1 * bulk)
        view.tube([waist, hips, Ring(0.15 * bulk, hip - length, 0.12 * bulk + flare * length * 2)], lower)
    chest = view.at(Point(0, neck.y - 0.05, 0))
    view.bone(view.at(neck), chest, 0.03 * view.size, 0.04 * view.size, _darker(person.skin, 0.85))
    parts = _upper_body(view, person, hip, arms, neck)
    # Falling hair is behind the body, or in front of the head if seen from the back. (The body is within -1..1.)
    hair = 3.0 if view.depth(Point(0, 0, -0.16)) > 0.03 else -3.0
    parts += [(2.0, partial(_head, view, person, head)), (hair, partial(_falling_hair, view, person.hair, head))]
    for _, paint in sorted(parts, key=lambda part: part[0]):
        paint()
    _hat(view, person.hat, head)


def _skeleton(person: Person, view: View) -> tuple[list[Joints], list[Joints], Point, Point]:
    """The legs and arms (left, right), the neck and the head. Legs and arms swing in opposite phase."""

    def swing(start: Point, length: float, angle: float, spread: float = 0.0) -> Point:  # the end of a bone
        return Point(start.x + spread, start.y - length * math.cos(angle), start.z + length * math.sin(angle))

    hip_y = 0.48 * person.legs + 0.045
    bob = 0.012 * view.stride * math.cos(2 * view.phase)
    top = hip_y + 0.30 + bob
    legs, arms = [], []
    for side, phase in ((1, view.phase), (-1, view.phase + math.pi)):  # left and right are half a step apart
        thigh = 0.5 * view.stride * math.sin(phase)
        bend = 0.08 + 0.85 * view.stride * max(0.0, math.cos(phase)) ** 1.5  # the leg that moves forward bends
        hip = Point(side * 0.058 * person.bulk, hip_y + bob, 0)
        knee = swing(hip, 0.24 * person.legs, thigh)
        legs.append((hip, knee, swing(knee, 0.24 * person.legs, thigh - bend)))
        carries = person.bag.kind == "handbag" and (side > 0) == person.left_handed
        arm = -thigh * (0.25 if carries else 1.0)
        shoulder = Point(side * (0.114 * person.shoulders + 0.02 * (person.bulk - 1)), top - 0.04, 0)
        elbow = swing(shoulder, 0.155, arm - 0.05, side * 0.03)
        arms.append((shoulder, elbow, swing(elbow, 0.15, arm + (0.1 if carries else 0.35), side * 0.004)))
    return legs, arms, Point(0, top + 0.02, 0.005), Point(0, top + 0.105, 0.018)


def _leg(view: View, person: Person, hip: Point, knee: Point, ankle: Point) -> None:
    lower, shoes, bulk = person.lower, person.shoes, person.bulk
    far = 0.78 if view.depth(hip) < -0.02 else 1.0
    cloth, second, skin = (_darker(color, far) for color in (lower.color, lower.second, person.skin))
    if bare := lower.kind in ("shorts", "skirt", "long skirt"):
        view.limb(hip, knee, 0.055 * bulk, 0.04 * bulk, skin)
        view.limb(knee, ankle, 0.038 * bulk, 0.024, skin)
    # A shoe follows the shin: flat if the shin is vertical, toe down if the leg is lifted.
    lift = 0.25 * max(0.0, (knee.z - ankle.z) * 0.9)
    heel, toe_y = Point(ankle.x, ankle.y - 0.012, ankle.z - 0.018), ankle.y - 0.016 - lift
    toe = Point(ankle.x * 1.12, toe_y, ankle.z + 0.088)
    leather = _darker(shoes.color, 0.6 + 0.4 * far)
    if shoes.kind == "trainers":
        sole = (228, 226, 220) if sum(shoes.color) < 600 else (90, 90, 96)
        view.limb(heel._replace(y=heel.y - 0.014), toe._replace(y=toe_y - 0.012), 0.03, 0.026, sole)
    view.limb(heel, toe, 0.034, 0.027, leather)
    if lower.kind == "shorts":
        view.limb(hip, _along(hip, knee, 0.85), 0.064 * bulk, 0.062 * bulk, cloth, cuff=True)
    elif not bare:
        wide = {"wide": 1.35, "slim": 0.86}.get(lower.kind, 1.0)
        radii = 0.062 * bulk * wide, 0.045 * bulk * wide, 0.036 * wide * (1.3 if lower.kind == "wide" else 1.0)
        view.limb(knee, _along(knee, ankle, 0.93), radii[1], radii[2], cloth, cuff=True)
        view.limb(hip, knee, radii[0], radii[1], cloth)
        outward = 1 if hip.x > 0 else -1
        if lower.pattern == "side stripe" and view.sees(90 * outward):
            joints = zip((hip, knee, ankle), radii, strict=True)
            view.line([view.at(j._replace(x=j.x + outward * r * 0.8)) for j, r in joints], 0.026, second)
        bones = ((hip, knee, *radii[:2]), (knee, ankle, *radii[1:])) if lower.pattern == "checks" else ()
        for (a, b, ra, rb), t in itertools.product(bones, (0.2, 0.55, 0.9)):
            (x, y), r = view.at(_along(a, b, t)), (ra + (rb - ra) * t) * view.size
            view.line([(x - r, y), (x + r, y)], 0.02, second)
    if shoes.kind == "boots":
        view.limb(_along(ankle, knee, 0.42), ankle, 0.044 * bulk, 0.036, leather)


def _upper_body(view: View, person: Person, hip: float, arms: Sequence[Joints], neck: Point) -> list[Part]:
    """Torso, at depth 0, hood, arms and bag."""
    upper, bulk, bag, top = person.upper, person.bulk, person.bag, arms[0][0].y + 0.04
    broad, deep = 0.128 * person.shoulders, 0.078 * bulk
    puff = {"jacket": 1.08, "hoodie": 1.1, "coat": 1.1}.get(upper.kind, 1.0)
    rings = [  # from the collar to the hem
        Ring(0.045, top + 0.022, 0.04),
        Ring(broad * 0.86, top, deep * 0.75 * puff),
        Ring(broad * 1.06, top - 0.035, deep * 0.95 * puff),
        Ring(broad * 0.98 * puff, top - 0.12, deep * 1.08 * puff),
        Ring(0.104 * bulk * puff, hip + 0.07, 0.08 * bulk * puff),
        Ring(0.114 * bulk * puff, hip - 0.01, 0.09 * bulk * puff),
        *[Ring(0.135 * bulk, hip - 0.17, 0.125 * bulk)] * (upper.kind == "coat"),
    ]
    parts: list[Part] = [(0.0, partial(_torso, view, person, rings))]
    if upper.kind == "hoodie":  # its hood hangs behind the neck
        hood, color = view.at(Point(0, neck.y - 0.015, -0.055)), _darker(upper.color, 0.78)
        paint = partial(view.disc, hood, 0.08 * view.size, 0.048 * view.size, color)
        parts.append((view.depth(Point(0, 0, -0.1)), paint))
    near = [view.depth(shoulder) + 0.3 * view.depth(hand) for shoulder, _, hand in arms]
    parts += [(depth, partial(_arm, view, person, *arm)) for depth, arm in zip(near, arms, strict=True)]
    carrier, sign = (0, 1) if person.left_handed else (1, -1)
    if bag.kind == "backpack":
        front = view.depth(Point(0, 0, 0.1))
        strap = max(0.001, front) if front > 0 else -1.0
        parts.append((view.depth(Point(0, 0, -0.17)), partial(_backpack, view, top - 0.16, bulk, bag.color)))
        parts += [(strap, partial(view.patch, rings, angle, 9, (0.06, 0.62), bag.color)) for angle in (38, -38)]
    elif bag.kind == "shoulder bag":
        place = Point(sign * 0.17 * bulk, hip + 0.01, 0.02)
        depth = 0.02 + max(0.0, view.depth(place)) * 2 if view.depth(place) > -0.05 else -0.4
        parts.append((0.001, partial(_strap, view, rings, sign, _darker(bag.color, 0.9))))
        parts.append((depth, partial(_box, view, place, 0.055, 0.1, 0.14, bag.color)))
    elif bag.kind == "handbag":
        parts.append((near[carrier] - 0.001, partial(_handbag, view, arms[carrier][2], bag.color)))
    return parts


def _torso(view: View, person: Person, rings: Rings) -> None:
    upper, skin = person.upper, person.skin
    view.tube(rings, upper)
    openings: dict[str, list[tuple[float, float, Pixel, Color]]] = {
        "tank top": [(90, 40, (0.04, 0.22), skin), (270, 40, (0.04, 0.22), skin)],
        "jacket": [(0, 17, (0.06, 1), upper.second)],
        "coat": [(0, 3, (0.1, 1), _darker(upper.color, 0.5))],
        "shirt": [(0, 22, (0.0, 0.09), _darker(skin, 0.95))],
    }
    for opening in openings.get(upper.kind, []):
        view.patch(rings, *opening)
    middle, height = (0.34, 0.13) if upper.kind != "coat" else (0.24, 0.09)
    for width, tall, outline in LOGO_SHAPES.get(person.logo.kind, ()):
        view.patch(rings, 0, width, (middle - tall * height, middle + tall * height), person.logo.color, outline)


def _arm(view: View, person: Person, shoulder: Point, elbow: Point, hand: Point) -> None:
    upper, bulk = person.upper, 0.6 + 0.4 * person.bulk
    far = 0.8 if view.depth(shoulder) < -0.03 else 0.94
    color, second, skin = (_darker(color, far) for color in (upper.color, upper.second, person.skin))
    cloth = second if upper.pattern == "block" else color
    view.disc(view.at(hand), 0.026 * view.size, 0.03 * view.size, skin)
    if upper.kind in ("tank top", "t-shirt"):
        view.limb(elbow, hand, 0.028 * bulk, 0.02, skin)
        radii = (0.038, 0.03) if upper.kind == "tank top" else (0.036, 0.029)
        view.limb(shoulder, elbow, radii[0] * bulk, radii[1] * bulk, skin)
        if upper.kind == "t-shirt":
            view.limb(shoulder, _along(shoulder, elbow, 0.6), 0.04 * bulk, 0.042 * bulk, cloth, cuff=True)
        return
    thick = bulk * (1.18 if upper.kind in ("hoodie", "coat", "jacket") else 1.0)
    view.limb(elbow, _along(elbow, hand, 0.9), 0.034 * thick, 0.026 * thick, color)
    view.limb(shoulder, elbow, 0.042 * thick, 0.035 * thick, cloth)
    if upper.pattern in ("stripes", "checks"):
        radius = 0.034 * thick * view.size
        for (a, b), t in itertools.product(((shoulder, elbow), (elbow, hand)), (0.2, 0.65)):
            view.bone(view.at(_along(a, b, t)), view.at(_along(a, b, t + 0.2)), radius, radius, (*second, 255))


def _box(view: View, center: Point, width: float, depth: float, height: float, color: Color) -> None:
    """A rounded box that turns with the body."""
    (x, y), half = view.at(center), height * view.size / 2
    reach = view.reach(Ring(width, center.y, depth)) * 0.85
    view.draw.rounded_rectangle((x - reach, y - half, x + reach, y + half), radius=0.02 * view.size, fill=color)
    view.draw.line([(x - reach, y - half * 0.3), (x + reach, y - half * 0.3)], fill=SHADE, width=max(1, int(half / 5)))


def _backpack(view: View, height: float, bulk: float, color: Color) -> None:
    z = -0.13 * bulk
    _box(view, Point(0, height, z), 0.105, 0.075, 0.25, color)
    if view.cos < -0.3:
        (x, y), r = view.at(Point(0, height - 0.05, z - 0.02)), 0.06 * view.size
        pocket = x - r, y - r * 0.6, x + r, y + r * 0.7
        view.draw.rounded_rectangle(pocket, radius=r * 0.3, fill=_darker(color, 0.7))


def _handbag(view: View, hand: Point, color: Color) -> None:
    (x, y), r = view.at(hand), 0.04 * view.size
    view.draw.arc((x - r, y - r * 0.6, x + r, y + r * 2), 180, 360, fill=_darker(color, 0.7), width=max(1, int(r / 4)))
    _box(view, hand._replace(y=hand.y - 0.1), 0.045, 0.095, 0.12, color)


def _strap(view: View, rings: Rings, sign: int, color: Color) -> None:
    """A band from the far shoulder to the hip that carries the bag, across chest or back."""
    start, end = (180 + sign * 50, 180 - sign * 80) if view.cos < 0 else (-sign * 50, sign * 80)
    path = [(ring_at(rings, 0.06 + 0.8 * k / 8), start + (end - start) * k / 8) for k in range(9)]
    line = [view.on(ring, angle) for ring, angle in path if view.sees(angle)]
    if len(line) > 1:
        view.line(line, 0.026, color)


def _head(view: View, person: Person, head: Point) -> None:
    """Hair all around, and the face on the side that faces the camera."""
    sin, cos, (style, hair, *_), skin = view.sin, view.cos, person.hair, person.skin
    shown = max(0.0, 0.62 + 0.5 * cos)
    bun = view.at(Point(0, head.y + 0.075, head.z - 0.04))
    eyes = {side: 0.86 * math.sin(math.radians(view.heading + side)) for side in (-26, 26)}
    discs: list[tuple[bool, float, float, float, float, Color]] = [
        # Painted if; place to the right and below the center, and radii, relative to those of the head; color.
        (style == "afro", -0.012 / 0.058 * sin, -0.3, 1.5, 1.22, hair),
        (True, 0, 0, 1, 1, skin if style == "bald" else hair),
        (style in ("short", "bun", "ponytail", "afro"), 0.1 * sin, 0.72, 0.6, 0.3, _darker(skin, 0.92)),
        (shown > 0.33 and style != "bald", 0.52 * sin, 0.2, min(0.86, shown), 0.76, skin),
        *((view.sees(side), place, 0.08, 0.13, 0.09, (34, 26, 24)) for side, place in eyes.items()),
        (cos > -0.1, 0.95 * sin, 0.3, 0.15, 0.13, _darker(skin, 0.84)),  # nose
        (cos > -0.1, 0.72 * sin, 0.6, 0.24 * max(0.3, cos), 0.06, (150, 70, 66)),  # mouth
        (cos < 0.75 and style not in ("bald", "short"), -0.45 if sin > 0 else 0.45, 0.15, 0.55, 0.8, hair),
        (True, -view.light * 0.45, 0, 0.5, 0.85, (0, 0, 0, 38)),
    ]
    (x, y), rx, ry = view.at(head), 0.058 * view.size, 0.073 * view.size
    if style == "bun":
        view.disc(bun, rx * 0.5, rx * 0.5, hair)
    for painted, right, below, wide, high, color in discs:
        if painted:
            view.disc((x + rx * right, y + ry * below), rx * wide, ry * high, color)


def _falling_hair(view: View, hair: Item, head: Point) -> None:
    if hair.kind in FALLING_HAIR:
        *ends, (ra, rb) = FALLING_HAIR[hair.kind]
        start, end = (view.at(Point(0, head.y + above, z)) for above, z in ends)
        view.bone(start, end, ra * view.size, rb * view.size, hair.color)


def _hat(view: View, hat: Item, head: Point) -> None:
    if hat.kind == "none":
        return
    (x, y), rx, ry, color = view.at(head), 0.058 * view.size, 0.073 * view.size, hat.color
    brim = y - ry * 0.28
    view.draw.pieslice((x - rx * 1.1, y - ry * 1.2, x + rx * 1.1, y + ry * 0.6), 180, 360, fill=color)
    if hat.kind == "cap" and view.cos > -0.4:
        wide = rx * (0.8 - 0.15 * abs(view.sin))
        view.disc((x + rx * 0.85 * view.sin, brim), wide, ry * 0.15, _darker(color, 0.7))
    elif hat.kind == "sun hat":
        view.disc((x, brim), rx * 2.0, ry * 0.26, _darker(color, 0.85))
    elif hat.kind == "beanie":
        view.draw.rectangle((x - rx * 1.1, brim - ry * 0.12, x + rx * 1.1, brim + ry * 0.1), fill=_darker(color, 0.72))
        view.disc((x, y - ry * 1.2), rx * 0.32, rx * 0.32, _darker(color, 0.9))
