"""Differences are found and measured, whole and by stage, also where an embedding is broken beyond comparison."""

from pathlib import Path

import numpy as np
import pytest

from pmm_edge.bench.parity import compare

PATHS = [Path(f"{number}.jpg") for number in range(4)]


@pytest.fixture
def reference() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)


def test_equal_embeddings_are_equal(reference: np.ndarray) -> None:
    parity = compare(reference, reference.copy(), PATHS)
    assert parity.whole.cosine_min == pytest.approx(1, abs=1e-12)
    assert (parity.whole.largest_difference, parity.whole.largest_relative, parity.images) == (0, 0, 4)
    assert parity.stages == {}


def test_the_worst_image_is_named_with_its_figures(reference: np.ndarray) -> None:
    candidate = reference.copy()
    candidate[2, 3] += 0.5
    whole = compare(reference, candidate, PATHS).whole
    a, b = reference[2].astype(float), candidate[2].astype(float)
    assert whole.worst_image == "2.jpg"
    assert whole.cosine_min == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert whole.cosine_min < whole.cosine_p1 < whole.cosine_mean == pytest.approx((3 + whole.cosine_min) / 4)
    assert whole.largest_difference == pytest.approx(0.5)
    assert whole.largest_relative == pytest.approx(0.5 / np.abs(a).max())


def test_a_stage_is_judged_by_its_own_slice(reference: np.ndarray) -> None:
    candidate = reference.copy()
    candidate[:, 4:] *= -1
    stages = compare(reference, candidate, PATHS, {"I": (0, 4), "II": (4, 8)}).stages
    assert stages["I"].cosine_min == pytest.approx(1)
    assert stages["II"].cosine_mean == pytest.approx(-1)
    assert compare(reference, candidate, PATHS, {"I": (0, 8)}).stages == {}  # one stage is the whole


def test_quantiles_go_from_the_least_cosine_to_the_largest(reference: np.ndarray) -> None:
    parity = compare(reference, reference + 0.1, PATHS)
    quantiles = parity.cosine_quantiles
    assert len(quantiles) == 101
    assert quantiles == sorted(quantiles)
    assert quantiles[0] == parity.whole.cosine_min


@pytest.mark.parametrize("value", [np.nan, np.inf, 0])
def test_a_broken_row_has_nothing_of_the_reference(value: float, reference: np.ndarray) -> None:
    candidate = reference.copy()
    candidate[1] = value
    with np.errstate(all="raise"):
        whole = compare(reference, candidate, PATHS).whole
    assert (whole.cosine_min, whole.worst_image) == (0, "1.jpg")
    assert np.isinf(whole.largest_difference) == (value != 0)


def test_two_rows_of_zeros_are_equal(reference: np.ndarray) -> None:
    both = reference.copy()
    both[1] = 0
    assert compare(both, both, PATHS).whole.cosine_min == pytest.approx(1)
