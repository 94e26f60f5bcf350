"""A grid reads well: whatever the names are, and also without colour."""

import numpy as np
from PIL import Image

from pmm_edge.pictures.attention import overlay
from pmm_edge.pictures.grid import RIGHT, WRONG, Cell, enlarged, grid


def plain(width: int = 100, height: int = 200, grey: int = 90) -> Image.Image:
    return Image.new("RGB", (width, height), (grey, grey, grey))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def is_colour(image: Image.Image, colour: str) -> np.ndarray:
    rgb = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return (pixels(image) == rgb).all(axis=2)


def test_pictures_stand_whole_in_rows_and_columns() -> None:
    colours = ("#2040c0", "#20c040", "#c04020")  # no text has one of them
    first, second, third = (Cell(Image.new("RGB", (100, 200), colour), "under it") for colour in colours)
    sheet = grid([[first, second], [third, None]], ["a", "b"], title="t")
    corners = []
    for colour in colours:
        places = np.argwhere(is_colour(sheet, colour))
        assert len(places) == 100 * 200
        corners.append(places[0].tolist())
    (top, left), (beside_top, beside_left), (below_top, below_left) = corners
    assert (beside_top, below_left) == (top, left)
    assert beside_left >= left + 100
    assert below_top >= top + 200


def test_right_and_wrong_differ_without_colour() -> None:
    right, wrong = (grid([[Cell(plain(), right=value)]]) for value in (True, False))
    top, left = np.argwhere(is_colour(right, RIGHT))[0]
    edge = slice(left, left + 70)
    assert is_colour(right, RIGHT)[top, edge].all()  # solid
    dashes = is_colour(wrong, WRONG)[top, edge]
    assert 0.3 < dashes.mean() < 0.9  # dashed
    assert pixels(wrong)[top, edge][~dashes].min() == 255  # on white, whatever the picture is


def test_a_long_or_foreign_name_stays_under_its_picture() -> None:
    names = ["0101_c1s1_000151_01_and_what_else_a_camera_writes.jpg", "\u4eba\u7269\u00e9.jpg", "a\x07b"]
    sheet = grid([[Cell(plain(), name), Cell(plain(grey=255))] for name in names])
    beside = pixels(sheet)[:, 20 + 100 + 10 :]
    assert beside.min() == 255


def test_text_is_wrapped_and_empty_places_stay_empty() -> None:
    short = grid([[Cell(plain())]], notes=["word"])
    long = grid([[Cell(plain())]], notes=["word " * 60])
    assert long.width == short.width
    assert long.height > short.height + 40


def test_small_pictures_grow_by_a_whole_number() -> None:
    assert enlarged(plain(64, 144)).size == (128, 288)
    assert enlarged(plain(128, 384)).size == (128, 384)


def test_the_heat_is_where_the_map_is() -> None:
    cam = np.zeros((4, 2), np.float32)
    cam[0, 0] = 3
    photo = plain(32, 64)
    heated = pixels(overlay(photo, cam))
    assert np.abs(heated[:8, :8] - 90).max() > 100
    assert (heated[40:] == 90).all()
    assert (pixels(overlay(photo, np.zeros((4, 2), np.float32))) == 90).all()
    np.testing.assert_array_equal(heated, pixels(overlay(photo, 10 * cam)))  # scaled by its own maximum
