"""Paint a person: the skeleton of a pose, clothes, head and bag."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from pmm_edge.data.synthetic.canvas import SHADE, Pixel, Point, Pose, Ring, View, along, darker, ring_at
from pmm_edge.data.synthetic.person import Color, Person

Part = tuple[float, Callable[[], None]]
"""A part of the upper body: its depth, larger is nearer, and how to paint it."""

HEAD_WIDTH, HEAD_HEIGHT = 0.058, 0.073
FALLING_HAIR = {
    "long": ((0.0, -0.015), (-0.21, -0.06), (0.062, 0.066)),
    "bob": ((0.0, 0.018), (-0.055, -0.01), (0.064, 0.062)),
    "ponytail": ((0.03, -0.055), (-0.17, -0.1), (0.024, 0.02)),
}
"""Hair style -> height above the head and z of its start and end, its radii."""
SQUARE: tuple[Pixel, ...] = ((-1, -1), (0, -1), (1, -1), (1, 1), (0, 1), (-1, 1))
CIRCLE: tuple[Pixel, ...] = tuple((math.cos(k * math.pi / 8), math.sin(k * math.pi / 8)) for k in range(16))
LOGO_SHAPES: dict[str, tuple[tuple[float, float, tuple[Pixel, ...]], ...]] = {
    "none": (),
    "square": ((36, 1.0, SQUARE),),
    "bar": ((62, 0.55, SQUARE),),
    "disc": ((42, 1.15, CIRCLE),),
    "triangle": ((46, 1.2, ((0, -1), (1, 1), (0, 1), (-1, 1))),),
    "cross": ((13, 1.4, SQUARE), (46, 0.45, SQUARE)),
}
"""Kind of logo -> its shapes: half the width in degrees, half the height as a factor, the outline."""


class Side(NamedTuple):
    """The joints of one leg and one arm."""

    hip: Point
    knee: Point
    ankle: Point
    shoulder: Point
    elbow: Point
    hand: Point


def draw_person(view: View, person: Person) -> None:
    """Paint `person`: legs, then the upper body from far to near, then the head."""
    sides, neck, head = pose_skeleton(person, view.pose)
    for side in sorted(sides, key=lambda s: view.depth(s.hip) + 0.1 * view.depth(s.knee)):
        _leg(view, person, side)
    if person.lower.cut in ("skirt", "long skirt"):
        bulk, hip, length = person.body.bulk, sides[0].hip.y, 0.24 if person.lower.cut == "skirt" else 0.4
        flare = 0.02 + 0.1 * view.pose.stride * abs(math.sin(view.pose.phase))
        waist, hips = Ring(hip + 0.06, 0.098 * bulk, 0.075 * bulk), Ring(hip - 0.05, 0.125 * bulk, 0.1 * bulk)
        view.tube([waist, hips, Ring(hip - length, 0.15 * bulk, 0.12 * bulk + flare * length * 2)], person.lower)
    chest = view.at(Point(0, neck.y - 0.05, 0))
    view.bone(view.at(neck), chest, 0.03 * view.size, 0.04 * view.size, darker(person.body.skin, 0.85))
    hair_in_front = view.depth(Point(0, 0, -0.16)) > 0.03
    if not hair_in_front:
        _falling_hair(view, person, head)
    for _, paint in sorted(_upper_parts(view, person, sides, neck), key=lambda part: part[0]):
        paint()
    _head(view, person, head)
    if hair_in_front:
        _falling_hair(view, person, head)
    _hat(view, person, head)


def pose_skeleton(person: Person, pose: Pose) -> tuple[list[Side], Point, Point]:
    """The left and right side, the neck and the head of a walking body.

    Legs and arms swing in opposite phase, the leg that moves forward bends.
    """
    body = person.body
    hip_y = 0.48 * body.legs + 0.045
    bob = 0.012 * pose.stride * math.cos(2 * pose.phase)
    top = hip_y + 0.30 + bob
    sides = []
    for side, phase in ((1, pose.phase), (-1, pose.phase + math.pi)):  # left and right are half a step apart
        thigh = 0.5 * pose.stride * math.sin(phase)
        bend = 0.08 + 0.85 * pose.stride * max(0.0, math.cos(phase)) ** 1.5
        carries = person.bag.kind == "handbag" and (side > 0) == person.left_handed
        arm = -thigh * (0.25 if carries else 1.0)
        hip = Point(side * 0.058 * body.bulk, hip_y + bob, 0)
        knee = _swing(hip, 0.24 * body.legs, thigh)
        ankle = _swing(knee, 0.24 * body.legs, thigh - bend)
        shoulder = Point(side * (0.114 * body.shoulders + 0.02 * (body.bulk - 1)), top - 0.04, 0)
        elbow = _swing(shoulder, 0.155, arm - 0.05, side * 0.03)
        hand = _swing(elbow, 0.15, arm + (0.1 if carries else 0.35), side * 0.004)
        sides.append(Side(hip, knee, ankle, shoulder, elbow, hand))
    return sides, Point(0, top + 0.02, 0.005), Point(0, top + 0.105, 0.018)


def _swing(start: Point, length: float, angle: float, spread: float = 0.0) -> Point:
    """The end of a bone that hangs from `start`, swung forward by `angle` radians."""
    return Point(start.x + spread, start.y - length * math.cos(angle), start.z + length * math.sin(angle))


def _leg(view: View, person: Person, side: Side) -> None:
    cut, bulk, (hip, knee, ankle) = person.lower.cut, person.body.bulk, side[:3]
    far = 0.78 if view.depth(hip) < -0.02 else 1.0
    if bare := cut in ("shorts", "skirt", "long skirt"):
        skin = darker(person.body.skin, far)
        view.limb(hip, knee, 0.055 * bulk, 0.04 * bulk, skin)
        view.limb(knee, ankle, 0.038 * bulk, 0.024, skin)
    shoe = darker(person.shoes.color, 0.6 + 0.4 * far)
    _shoe(view, person, knee, ankle, shoe)
    if cut == "shorts":
        end = along(hip, knee, 0.85)
        view.limb(hip, end, 0.064 * bulk, 0.062 * bulk, darker(person.lower.color, far), cuff=True)
    elif not bare:
        _trouser_leg(view, person, side, far)
    if person.shoes.kind == "boots":
        view.limb(along(ankle, knee, 0.42), ankle, 0.044 * bulk, 0.036, shoe)


def _trouser_leg(view: View, person: Person, side: Side, far: float) -> None:
    lower, bulk, (hip, knee, ankle) = person.lower, person.body.bulk, side[:3]
    cloth, second = darker(lower.color, far), darker(lower.second, far)
    wide = {"wide": 1.35, "slim": 0.86}.get(lower.cut, 1.0)
    radii = 0.062 * bulk * wide, 0.045 * bulk * wide, 0.036 * wide * (1.3 if lower.cut == "wide" else 1.0)
    view.limb(knee, along(knee, ankle, 0.93), radii[1], radii[2], cloth, cuff=True)
    view.limb(hip, knee, radii[0], radii[1], cloth)
    outward = 1 if hip.x > 0 else -1
    if lower.pattern == "side stripe" and view.sees(90 * outward):
        joints = zip((hip, knee, ankle), radii, strict=True)
        view.line([view.at(Point(j.x + outward * r * 0.8, j.y, j.z)) for j, r in joints], 0.026, second)
    if lower.pattern == "checks":
        for a, b, ra, rb in ((hip, knee, radii[0], radii[1]), (knee, ankle, radii[1], radii[2])):
            for t in (0.2, 0.55, 0.9):
                (x, y), r = view.at(along(a, b, t)), (ra + (rb - ra) * t) * view.size
                view.line([(x - r, y), (x + r, y)], 0.02, second)


def _shoe(view: View, person: Person, knee: Point, ankle: Point, color: Color) -> None:
    """A shoe that follows the shin: flat if the shin is vertical, toe down if the leg is lifted."""
    lift = (knee.z - ankle.z) * 0.9
    heel = Point(ankle.x, ankle.y - 0.012, ankle.z - 0.018)
    toe = Point(ankle.x * 1.12, ankle.y - 0.016 - 0.25 * max(0.0, lift), ankle.z + 0.088)
    if person.shoes.kind == "trainers":
        sole = (228, 226, 220) if sum(person.shoes.color) < 600 else (90, 90, 96)
        view.limb(heel._replace(y=heel.y - 0.014), toe._replace(y=toe.y - 0.012), 0.03, 0.026, sole)
    view.limb(heel, toe, 0.034, 0.027, color)


def _upper_parts(view: View, person: Person, sides: list[Side], neck: Point) -> list[Part]:
    """Torso, hood, arms and bag. The depth of the torso is 0."""
    rings = _torso_rings(person, sides[0])
    parts: list[Part] = [(0.0, partial(_torso, view, person, rings))]
    if person.upper.cut == "hoodie":  # its hood hangs behind the neck
        hood, color = view.at(Point(0, neck.y - 0.015, -0.055)), darker(person.upper.color, 0.78)
        paint = partial(view.disc, hood, 0.08 * view.size, 0.048 * view.size, color)
        parts.append((view.depth(Point(0, 0, -0.1)), paint))
    for side in sides:
        near = view.depth(side.shoulder) + 0.3 * view.depth(side.hand)
        parts.append((near, partial(_arm, view, person, side)))
    return parts + _bag(view, person, sides, rings)


def _torso_rings(person: Person, side: Side) -> list[Ring]:
    """The surface of the upper body, from the collar to the hem of the upper garment."""
    body, hip, top = person.body, side.hip.y, side.shoulder.y + 0.04
    broad, deep = 0.128 * body.shoulders, 0.078 * body.bulk
    puff = {"jacket": 1.08, "hoodie": 1.1, "coat": 1.1}.get(person.upper.cut, 1.0)
    rings = [
        Ring(top + 0.022, 0.045, 0.04),
        Ring(top, broad * 0.86, deep * 0.75 * puff),
        Ring(top - 0.035, broad * 1.06, deep * 0.95 * puff),
        Ring(top - 0.12, broad * 0.98 * puff, deep * 1.08 * puff),
        Ring(hip + 0.07, 0.104 * body.bulk * puff, 0.08 * body.bulk * puff),
        Ring(hip - 0.01, 0.114 * body.bulk * puff, 0.09 * body.bulk * puff),
    ]
    coat = [Ring(hip - 0.17, 0.135 * body.bulk, 0.125 * body.bulk)]
    return rings + coat if person.upper.cut == "coat" else rings


def _torso(view: View, person: Person, rings: Sequence[Ring]) -> None:
    upper, skin = person.upper, person.body.skin
    view.tube(rings, upper)
    openings: dict[str, list[tuple[float, float, float, float, Color]]] = {
        "tank top": [(90, 40, 0.04, 0.22, skin), (270, 40, 0.04, 0.22, skin)],
        "jacket": [(0, 17, 0.06, 1, upper.second)],
        "coat": [(0, 3, 0.1, 1, darker(upper.color, 0.5))],
        "shirt": [(0, 22, 0.0, 0.09, darker(skin, 0.95))],
    }
    for opening in openings.get(upper.cut, []):
        view.patch(rings, *opening)
    middle, height = (0.34, 0.13) if upper.cut != "coat" else (0.24, 0.09)
    for width, tall, outline in LOGO_SHAPES[person.logo.kind]:
        view.stamp(rings, (0, middle), (width, tall * height), outline, person.logo.color)


def _arm(view: View, person: Person, side: Side) -> None:
    shoulder, elbow, hand = side.shoulder, side.elbow, side.hand
    upper, bulk = person.upper, 0.6 + 0.4 * person.body.bulk
    far = 0.8 if view.depth(shoulder) < -0.03 else 0.94
    skin = darker(person.body.skin, far)
    cloth = darker(upper.second if upper.pattern == "block" else upper.color, far)
    view.disc(view.at(hand), 0.026 * view.size, 0.03 * view.size, skin)
    if upper.cut in ("tank top", "t-shirt"):
        view.limb(elbow, hand, 0.028 * bulk, 0.02, skin)
        radii = (0.038, 0.03) if upper.cut == "tank top" else (0.036, 0.029)
        view.limb(shoulder, elbow, radii[0] * bulk, radii[1] * bulk, skin)
        if upper.cut == "t-shirt":
            view.limb(shoulder, along(shoulder, elbow, 0.6), 0.04 * bulk, 0.042 * bulk, cloth, cuff=True)
        return
    thick = bulk * (1.18 if upper.cut in ("hoodie", "coat", "jacket") else 1.0)
    view.limb(elbow, along(elbow, hand, 0.9), 0.034 * thick, 0.026 * thick, darker(upper.color, far))
    view.limb(shoulder, elbow, 0.042 * thick, 0.035 * thick, cloth)
    if upper.pattern in ("stripes", "checks"):
        radius, stripe = 0.034 * thick * view.size, (*darker(upper.second, far), 255)
        for a, b in ((shoulder, elbow), (elbow, hand)):
            for t in (0.2, 0.65):
                view.bone(view.at(along(a, b, t)), view.at(along(a, b, t + 0.2)), radius, radius, stripe)


def _bag(view: View, person: Person, sides: list[Side], rings: Sequence[Ring]) -> list[Part]:
    side, sign = (sides[0], 1) if person.left_handed else (sides[1], -1)
    color, bulk = person.bag.color, person.body.bulk
    if person.bag.kind == "backpack":
        front = view.depth(Point(0, 0, 0.1))
        near = max(0.001, front) if front > 0 else -1.0
        straps = [(near, partial(view.patch, rings, angle, 9, 0.06, 0.62, color)) for angle in (38, -38)]
        pack = partial(_backpack, view, side.shoulder.y - 0.12, bulk, color)
        return [(view.depth(Point(0, 0, -0.17)), pack), *straps]
    if person.bag.kind == "shoulder bag":
        hip = Point(sign * 0.17 * bulk, side.hip.y + 0.01, 0.02)
        near = 0.02 + max(0.0, view.depth(hip)) * 2 if view.depth(hip) > -0.05 else -0.4
        return [
            (0.001, partial(_strap, view, rings, sign, darker(color, 0.9))),
            (near, partial(_box, view, hip, 0.055, 0.1, 0.14, color)),
        ]
    if person.bag.kind == "handbag":
        near = view.depth(side.shoulder) + 0.3 * view.depth(side.hand) - 0.001
        return [(near, partial(_handbag, view, side.hand, color))]
    return []


def _box(view: View, center: Point, width: float, depth: float, height: float, color: Color) -> None:
    """A rounded box that turns with the body."""
    x, y = view.at(center)
    reach = view.reach(Ring(center.y, width, depth)) * 0.85
    half = height * view.size / 2
    view.draw.rounded_rectangle((x - reach, y - half, x + reach, y + half), radius=0.02 * view.size, fill=color)
    view.draw.line([(x - reach, y - half * 0.3), (x + reach, y - half * 0.3)], fill=SHADE, width=max(1, int(half / 5)))


def _backpack(view: View, height: float, bulk: float, color: Color) -> None:
    z = -0.13 * bulk
    _box(view, Point(0, height, z), 0.105, 0.075, 0.25, color)
    if view.turn[1] < -0.3:
        x, y = view.at(Point(0, height - 0.05, z - 0.02))
        r = 0.06 * view.size
        pocket = x - r, y - r * 0.6, x + r, y + r * 0.7
        view.draw.rounded_rectangle(pocket, radius=r * 0.3, fill=darker(color, 0.7))


def _handbag(view: View, hand: Point, color: Color) -> None:
    x, y = view.at(hand)
    r = 0.04 * view.size
    view.draw.arc((x - r, y - r * 0.6, x + r, y + r * 2), 180, 360, fill=darker(color, 0.7), width=max(1, int(r / 4)))
    _box(view, hand._replace(y=hand.y - 0.1), 0.045, 0.095, 0.12, color)


def _strap(view: View, rings: Sequence[Ring], sign: int, color: Color) -> None:
    """A band from the far shoulder to the hip that carries the bag, across chest or back."""
    start, end = (180 + sign * 50, 180 - sign * 80) if view.turn[1] < 0 else (-sign * 50, sign * 80)
    path = [(ring_at(rings, 0.06 + 0.8 * t), start + (end - start) * t) for t in (k / 8 for k in range(9))]
    line = [view.on(ring, angle) for ring, angle in path if view.sees(angle)]
    if len(line) > 1:
        view.line(line, 0.026, color)


def _head(view: View, person: Person, head: Point) -> None:
    """Hair all around, and the face on the side that faces the camera."""
    sin, cos = view.turn
    x, y = view.at(head)
    rx, ry = HEAD_WIDTH * view.size, HEAD_HEIGHT * view.size
    style, hair, skin = person.hair.kind, person.hair.color, person.body.skin
    if style == "afro":
        view.disc((x - 0.012 * view.size * sin, y - ry * 0.3), rx * 1.5, ry * 1.22, hair)
    elif style == "bun":
        view.disc(view.at(Point(0, head.y + 0.075, head.z - 0.04)), rx * 0.5, rx * 0.5, hair)
    view.disc((x, y), rx, ry, skin if style == "bald" else hair)
    if style in ("short", "bun", "ponytail", "afro"):
        view.disc((x + rx * 0.1 * sin, y + ry * 0.72), rx * 0.6, ry * 0.3, darker(skin, 0.92))
    shown = max(0.0, 0.62 + 0.5 * cos)
    if shown > 0.33 and style != "bald":
        view.disc((x + rx * 0.52 * sin, y + ry * 0.2), rx * min(0.86, shown), ry * 0.76, skin)
    for side in (-26, 26):
        if view.sees(side):
            eye = x + rx * 0.86 * math.sin(math.radians(view.pose.heading + side))
            view.disc((eye, y + ry * 0.08), rx * 0.13, ry * 0.09, (34, 26, 24))
    if cos > -0.1:
        view.disc((x + rx * 0.95 * sin, y + ry * 0.3), rx * 0.15, ry * 0.13, darker(skin, 0.84))
        view.disc((x + rx * 0.72 * sin, y + ry * 0.6), rx * 0.24 * max(0.3, cos), ry * 0.06, (150, 70, 66))
    if cos < 0.75 and style not in ("bald", "short"):
        side = -1 if sin > 0 else 1
        view.disc((x + side * rx * 0.45, y + ry * 0.15), rx * 0.55, ry * 0.8, hair)
    view.disc((x - view.light * rx * 0.45, y), rx * 0.5, ry * 0.85, (0, 0, 0, 38))


def _falling_hair(view: View, person: Person, head: Point) -> None:
    """Hair that hangs down the back."""
    if person.hair.kind in FALLING_HAIR:
        *ends, (ra, rb) = FALLING_HAIR[person.hair.kind]
        start, end = (view.at(Point(0, head.y + above, z)) for above, z in ends)
        view.bone(start, end, ra * view.size, rb * view.size, person.hair.color)


def _hat(view: View, person: Person, head: Point) -> None:
    """A cap, beanie or sun hat on top of everything else."""
    kind, color = person.hat
    if kind == "none":
        return
    (x, y), (sin, cos) = view.at(head), view.turn
    rx, ry = HEAD_WIDTH * view.size, HEAD_HEIGHT * view.size
    brim = y - ry * 0.28
    view.draw.pieslice((x - rx * 1.1, y - ry * 1.2, x + rx * 1.1, y + ry * 0.6), 180, 360, fill=color)
    if kind == "cap" and cos > -0.4:
        view.disc((x + rx * 0.85 * sin, brim), rx * (0.8 - 0.15 * abs(sin)), ry * 0.15, darker(color, 0.7))
    elif kind == "sun hat":
        view.disc((x, brim), rx * 2.0, ry * 0.26, darker(color, 0.85))
    elif kind == "beanie":
        view.draw.rectangle((x - rx * 1.1, brim - ry * 0.12, x + rx * 1.1, brim + ry * 0.1), fill=darker(color, 0.72))
        view.disc((x, y - ry * 1.2), rx * 0.32, rx * 0.32, darker(color, 0.9))
