"""Differences are found, measured and named, also where an embedding is broken beyond comparison."""

from pathlib import Path

import numpy as np
import pytest

from pmm_edge.bench.parity import Gates, compare, cosine_failure, fault_of, map_failure
from pmm_edge.spec import RetrievalFigures

PATHS = [Path(f"{number}.jpg") for number in range(4)]


@pytest.fixture
def reference() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)


def test_equal_embeddings_are_equal(reference: np.ndarray) -> None:
    parity = compare(reference, reference.copy(), PATHS)
    assert parity.cosine_min == pytest.approx(1, abs=1e-12)
    assert (parity.largest_difference, parity.largest_relative, parity.images) == (0, 0, 4)
    assert cosine_failure(parity, Gates()) is None


def test_the_worst_image_is_named_with_its_figures(reference: np.ndarray) -> None:
    candidate = reference.copy()
    candidate[2, 3] += 0.5
    parity = compare(reference, candidate, PATHS)
    a, b = reference[2].astype(float), candidate[2].astype(float)
    assert parity.worst_image == "2.jpg"
    assert parity.cosine_min == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert parity.cosine_mean == pytest.approx((3 + parity.cosine_min) / 4)
    assert parity.largest_difference == pytest.approx(0.5)
    assert parity.largest_relative == pytest.approx(0.5 / np.abs(a).max())
    failure = cosine_failure(parity, Gates())
    assert failure is not None
    assert "2.jpg" in failure
    assert f"{parity.cosine_min:.6f}" in failure


@pytest.mark.parametrize(
    ("value", "fault"),
    [(np.nan, "gives NaN or infinity for 1 of 4 images, first for 1.jpg"), (0, "gives all zeros for 1 of 4 images")],
)
def test_a_broken_row_has_nothing_of_the_reference(value: float, fault: str, reference: np.ndarray) -> None:
    candidate = reference.copy()
    candidate[1] = value
    with np.errstate(all="raise"):
        parity = compare(reference, candidate, PATHS)
    assert (parity.cosine_min, parity.worst_image) == (0, "1.jpg")
    assert cosine_failure(parity, Gates()) is not None
    assert fault in str(fault_of(candidate, PATHS))


def test_a_network_that_tells_nobody_apart_is_at_fault(reference: np.ndarray) -> None:
    assert "one and the same embedding for all 4 images" in str(fault_of(np.repeat(reference[:1], 4, axis=0), PATHS))
    assert fault_of(reference, PATHS) is None
    assert fault_of(reference[:1], PATHS[:1]) is None


def test_map_gate_is_in_points() -> None:
    reference = RetrievalFigures(rank1=0.9, mAP=0.8, mINP=0.5, mAP_at_50=0.8)
    worse = RetrievalFigures(rank1=0.9, mAP=0.798, mINP=0.5, mAP_at_50=0.8)
    assert map_failure(reference, worse, Gates(max_map_drop=0.3)) is None
    assert map_failure(worse, reference, Gates()) is None
    assert "mAP 79.80 is 0.20 points below the reference's 80.00, 0.1 are allowed" in str(
        map_failure(reference, worse, Gates())
    )
