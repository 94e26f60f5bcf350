"""The attributes of synthetic people. Groups of them wear the same upper and lower garment.

Within a group, hair, shoes and logo always differ, hat and bag often do: the most salient region does not identify a
person, which is the problem that the paper addresses (section 1).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

Color = tuple[int, ...]  # red, green, blue, and how opaque it is
T = TypeVar("T")


def palette(colors: str) -> tuple[Color, ...]:
    """Parse colors written as RRGGBB and separated by spaces."""
    return tuple(tuple(bytes.fromhex(color)) for color in colors.split())


# Mostly black, gray, white and blue, as in real crowds: the clothes of two groups often look alike.
CLOTH = palette(
    "1c1c20 24242a 36383e 5c5e64 a5a6aa eceae4 e4e2e0 20284e 263464 223a32"
    " 96282e c43c30 ceb45c 46704a 467ca8 704e8a ce92a4 70503a c4ae8c 549694"
)
DENIM = palette("1c1c20 222228 1e2642 2e3e64 3e5480 7c92b4 545458 beac8a 5c4430 404c36")
VIVID = palette("f4f4f0 18181a d81e24 1e5ad6 f6d01e 22a448 f07018 e23ca0 46cede 805430")
SHOE_COLORS = palette("161618 eeece6 808084 704a2e c82228 2442a0 e8c428 2e8c4e e27024 c4ac88 78bece")
BAG_COLORS = palette("1a1a1c 3c3e44 6c482e 283254 a0282e 465438 b0966e c46432")
HAIR = palette("161212 1e1818 34241c 543822 7c542e d4b46e 964222 aaaaac")
SKIN = palette("f6d6bc e6bc9a ca9870 966646 62402e")

# Repeated values are drawn more often.
UPPER_CUTS = ("t-shirt", "shirt", "tank top", "jacket", "hoodie", "coat")
UPPER_PATTERNS = (*["plain"] * 4, "stripes", "columns", "checks", "block")
LOWER_CUTS = ("trousers", "trousers", "slim", "wide", "shorts", "skirt", "long skirt")
LOWER_PATTERNS = (*["plain"] * 5, "side stripe", "checks")
HAIR_STYLES = ("short", "bald", "bob", "long", "ponytail", "bun", "afro", "short")
LOGOS = ("none", "square", "disc", "bar", "cross", "triangle", "disc", "square", "bar", "cross")
BAGS = (*["none"] * 4, "backpack", "shoulder bag", "handbag", "backpack")
HATS = (*["none"] * 6, "cap", "beanie", "sun hat")
SHOES = ("trainers", "boots", "low", "low")
MAX_GROUP = len(HAIR)


class Item(NamedTuple):
    """A garment, hair, hat, shoes, logo or bag; the kind `none` is not drawn."""

    kind: str
    color: Color
    pattern: str = "plain"
    second: Color = (0, 0, 0)  # of the pattern, or what an open jacket shows


class Person(NamedTuple):
    """What is the same in all images of a person. Proportions are relative to an average body."""

    height: float
    bulk: float
    shoulders: float
    legs: float
    skin: Color
    upper: Item
    lower: Item
    hair: Item
    hat: Item
    shoes: Item
    logo: Item
    bag: Item
    left_handed: bool  # the side that carries the bag


@functools.lru_cache(maxsize=4096)
def make_person(seed: int, pid: int, group_size: int) -> Person:
    """Create person `pid` >= 1 of the data set `seed`; pids 1..group_size form the first group, and so on."""
    group, member = divmod(pid - 1, group_size)
    shared, own = np.random.default_rng((seed, 1, group)), np.random.default_rng((seed, 2, pid))

    def garment(cuts: Sequence[str], patterns: Sequence[str], colors: Sequence[Color]) -> Item:
        color = one_of(colors, shared)
        second, cut = one_of(_unlike(colors, color), shared), one_of(cuts, shared)
        return Item(cut, color, "plain" if cut == "jacket" else one_of(patterns, shared), second)

    def deal(options: Sequence[T]) -> T:
        """Shuffle `options` for the whole group and return those of this member."""
        return options[int(shared.permutation(len(options))[member % len(options)])]

    def item(kinds: Sequence[str], colors: Sequence[Color]) -> Item:
        kind, color = deal(kinds), deal(colors)
        return Item(kind, color if kind != "none" else (0, 0, 0))

    upper = garment(UPPER_CUTS, UPPER_PATTERNS, CLOTH)
    lower = garment(LOWER_CUTS, LOWER_PATTERNS, DENIM)
    height, bulk, shoulders, legs = (1 + own.uniform(-1, 1, 4) * (0.06, 0.16, 0.1, 0.06)).tolist()
    skin, hair, hat = one_of(SKIN, own), item(HAIR_STYLES, HAIR), item(HATS, VIVID)
    shoes = Item(one_of(SHOES, own), deal(_unlike(SHOE_COLORS, lower.color)))
    logo, bag = item(LOGOS, _unlike(_unlike(VIVID, upper.color), upper.second)), item(BAGS, BAG_COLORS)
    left_handed = bool(own.random() < 0.5)
    return Person(height, bulk, shoulders, legs, skin, upper, lower, hair, hat, shoes, logo, bag, left_handed)


def one_of(options: Sequence[T], rng: np.random.Generator) -> T:
    """Draw one of `options`."""
    return options[int(rng.integers(len(options)))]


def _unlike(colors: Sequence[Color], other: Color) -> list[Color]:
    """Those of `colors` that differ clearly from `other`."""
    return [color for color in colors if sum(abs(x - y) for x, y in zip(color, other, strict=True)) > 130]
