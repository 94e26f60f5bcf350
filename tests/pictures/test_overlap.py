"""The overlap of two maps is the share of their attention that lies in the same places."""

import numpy as np
import pytest

from pmm_edge.pictures.attention import overlap

STAGES = ("I", "II", "III")


def maps(*images: list[list[list[float]]]) -> np.ndarray:
    return np.array(images, dtype=np.float32)


def test_equal_maps_overlap_wholly_whatever_their_strength() -> None:
    one = np.random.default_rng(0).random((5, 1, 6, 3)).astype(np.float32)
    found = overlap(np.concatenate([one, 7 * one, 0.01 * one], axis=1), STAGES)
    np.testing.assert_allclose(found.per_image, 1, rtol=1e-6)
    assert found.mean == pytest.approx(1)
    assert found.empty == 0


def test_maps_without_a_common_place_do_not_overlap() -> None:
    found = overlap(maps([[[1, 2], [0, 0]], [[0, 0], [3, 0]], [[0, 0], [0, 9]]]), STAGES)
    assert found.pair_means == {"I-II": 0, "I-III": 0, "II-III": 0}
    assert found.mean == 0


def test_in_between_by_hand() -> None:
    # Shares 3/4, 1/4, 0, 0 and 1/4, 1/4, 1/2, 0: 1/4 + 1/4 in common. The second image: 1/2, 1/2 and 1, 0: 1/2.
    found = overlap(maps([[[3, 1], [0, 0]], [[1, 1], [2, 0]]], [[[2, 2], [0, 0]], [[5, 0], [0, 0]]]), ("I", "II"))
    np.testing.assert_allclose(found.per_image, [[0.5], [0.5]])
    # Stage I of one with stage II of the other: 3/4, and 1/4 + 1/4.
    assert found.chance == pytest.approx((0.75 + 0.5) / 2)
    assert found.pairs == ("I-II",)


def test_the_mean_is_over_all_pairs() -> None:
    found = overlap(maps([[[1, 0]], [[1, 0]], [[0, 1]]]), STAGES)
    assert found.pair_means == {"I-II": 1, "I-III": 0, "II-III": 0}
    assert found.mean == pytest.approx(1 / 3)
    assert found.chance is None  # one image has no other


def test_an_empty_map_is_counted_and_left_out() -> None:
    found = overlap(maps([[[1, 0]], [[0, 0]]], [[[1, 0]], [[1, 0]]]), ("I", "II"))
    assert found.empty == 1
    assert found.mean == 1
    nothing = overlap(maps([[[1, 0]], [[0, 0]]]), ("I", "II"))
    assert (nothing.mean, nothing.pair_means, nothing.empty) == (None, {"I-II": None}, 1)


def test_a_single_stage_has_nothing_to_overlap_with() -> None:
    found = overlap(np.ones((4, 1, 2, 2), np.float32), ("I",))
    assert (found.images, found.pairs, found.mean, found.chance) == (4, (), None, None)
