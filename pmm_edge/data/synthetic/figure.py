"""How a body stands and walks: its joints and the surface of its torso."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from pmm_edge.data.synthetic.canvas import (
    SHADE,
    Pixel,
    Point,
    Pose,
    Ring,
    View,
    along,
    bone,
    darker,
    disc,
    limb,
    patch,
    ring_at,
    stamp,
    tube,
)
from pmm_edge.data.synthetic.person import Colour, Garment, Person


@dataclass(frozen=True)
class Side:
    """The joints of one leg and one arm."""

    hip: Point
    knee: Point
    ankle: Point
    shoulder: Point
    elbow: Point
    hand: Point


@dataclass(frozen=True)
class Skeleton:
    """All joints of one pose; `sides` are left and right."""

    sides: tuple[Side, Side]
    neck: Point
    head: Point


def pose_skeleton(person: Person, pose: Pose) -> Skeleton:
    """Joints of a walking body: legs and arms swing in opposite phase, the leg that comes forward bends."""
    hip_y = 0.48 * person.body.legs + 0.045
    bob = 0.012 * pose.stride * math.cos(2 * pose.phase)
    top = hip_y + 0.30 + bob
    return Skeleton(
        sides=(_side(person, pose, 1, hip_y + bob, top), _side(person, pose, -1, hip_y + bob, top)),
        neck=Point(0, top + 0.02, 0.005),
        head=Point(0, top + 0.105, 0.018),
    )


def _side(person: Person, pose: Pose, side: int, hip_y: float, top: float) -> Side:
    """The left (side 1) or right (-1) leg and arm; they are half a step apart."""
    body, phase = person.body, pose.phase + (0.0 if side > 0 else math.pi)
    thigh = 0.5 * pose.stride * math.sin(phase)
    bend = 0.08 + 0.85 * pose.stride * max(0.0, math.cos(phase)) ** 1.5
    hip = Point(side * 0.058 * body.bulk, hip_y, 0)
    knee = _swing(hip, 0.24 * body.legs, thigh)
    carries = person.bag.kind == "handbag" and (side > 0) == person.left_handed
    arm = -thigh * (0.25 if carries else 1.0)
    shoulder = Point(side * (0.114 * body.shoulders + 0.02 * (body.bulk - 1)), top - 0.04, 0)
    elbow = _swing(shoulder, 0.155, arm - 0.05, side * 0.03)
    return Side(
        hip=hip,
        knee=knee,
        ankle=_swing(knee, 0.24 * body.legs, thigh - bend),
        shoulder=shoulder,
        elbow=elbow,
        hand=_swing(elbow, 0.15, arm + (0.1 if carries else 0.35), side * 0.004),
    )


def _swing(start: Point, length: float, angle: float, spread: float = 0.0) -> Point:
    """The end of a bone that hangs from `start`, swung forward by `angle` radians."""
    return Point(start.x + spread, start.y - length * math.cos(angle), start.z + length * math.sin(angle))


def torso_rings(person: Person, bones: Skeleton) -> list[Ring]:
    """The surface of the upper body, from the collar to the hem of the upper garment."""
    body, hip = person.body, bones.sides[0].hip.y
    top = bones.sides[0].shoulder.y + 0.04
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
    if person.upper.cut == "coat":
        rings.append(Ring(hip - 0.17, 0.135 * body.bulk, 0.125 * body.bulk))
    return rings


def carried(view: View, person: Person, bones: Skeleton) -> list[tuple[float, Callable[[], None]]]:
    """What is carried, each with its depth."""
    side = 0 if person.left_handed else 1
    if person.bag.kind == "backpack":
        straps = view.depth(Point(0, 0, 0.1))
        return [
            (view.depth(Point(0, 0, -0.17)), lambda: _backpack(view, person, bones)),
            (max(0.001, straps) if straps > 0 else -1.0, lambda: _straps(view, person, bones)),
        ]
    if person.bag.kind == "shoulder bag":
        hip = Point((0.17, -0.17)[side] * person.body.bulk, bones.sides[0].hip.y + 0.01, 0.02)
        near = 0.02 + max(0.0, view.depth(hip)) * 2 if view.depth(hip) > -0.05 else -0.4
        return [
            (0.001, lambda: _strap(view, person, bones, side)),
            (near, lambda: _box(view, hip, 0.055, 0.1, 0.14, person.bag.colour)),
        ]
    if person.bag.kind == "handbag":
        hand = bones.sides[side].hand
        low = hand._replace(y=hand.y - 0.1)
        near = view.depth(bones.sides[side].shoulder) + 0.3 * view.depth(hand) - 0.001
        return [(near, lambda: _handbag(view, hand, low, person.bag.colour))]
    return []


def _box(view: View, centre: Point, width: float, depth: float, height: float, colour: Colour) -> None:
    """A bag: a rounded box that turns with the body."""
    x, y = view.at(centre)
    reach = view.reach(Ring(centre.y, width, depth)) * 0.85
    half = height * view.size / 2
    view.draw.rounded_rectangle((x - reach, y - half, x + reach, y + half), radius=0.02 * view.size, fill=colour)
    view.draw.line([(x - reach, y - half * 0.3), (x + reach, y - half * 0.3)], fill=SHADE, width=max(1, int(half / 5)))


def _backpack(view: View, person: Person, bones: Skeleton) -> None:
    centre = Point(0, bones.sides[0].shoulder.y - 0.12, -0.13 * person.body.bulk)
    _box(view, centre, 0.105, 0.075, 0.25, person.bag.colour)
    x, y = view.at(centre._replace(y=centre.y - 0.05, z=centre.z - 0.02))
    if math.cos(math.radians(view.pose.heading)) < -0.3:
        r = 0.06 * view.size
        view.draw.rounded_rectangle(
            (x - r, y - r * 0.6, x + r, y + r * 0.7), radius=r * 0.3, fill=darker(person.bag.colour, 0.7)
        )


def _straps(view: View, person: Person, bones: Skeleton) -> None:
    rings = torso_rings(person, bones)
    for angle in (38, -38):
        patch(view, rings, angle, 9, 0.06, 0.62, person.bag.colour)


def _strap(view: View, person: Person, bones: Skeleton, side: int) -> None:
    """A band from the far shoulder to the hip that carries the bag, across chest or back."""
    rings = torso_rings(person, bones)
    sign = (1, -1)[side]
    back = math.cos(math.radians(view.pose.heading)) < 0
    angles = (180 + sign * 50, 180 - sign * 80) if back else (-sign * 50, sign * 80)
    path = [
        (ring_at(rings, 0.06 + 0.8 * t), angles[0] + (angles[1] - angles[0]) * t) for t in (k / 8 for k in range(9))
    ]
    line = [view.at(view.on(ring, angle)) for ring, angle in path if view.seen(angle)]
    if len(line) > 1:
        view.draw.line(line, fill=darker(person.bag.colour, 0.9), width=max(1, round(0.026 * view.size)), joint="curve")


def _handbag(view: View, hand: Point, low: Point, colour: Colour) -> None:
    x, y = view.at(hand)
    r = 0.04 * view.size
    view.draw.arc((x - r, y - r * 0.6, x + r, y + r * 2), 180, 360, fill=darker(colour, 0.7), width=max(1, int(r / 4)))
    _box(view, low, 0.045, 0.095, 0.12, colour)


HEAD_WIDTH, HEAD_HEIGHT = 0.058, 0.073


def draw_head(view: View, person: Person, head: Point) -> None:
    """Hair all around, and the face on the side that looks at the camera."""
    size, heading = view.size, math.radians(view.pose.heading)
    sin, cos = math.sin(heading), math.cos(heading)
    x, y = view.at(head)
    rx, ry = HEAD_WIDTH * size, HEAD_HEIGHT * size
    hair, skin = person.hair.colour, person.body.skin
    bald = person.hair.kind == "bald"
    if person.hair.kind == "afro":
        disc(view, (x - 0.012 * size * sin, y - ry * 0.3), rx * 1.5, ry * 1.22, hair)
    elif person.hair.kind == "bun":
        disc(view, view.at(Point(0, head.y + 0.075, head.z - 0.04)), rx * 0.5, rx * 0.5, hair)
    disc(view, (x, y), rx, ry, skin if bald else hair)
    if person.hair.kind in ("short", "bun", "ponytail", "afro"):
        disc(view, (x + rx * 0.1 * sin, y + ry * 0.72), rx * 0.6, ry * 0.3, darker(skin, 0.92))
    shown = max(0.0, 0.62 + 0.5 * cos)
    if shown > 0.33 and not bald:
        disc(view, (x + rx * 0.52 * sin, y + ry * 0.2), rx * min(0.86, shown), ry * 0.76, skin)
    _face(view, (x, y), rx, ry, skin, (sin, cos))
    if not bald and cos < 0.75 and person.hair.kind != "short":
        side = -1 if sin > 0 else 1
        disc(view, (x + side * rx * 0.45, y + ry * 0.15), rx * 0.55, ry * 0.8, hair)
    disc(view, (x - view.light * rx * 0.45, y), rx * 0.5, ry * 0.85, (0, 0, 0, 38))


def _face(view: View, centre: Pixel, rx: float, ry: float, skin: Colour, turn: tuple[float, float]) -> None:
    sin, cos = turn
    x, y = centre
    for side in (-26, 26):
        if view.seen(side):
            at = x + rx * 0.86 * math.sin(math.radians(view.pose.heading + side))
            disc(view, (at, y + ry * 0.08), rx * 0.13, ry * 0.09, (34, 26, 24))
    if cos > -0.1:
        disc(view, (x + rx * 0.95 * sin, y + ry * 0.3), rx * 0.15, ry * 0.13, darker(skin, 0.84))
        disc(view, (x + rx * 0.72 * sin, y + ry * 0.6), rx * 0.24 * max(0.3, cos), ry * 0.06, (150, 70, 66))


def draw_hood(view: View, person: Person, bones: Skeleton) -> None:
    """The hood of a hoodie, which hangs behind the neck."""
    if person.upper.cut == "hoodie":
        hood = view.at(Point(0, bones.neck.y - 0.015, -0.055))
        disc(view, hood, 0.08 * view.size, 0.048 * view.size, darker(person.upper.colour, 0.78))


def draw_falling_hair(view: View, person: Person, bones: Skeleton) -> None:
    """Hair that hangs down the back."""
    hair, size, head = person.hair, view.size, bones.head
    if hair.kind == "long":
        top, end = view.at(Point(0, head.y, -0.015)), view.at(Point(0, head.y - 0.21, -0.06))
        bone(view, top, end, 0.062 * size, 0.066 * size, hair.colour)
    elif hair.kind == "bob":
        bone(view, view.at(head), view.at(Point(0, head.y - 0.055, -0.01)), 0.064 * size, 0.062 * size, hair.colour)
    elif hair.kind == "ponytail":
        root, end = view.at(Point(0, head.y + 0.03, -0.055)), view.at(Point(0, head.y - 0.17, -0.1))
        bone(view, root, end, 0.024 * size, 0.02 * size, hair.colour)


def draw_hat(view: View, person: Person, head: Point) -> None:
    """A cap, beanie or sun hat, seen over everything else on the head."""
    kind, colour = person.hat.kind, person.hat.colour
    if kind == "none":
        return
    x, y = view.at(head)
    rx, ry = HEAD_WIDTH * view.size, HEAD_HEIGHT * view.size
    sin, cos = math.sin(math.radians(view.pose.heading)), math.cos(math.radians(view.pose.heading))
    brim = y - ry * 0.28
    view.draw.pieslice((x - rx * 1.1, y - ry * 1.2, x + rx * 1.1, y + ry * 0.6), 180, 360, fill=colour)
    if kind == "cap" and cos > -0.4:
        disc(view, (x + rx * 0.85 * sin, brim), rx * (0.8 - 0.15 * abs(sin)), ry * 0.15, darker(colour, 0.7))
    elif kind == "sun hat":
        disc(view, (x, brim), rx * 2.0, ry * 0.26, darker(colour, 0.85))
    elif kind == "beanie":
        view.draw.rectangle((x - rx * 1.1, brim - ry * 0.12, x + rx * 1.1, brim + ry * 0.1), fill=darker(colour, 0.72))
        disc(view, (x, y - ry * 1.2), rx * 0.32, rx * 0.32, darker(colour, 0.9))


SQUARE: tuple[Pixel, ...] = ((-1, -1), (0, -1), (1, -1), (1, 1), (0, 1), (-1, 1))
CIRCLE: tuple[Pixel, ...] = tuple((math.cos(k * math.pi / 8), math.sin(k * math.pi / 8)) for k in range(16))
LOGO_SHAPES: dict[str, tuple[tuple[float, float, tuple[Pixel, ...]], ...]] = {
    "square": ((36, 1.0, SQUARE),),
    "bar": ((62, 0.55, SQUARE),),
    "disc": ((42, 1.15, CIRCLE),),
    "triangle": ((46, 1.2, ((0, -1), (1, 1), (0, 1), (-1, 1))),),
    "cross": ((13, 1.4, SQUARE), (46, 0.45, SQUARE)),
}
"""Kind of logo -> its shapes: half its width in degrees, half its height as a factor, its outline."""


def draw_person(view: View, person: Person) -> None:
    """Paint `person` onto the view's canvas: legs, then what is above them from far to near, then the head."""
    bones = pose_skeleton(person, view.pose)
    for side in sorted(bones.sides, key=lambda s: view.depth(s.hip) + 0.1 * view.depth(s.knee)):
        _leg(view, person, side)
    _skirt(view, person, bones)
    neck, chest = view.at(bones.neck), view.at(bones.neck._replace(y=bones.neck.y - 0.05, z=0))
    bone(view, neck, chest, 0.03 * view.size, 0.04 * view.size, darker(person.body.skin, 0.85))
    hair_in_front = view.depth(Point(0, 0, -0.16)) > 0.03
    if not hair_in_front:
        draw_falling_hair(view, person, bones)
    for _, paint in sorted(_upper_parts(view, person, bones), key=lambda part: part[0]):
        paint()
    draw_head(view, person, bones.head)
    if hair_in_front:
        draw_falling_hair(view, person, bones)
    draw_hat(view, person, bones.head)


def _upper_parts(view: View, person: Person, bones: Skeleton) -> list[tuple[float, Callable[[], None]]]:
    """Torso, arms, hood and bag, each with its depth; the torso's is 0."""
    parts: list[tuple[float, Callable[[], None]]] = [
        (0.0, partial(_torso, view, person, bones)),
        (view.depth(Point(0, 0, -0.1)), partial(draw_hood, view, person, bones)),
    ]
    for side in bones.sides:
        near = view.depth(side.shoulder) + 0.3 * view.depth(side.hand)
        parts.append((near, partial(_arm, view, person, side)))
    return parts + carried(view, person, bones)


def _leg(view: View, person: Person, side: Side) -> None:
    far = 0.78 if view.depth(side.hip) < -0.02 else 1.0
    if person.lower.cut in ("shorts", "skirt", "long skirt"):
        _bare_leg(view, person, side, far)
    else:
        _shoe(view, person, side, far)
        _trouser_leg(view, person, side, far)
    if person.shoes.kind == "boots":
        colour = darker(person.shoes.colour, 0.6 + 0.4 * far)
        shaft = along(side.ankle, side.knee, 0.42)
        limb(view, shaft, side.ankle, 0.044 * person.body.bulk, 0.036, colour)


def _bare_leg(view: View, person: Person, side: Side, far: float) -> None:
    bulk, skin = person.body.bulk, darker(person.body.skin, far)
    limb(view, side.hip, side.knee, 0.055 * bulk, 0.04 * bulk, skin)
    limb(view, side.knee, side.ankle, 0.038 * bulk, 0.024, skin)
    _shoe(view, person, side, far)
    if person.lower.cut == "shorts":
        end = along(side.hip, side.knee, 0.85)
        limb(view, side.hip, end, 0.064 * bulk, 0.062 * bulk, darker(person.lower.colour, far), cuff=True)


def _trouser_leg(view: View, person: Person, side: Side, far: float) -> None:
    cut, bulk, cloth = person.lower.cut, person.body.bulk, darker(person.lower.colour, far)
    wide = {"wide": 1.35, "slim": 0.86}.get(cut, 1.0)
    radii = 0.062 * bulk * wide, 0.045 * bulk * wide, 0.036 * wide * (1.3 if cut == "wide" else 1.0)
    limb(view, side.knee, along(side.knee, side.ankle, 0.93), radii[1], radii[2], cloth, cuff=True)
    limb(view, side.hip, side.knee, radii[0], radii[1], cloth)
    _trouser_pattern(view, person.lower, (side.hip, side.knee, side.ankle), radii, far)


def _trouser_pattern(
    view: View,
    lower: Garment,
    joints: tuple[Point, Point, Point],
    radii: tuple[float, float, float],
    far: float,
) -> None:
    second = darker(lower.second, far)
    outward = 1 if joints[0].x > 0 else -1
    if lower.pattern == "side stripe" and view.seen(90 * outward):
        hip, knee, ankle = (
            view.at(Point(j.x + outward * r * 0.8, j.y, j.z)) for j, r in zip(joints, radii, strict=True)
        )
        view.draw.line([hip, knee, ankle], fill=second, width=max(1, round(0.026 * view.size)), joint="curve")
    if lower.pattern == "checks":
        bones = ((joints[0], joints[1], radii[0], radii[1]), (joints[1], joints[2], radii[1], radii[2]))
        for a, b, ra, rb in bones:
            for t in (0.2, 0.55, 0.9):
                (x, y), r = view.at(along(a, b, t)), (ra + (rb - ra) * t) * view.size
                view.draw.line([(x - r, y), (x + r, y)], fill=second, width=max(1, round(0.02 * view.size)))


def _shoe(view: View, person: Person, side: Side, far: float) -> None:
    """A shoe that follows the shin: flat under a vertical one, toe down under a lifted one."""
    ankle, lift = side.ankle, (side.knee.z - side.ankle.z) * 0.9
    heel = Point(ankle.x, ankle.y - 0.012, ankle.z - 0.018)
    toe = Point(ankle.x * 1.12, ankle.y - 0.016 - 0.25 * max(0.0, lift), ankle.z + 0.088)
    if person.shoes.kind == "trainers":
        sole = (228, 226, 220) if sum(person.shoes.colour) < 600 else (90, 90, 96)
        limb(view, heel._replace(y=heel.y - 0.014), toe._replace(y=toe.y - 0.012), 0.03, 0.026, sole)
    limb(view, heel, toe, 0.034, 0.027, darker(person.shoes.colour, 0.6 + 0.4 * far))


def _skirt(view: View, person: Person, bones: Skeleton) -> None:
    if person.lower.cut not in ("skirt", "long skirt"):
        return
    bulk, hip = person.body.bulk, bones.sides[0].hip.y
    length = 0.24 if person.lower.cut == "skirt" else 0.4
    flare = 0.02 + 0.1 * view.pose.stride * abs(math.sin(view.pose.phase))
    rings = [
        Ring(hip + 0.06, 0.098 * bulk, 0.075 * bulk),
        Ring(hip - 0.05, 0.125 * bulk, 0.1 * bulk),
        Ring(hip - length, 0.15 * bulk, 0.12 * bulk + flare * length * 2),
    ]
    tube(view, rings, person.lower)


def _torso(view: View, person: Person, bones: Skeleton) -> None:
    rings = torso_rings(person, bones)
    upper = person.upper
    tube(view, rings, upper)
    if upper.cut == "tank top":
        for side in (90, 270):
            patch(view, rings, side, 40, 0.04, 0.22, person.body.skin)
    if upper.cut == "jacket":
        patch(view, rings, 0, 17, 0.06, 1, upper.second)
    if upper.cut == "coat":
        patch(view, rings, 0, 3, 0.1, 1, darker(upper.colour, 0.5))
    if upper.cut == "shirt":
        patch(view, rings, 0, 22, 0.0, 0.09, darker(person.body.skin, 0.95))
    _logo(view, person, rings)


def _logo(view: View, person: Person, rings: Sequence[Ring]) -> None:
    """A print on the chest: gone from behind, a sliver from the side."""
    if person.logo.kind != "none":
        middle, height = (0.34, 0.13) if person.upper.cut != "coat" else (0.24, 0.09)
        for width, tall, outline in LOGO_SHAPES[person.logo.kind]:
            stamp(view, rings, (0, middle), (width, tall * height), outline, person.logo.colour)


def _arm(view: View, person: Person, side: Side) -> None:
    shoulder, elbow, hand = side.shoulder, side.elbow, side.hand
    upper, bulk = person.upper, 0.6 + 0.4 * person.body.bulk
    far = 0.8 if view.depth(shoulder) < -0.03 else 0.94
    skin = darker(person.body.skin, far)
    cloth = darker(upper.second if upper.pattern == "block" else upper.colour, far)
    disc(view, view.at(hand), 0.026 * view.size, 0.03 * view.size, skin)
    if upper.cut == "tank top":
        limb(view, elbow, hand, 0.028 * bulk, 0.02, skin)
        limb(view, shoulder, elbow, 0.038 * bulk, 0.03 * bulk, skin)
        return
    if upper.cut == "t-shirt":
        limb(view, elbow, hand, 0.028 * bulk, 0.02, skin)
        limb(view, shoulder, elbow, 0.036 * bulk, 0.029 * bulk, skin)
        limb(view, shoulder, along(shoulder, elbow, 0.6), 0.04 * bulk, 0.042 * bulk, cloth, cuff=True)
        return
    thick = bulk * (1.18 if upper.cut in ("hoodie", "coat", "jacket") else 1.0)
    lower = darker(upper.colour, far)
    limb(view, elbow, along(elbow, hand, 0.9), 0.034 * thick, 0.026 * thick, lower)
    limb(view, shoulder, elbow, 0.042 * thick, 0.035 * thick, cloth)
    if upper.pattern in ("stripes", "checks"):
        _sleeve_stripes(view, (shoulder, elbow, hand), 0.034 * thick, darker(upper.second, far))


def _sleeve_stripes(view: View, joints: tuple[Point, Point, Point], radius: float, colour: Colour) -> None:
    shoulder, elbow, hand = joints
    for a, b in ((shoulder, elbow), (elbow, hand)):
        for t in (0.2, 0.65):
            start, end = view.at(along(a, b, t)), view.at(along(a, b, t + 0.2))
            bone(view, start, end, radius * view.size, radius * view.size, (*colour, 255))
