"""Drawing a person: legs, garments, arms and prints, painted from far to near."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from pmm_edge.data.synthetic.bags import carried
from pmm_edge.data.synthetic.canvas import Pixel, Point, Ring, View, along, bone, darker, disc, limb, patch, stamp, tube
from pmm_edge.data.synthetic.head import draw_falling_hair, draw_hat, draw_head, draw_hood
from pmm_edge.data.synthetic.person import Colour, Garment, Person
from pmm_edge.data.synthetic.skeleton import Side, Skeleton, pose_skeleton, torso_rings

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
