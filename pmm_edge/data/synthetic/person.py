"""Who is drawn: the attributes of one synthetic person.

People come in groups that wear the same upper and lower garment. Within a group hair, shoes and logo all differ,
hat and bag often do: the most salient region cannot tell its members apart, which is what the paper is about
(section 1).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Colour = tuple[int, int, int]
T = TypeVar("T")

CLOTH: tuple[Colour, ...] = (
    (28, 28, 32), (36, 36, 42), (54, 56, 62), (92, 94, 100), (165, 166, 170), (236, 234, 228), (228, 226, 224),
    (32, 40, 78), (38, 52, 100), (34, 58, 50), (150, 40, 46), (196, 60, 48), (206, 180, 92), (70, 112, 74),
    (70, 124, 168), (112, 78, 138), (206, 146, 164), (112, 80, 58), (196, 174, 140), (84, 150, 148),
)  # fmt: skip
"""Mostly the blacks, greys, whites and blues that crowds wear: clothes of two groups are often alike."""
DENIM: tuple[Colour, ...] = (
    (28, 28, 32), (34, 34, 40), (30, 38, 66), (46, 62, 100), (62, 84, 128), (124, 146, 180), (84, 84, 88),
    (190, 172, 138), (92, 68, 48), (64, 76, 54),
)  # fmt: skip
VIVID: tuple[Colour, ...] = (
    (244, 244, 240), (24, 24, 26), (216, 30, 36), (30, 90, 214), (246, 208, 30), (34, 164, 72), (240, 112, 24),
    (226, 60, 160), (70, 206, 222), (128, 84, 48),
)  # fmt: skip
SHOE_COLOURS: tuple[Colour, ...] = (
    (22, 22, 24), (238, 236, 230), (128, 128, 132), (112, 74, 46), (200, 34, 40), (36, 66, 160), (232, 196, 40),
    (46, 140, 78), (226, 112, 36), (196, 172, 136), (120, 190, 206),
)  # fmt: skip
BAG_COLOURS: tuple[Colour, ...] = (
    (26, 26, 28), (60, 62, 68), (108, 72, 46), (40, 50, 84), (160, 40, 46), (70, 84, 56), (176, 150, 110),
    (196, 100, 50),
)  # fmt: skip
HAIR: tuple[Colour, ...] = (
    (22, 18, 18), (30, 24, 24), (52, 36, 28), (84, 56, 34), (124, 84, 46), (212, 180, 110), (150, 66, 34),
    (170, 170, 172),
)  # fmt: skip
SKIN: tuple[Colour, ...] = ((246, 214, 188), (230, 188, 154), (202, 152, 112), (150, 102, 70), (98, 64, 46))

UPPER_CUTS = ("t-shirt", "shirt", "tank top", "jacket", "hoodie", "coat")
UPPER_PATTERNS = ("plain", "plain", "plain", "plain", "stripes", "columns", "checks", "block")
LOWER_CUTS = ("trousers", "trousers", "slim", "wide", "shorts", "skirt", "long skirt")
LOWER_PATTERNS = ("plain", "plain", "plain", "plain", "plain", "side stripe", "checks")
HAIR_STYLES = ("short", "bald", "bob", "long", "ponytail", "bun", "afro", "short")
LOGOS = ("none", "square", "disc", "bar", "cross", "triangle", "disc", "square", "bar", "cross")
BAGS = ("none", "none", "none", "none", "backpack", "shoulder bag", "handbag", "backpack")
HATS = ("none", "none", "none", "none", "none", "none", "cap", "beanie", "sun hat")
SHOES = ("trainers", "boots", "low", "low")
MAX_GROUP = len(HAIR)


@dataclass(frozen=True)
class Garment:
    """A piece of clothing; `second` is the colour of its pattern, or of what a jacket shows when open."""

    cut: str
    pattern: str
    colour: Colour
    second: Colour


@dataclass(frozen=True)
class Detail:
    """A small clue: hair, hat, shoes, logo or bag. Kind `none` is not drawn."""

    kind: str
    colour: Colour


NOTHING = Detail("none", (0, 0, 0))


@dataclass(frozen=True)
class Body:
    """Proportions as factors of an average body, and the tone of the skin."""

    height: float
    bulk: float
    shoulders: float
    legs: float
    skin: Colour


@dataclass(frozen=True)
class Person:
    """Everything that stays the same about one person in all images."""

    body: Body
    upper: Garment
    lower: Garment
    hair: Detail
    hat: Detail
    shoes: Detail
    logo: Detail
    bag: Detail
    left_handed: bool
    """The side that carries the bag."""


@functools.lru_cache(maxsize=4096)
def make_person(seed: int, pid: int, group_size: int) -> Person:
    """The person `pid` >= 1 of the data set `seed`; pids 1..group_size are one group, and so on."""
    group, member = divmod(pid - 1, group_size)
    rng = np.random.default_rng((seed, 1, group))
    upper, lower = _upper(rng), _lower(rng)
    shoe_colours = [colour for colour in SHOE_COLOURS if _apart(colour, lower.colour)]
    logo_colours = [colour for colour in VIVID if _apart(colour, upper.colour) and _apart(colour, upper.second)]
    own = np.random.default_rng((seed, 2, pid))
    return Person(
        body=_body(own),
        upper=upper,
        lower=lower,
        hair=_detail(rng, HAIR_STYLES, HAIR, member),
        hat=_detail(rng, HATS, VIVID, member),
        shoes=Detail(_one(own, SHOES), _dealt(rng, shoe_colours, member)),
        logo=_detail(rng, LOGOS, logo_colours, member),
        bag=_detail(rng, BAGS, BAG_COLOURS, member),
        left_handed=bool(own.random() < 0.5),
    )


def _detail(rng: np.random.Generator, kinds: Sequence[str], colours: Sequence[Colour], member: int) -> Detail:
    kind, colour = _dealt(rng, kinds, member), _dealt(rng, colours, member)
    return NOTHING if kind == "none" else Detail(kind, colour)


def _upper(rng: np.random.Generator) -> Garment:
    colour, second = _two_colours(rng, CLOTH)
    cut = _one(rng, UPPER_CUTS)
    return Garment(cut, "plain" if cut == "jacket" else _one(rng, UPPER_PATTERNS), colour, second)


def _lower(rng: np.random.Generator) -> Garment:
    colour, second = _two_colours(rng, DENIM)
    return Garment(_one(rng, LOWER_CUTS), _one(rng, LOWER_PATTERNS), colour, second)


def _body(rng: np.random.Generator) -> Body:
    height, bulk, shoulders, legs = 1 + rng.uniform(-1, 1, 4) * (0.06, 0.16, 0.1, 0.06)
    return Body(float(height), float(bulk), float(shoulders), float(legs), _one(rng, SKIN))


def _one(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _dealt(rng: np.random.Generator, options: Sequence[T], member: int) -> T:
    """Shuffle `options` for a whole group and give each member its own."""
    return options[int(rng.permutation(len(options))[member % len(options)])]


def _two_colours(rng: np.random.Generator, palette: tuple[Colour, ...]) -> tuple[Colour, Colour]:
    first = _one(rng, palette)
    return first, _one(rng, tuple(c for c in palette if _apart(c, first)))


def _apart(a: Colour, b: Colour) -> bool:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) > 130
