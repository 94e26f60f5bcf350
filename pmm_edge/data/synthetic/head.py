"""Hair, face and hat."""

from __future__ import annotations

import math

from pmm_edge.data.synthetic.canvas import Pixel, Point, View, bone, darker, disc
from pmm_edge.data.synthetic.person import Colour, Person
from pmm_edge.data.synthetic.skeleton import Skeleton

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
