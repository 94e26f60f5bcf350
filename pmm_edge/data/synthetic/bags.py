"""What people carry: backpacks, shoulder bags, handbags."""

from __future__ import annotations

import math
from collections.abc import Callable

from pmm_edge.data.synthetic.canvas import SHADE, Point, Ring, View, darker, patch, ring_at
from pmm_edge.data.synthetic.person import Colour, Person
from pmm_edge.data.synthetic.skeleton import Skeleton, torso_rings


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
