"""Differences are measured for the whole embedding and by stage, gates are applied, and intervals cover chance."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pmm_edge.bench.parity import (
    GateOverrides,
    compare,
    map_failure,
    paired_changes,
    parity_failures,
    retrieval_change,
)
from pmm_edge.bench.report import Change, FailureKind, Gates, RetrievalChange
from pmm_edge.errors import PmmError
from pmm_edge.retrieval import evaluate_distances

PATHS = [Path(f"{number}.jpg") for number in range(4)]


@pytest.fixture
def reference() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)


def test_the_worst_image_is_named(reference: np.ndarray) -> None:
    candidate = reference.copy()
    equal = compare(reference, candidate, PATHS)
    assert equal.whole.cosine_min == pytest.approx(1, abs=1e-12)
    assert (equal.whole.largest_relative, equal.shortest, equal.longest) == (0, 1, 1)
    assert parity_failures(equal, Gates()) == []
    candidate[2, 3] += 0.5
    parity = compare(reference, candidate, PATHS)
    whole, a, b = parity.whole, reference[2].astype(float), candidate[2].astype(float)
    assert whole.worst_image == "2.jpg"
    assert whole.cosine_min == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert whole.cosine_min < whole.cosine_p1 < whole.cosine_mean == pytest.approx((3 + whole.cosine_min) / 4)
    assert whole.largest_relative == pytest.approx(0.5 / np.abs(a).max())
    quantiles = parity.cosine_quantiles
    assert (len(quantiles), quantiles[0]) == (101, whole.cosine_min)
    assert quantiles == sorted(quantiles)


def test_stages_are_compared_by_their_slices(reference: np.ndarray) -> None:
    candidate = reference.copy()
    candidate[:, 4:] *= -1
    stages = compare(reference, candidate, PATHS, {"I": (0, 4), "II": (4, 8)}).stages
    assert stages["I"].cosine_min == pytest.approx(1)
    assert stages["II"].cosine_mean == pytest.approx(-1)
    assert compare(reference, candidate, PATHS, {"I": (0, 8)}).stages == {}


@pytest.mark.parametrize("value", [np.nan, np.inf, 0])
def test_broken_rows_have_cosine_0(value: float, reference: np.ndarray) -> None:
    candidate = reference.copy()
    candidate[1] = value
    with np.errstate(all="raise"):
        parity = compare(reference, candidate, PATHS)
    assert (parity.whole.cosine_min, parity.whole.worst_image) == (0, "1.jpg")
    assert (parity.whole.largest_relative is None) == (value != 0)
    assert (parity.shortest, parity.longest) == (1, 1)


# Gates


def test_gates_follow_the_precision_unless_overridden() -> None:
    assert GateOverrides().gates("fp16") == Gates(0.999, 0.1, 0.9999, 1.01)
    assert GateOverrides(min_cosine=0.9, max_stretch=2).gates("int8") == Gates(0.9, 0.5, 0.99, 2)
    for gate, value in (("min_cosine", 1.5), ("min_mean_cosine", math.nan), ("max_map_drop", -1), ("max_stretch", 0.9)):
        with pytest.raises(PmmError):
            GateOverrides(**{gate: value})


def test_cosine_gates_give_value_limit_and_image(reference: np.ndarray) -> None:
    parity, gates = compare(reference, reference, PATHS), Gates(min_cosine=0.999, min_mean_cosine=0.9999)
    low = replace(parity, whole=replace(parity.whole, cosine_min=0.9, cosine_mean=0.99, worst_image="3.jpg"))
    found = [(one.kind, one.value, one.limit, one.image) for one in parity_failures(low, gates)]
    assert found == [(FailureKind.COSINE, 0.9, 0.999, "3.jpg"), (FailureKind.MEAN_COSINE, 0.99, 0.9999, "")]
    undefined = replace(parity, whole=replace(parity.whole, cosine_min=math.nan, cosine_mean=math.nan))
    assert len(parity_failures(undefined, gates)) == 2


def test_length_gate(reference: np.ndarray) -> None:
    def failures(factor: object, limit: float = 1.001) -> list[tuple[FailureKind, float, str]]:
        parity = compare(reference, (reference * factor).astype(np.float32), PATHS)
        found = parity_failures(parity, Gates(max_stretch=limit))
        return [(one.kind, round(one.value or 0, 3), one.image) for one in found]

    assert failures(1.0005) == []
    assert failures(1.2, limit=1.25) == []
    assert failures(np.array([[1], [1], [1.2], [1.1]])) == [(FailureKind.LENGTH, 1.2, "2.jpg")]
    assert failures(np.array([[1], [0.5], [1.2], [1]])) == [(FailureKind.LENGTH, 0.5, "1.jpg")]


# Change of retrieval


def change(points: float, half: float) -> RetrievalChange:
    """A change of mAP in points, with an interval of `half` points to either side."""
    own = Change(*(value / 100 for value in (points, points - half, points + half)))
    return RetrievalChange(own, own, own, 458)


def test_map_gate_is_in_points() -> None:
    assert map_failure(change(-0.2, 0.3), Gates(max_map_drop=0.3)) is None
    assert map_failure(change(0.2, 0.3), Gates()) is None
    failure = map_failure(change(-0.2, 0.3), Gates())
    assert failure is not None
    assert (failure.kind, failure.limit) == (FailureKind.MAP_DROP, 0.1)
    assert failure.value == pytest.approx(0.2)
    assert failure.change == change(-0.2, 0.3).mAP


def test_the_interval_is_that_of_the_mean() -> None:
    differences = np.random.default_rng(1).normal(0.01, 0.1, (2500, 1))
    (found,) = paired_changes(differences)
    error = 1.96 * differences.std() / np.sqrt(len(differences))
    assert found.difference == pytest.approx(differences.mean())
    assert found.low == pytest.approx(found.difference - error, abs=0.1 * error)
    assert found.high == pytest.approx(found.difference + error, abs=0.1 * error)
    assert paired_changes(differences) == [found]  # seeded
    (nothing,) = paired_changes(np.zeros((10, 1)))
    assert (nothing.difference, nothing.low, nothing.high) == (0, 0, 0)
    random = np.random.default_rng(2)
    covers = [one.low <= 0 <= one.high for one in paired_changes(random.normal(0, 1, (200, 60)))]
    assert 0.85 <= np.mean(covers) <= 1


def test_the_change_is_that_of_the_queries_with_a_match() -> None:
    labels = np.array([1, 2, 3]), np.array([1, 2, 1, 2]), np.array([1, 1, 1]), np.array([2, 2, 2, 2])
    right = np.array([[0.1, 0.9, 0.2, 0.8], [0.9, 0.1, 0.8, 0.2], [0.1, 0.2, 0.3, 0.4]])
    other = np.array([[0.3, 0.9, 0.2, 0.8], [0.0, 0.1, 0.8, 0.2], [0.9, 0.1, 0.3, 0.4]])  # query 2 hits a wrong image
    before, now = evaluate_distances(right, *labels), evaluate_distances(other, *labels)
    found = retrieval_change(before, now)
    assert found.queries == 2
    assert found.rank1.difference == pytest.approx(-0.5)
    assert found.mAP.difference == pytest.approx(now.mAP - before.mAP)
    assert found.mINP.difference == pytest.approx(now.mINP - before.mINP)
