"""How a body stands and walks: its joints and the surface of its torso."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pmm_edge.data.synthetic.canvas import Point, Pose, Ring
from pmm_edge.data.synthetic.person import Person


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
