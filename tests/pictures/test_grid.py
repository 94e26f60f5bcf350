import numpy as np
from PIL import Image

from pmm_edge.pictures.attention import overlay
from pmm_edge.pictures.grid import RIGHT, WRONG, Cell, enlargement, grid


def plain(width: int = 100, height: int = 200, gray: int = 90) -> Image.Image:
    return Image.new("RGB", (width, height), (gray, gray, gray))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def has_color(image: Image.Image, color: str) -> np.ndarray:
    rgb = [int(color[at : at + 2], 16) for at in (1, 3, 5)]
    return np.abs(pixels(image) - rgb).max(axis=2) <= 4


def test_pictures_are_whole_and_in_rows_and_columns() -> None:
    colors = ("#2040c0", "#20c040", "#c04020")  # no text has one of them
    first, second, third = (Cell(Image.new("RGB", (100, 200), color), "caption") for color in colors)
    sheet = grid([[first, second], [third]], ["a", "b"], title="t")
    corners = []
    for color in colors:
        places = np.argwhere(has_color(sheet, color))
        assert abs(len(places) - 100 * 200) <= 400  # a border may be blended
        corners.append(places[0].tolist())
    (top, left), (right_top, right_left), (below_top, below_left) = corners
    assert (right_top, below_left) == (top, left)
    assert right_left >= left + 100
    assert below_top >= top + 200


def test_right_and_wrong_differ_without_color() -> None:
    right, wrong = (grid([[Cell(plain(), right=value)]]) for value in (True, False))
    solid, dashed = has_color(right, RIGHT)[:, 21].sum(), has_color(wrong, WRONG)[:, 21].sum()
    assert solid > 180
    assert 0.2 * solid < dashed < 0.9 * solid


def test_long_and_foreign_names_stay_below_their_picture() -> None:
    names = ["0101_c1s1_000151_01_and_what_else_a_camera_writes.jpg", "\u4eba\u7269\u00e9.jpg", "a\x07$b$"]
    sheet = grid([[Cell(plain(), name), Cell(plain(gray=255))] for name in names])
    outside = pixels(sheet)[:, 20 + 100 + 8 :]
    assert outside.min() >= 250


def test_a_note_is_wrapped() -> None:
    short, long = (grid([[Cell(plain())]], note=text) for text in ("word", "word " * 60))
    assert long.width == short.width
    assert long.height > short.height + 40


def test_small_pictures_are_enlarged_by_a_whole_factor() -> None:
    assert [enlargement(height) for height in (96, 144, 384)] == [3, 2, 1]


def test_the_overlay_colors_where_the_map_is_high() -> None:
    cam = np.zeros((4, 2), np.float32)
    cam[0, 0] = 3
    photo = plain(32, 64)
    heated = pixels(overlay(photo, cam))
    assert np.abs(heated[:8, :8] - 90).max() > 100
    assert (heated[40:] == 90).all()
    assert (pixels(overlay(photo, np.zeros((4, 2), np.float32))) == 90).all()
    np.testing.assert_array_equal(heated, pixels(overlay(photo, 10 * cam)))  # scaled by its own maximum
