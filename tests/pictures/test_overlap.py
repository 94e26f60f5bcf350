import numpy as np
import pytest

from pmm_edge.pictures.overlap import overlap

STAGES = ("I", "II", "III")


def maps(*images: list[list[list[float]]]) -> np.ndarray:
    return np.array(images, dtype=np.float32)


def test_equal_maps_overlap_completely_whatever_their_strength() -> None:
    one = np.random.default_rng(0).random((5, 1, 6, 3)).astype(np.float32)
    found = overlap(np.concatenate([one, 7 * one, 0.01 * one], axis=1), STAGES)
    assert (found.images, found.mean, found.empty) == (5, pytest.approx(1), 0)


def test_disjoint_maps_do_not_overlap() -> None:
    found = overlap(maps([[[1, 2], [0, 0]], [[0, 0], [3, 0]], [[0, 0], [0, 9]]]), STAGES)
    assert (found.pairs, found.mean) == ({"I-II": 0, "I-III": 0, "II-III": 0}, 0)


def test_partial_overlap_by_hand() -> None:
    # Shares 3/4, 1/4, 0, 0 and 1/4, 1/4, 1/2, 0 have 1/4 + 1/4 in common; the second image 1/2, 1/2 and 1, 0: 1/2.
    found = overlap(maps([[[3, 1], [0, 0]], [[1, 1], [2, 0]]], [[[2, 2], [0, 0]], [[5, 0], [0, 0]]]), ("I", "II"))
    assert found.pairs == {"I-II": pytest.approx(0.5)}
    assert found.chance == pytest.approx((0.75 + 0.5) / 2)  # stage I of one image with stage II of the other


def test_the_mean_is_over_all_pairs() -> None:
    found = overlap(maps([[[1, 0]], [[1, 0]], [[0, 1]]]), STAGES)
    assert (found.pairs, found.mean) == ({"I-II": 1, "I-III": 0, "II-III": 0}, pytest.approx(1 / 3))
    assert found.chance is None  # there is no other image


def test_empty_maps_are_counted_and_excluded() -> None:
    found = overlap(maps([[[1, 0]], [[0, 0]]], [[[1, 0]], [[1, 0]]]), ("I", "II"))
    assert (found.empty, found.mean) == (1, 1)
    nothing = overlap(maps([[[1, 0]], [[0, 0]]]), ("I", "II"))
    assert (nothing.mean, nothing.pairs, nothing.empty) == (None, {"I-II": None}, 1)


def test_a_single_stage_has_no_pair() -> None:
    found = overlap(np.ones((4, 1, 2, 2), np.float32), ("I",))
    assert (found.images, found.pairs, found.mean, found.chance) == (4, {}, None, None)
