"""The interval covers what chance does, a clear change is told from it, and the queries that changed are named."""

from pathlib import Path

import numpy as np
import pytest

from pmm_edge.bench.parity import few_queries, paired_changes, retrieval_change
from pmm_edge.bench.report import Change, Gates, RetrievalChange
from pmm_edge.data.dataset import ReidDataset, Split
from pmm_edge.retrieval import evaluate_distances


def test_the_interval_is_that_of_the_mean() -> None:
    differences = np.random.default_rng(1).normal(0.01, 0.1, (2500, 1))
    (change,) = paired_changes(differences)
    error = 1.96 * differences.std() / np.sqrt(len(differences))
    assert change.difference == pytest.approx(differences.mean())
    assert change.low == pytest.approx(change.difference - error, abs=0.1 * error)
    assert change.high == pytest.approx(change.difference + error, abs=0.1 * error)
    assert paired_changes(differences) == [change]  # seeded


def test_it_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(2)
    held = [change.low <= 0 <= change.high for change in paired_changes(random.normal(0, 1, (200, 60)))]
    assert 0.85 <= np.mean(held) <= 1


def test_equal_models_have_no_change() -> None:
    (change,) = paired_changes(np.zeros((10, 1)))
    assert (change.difference, change.low, change.high) == (0, 0, 0)


PIDS, CAMERAS = np.array([1, 2, 3]), np.array([1, 1, 1])
GALLERY_PIDS, GALLERY_CAMERAS = np.array([1, 2, 1, 2]), np.array([2, 2, 2, 2])
RIGHT = np.array([[0.1, 0.9, 0.2, 0.8], [0.9, 0.1, 0.8, 0.2], [0.1, 0.2, 0.3, 0.4]])


def dataset() -> ReidDataset:
    query = Split([Path(f"q{number}.jpg") for number in range(3)], PIDS, CAMERAS)
    gallery = Split([Path(f"g{number}.jpg") for number in range(4)], GALLERY_PIDS, GALLERY_CAMERAS)
    return ReidDataset("three", Path(), query, query, gallery)


def test_first_hits_that_became_wrong_come_first_and_queries_without_a_match_do_not_count() -> None:
    other = RIGHT.copy()
    other[0] = [0.3, 0.9, 0.2, 0.8]  # another right image
    other[1] = [0.0, 0.1, 0.8, 0.2]  # a wrong one
    other[2] = [0.9, 0.1, 0.3, 0.4]  # nobody in the gallery is query 3
    labels = PIDS, GALLERY_PIDS, CAMERAS, GALLERY_CAMERAS
    before, now = evaluate_distances(RIGHT, *labels), evaluate_distances(other, *labels)
    change = retrieval_change(before, now, dataset())
    assert [(hit.query, hit.reference, hit.model) for hit in change.first_hits] == [
        ("q1.jpg", "g1.jpg", "g0.jpg"),
        ("q0.jpg", "g0.jpg", "g2.jpg"),
    ]
    assert [(hit.reference_right, hit.model_right) for hit in change.first_hits] == [(True, False), (True, True)]
    assert change.queries == 2
    assert change.rank1.difference == pytest.approx(-0.5)
    assert change.mAP.difference == pytest.approx(now.mAP - before.mAP)
    assert change.mINP.difference == pytest.approx(now.mINP - before.mINP)


def change(points: float, half: float) -> RetrievalChange:
    """Of mAP, with an interval of so many points to both sides."""
    own = Change(*(value / 100 for value in (points, points - half, points + half)))
    return RetrievalChange(own, own, own, 458, [])


def test_a_pass_whose_interval_reaches_below_its_gate_is_named() -> None:
    assert few_queries([change(-0.05, 0.38)], [Gates(max_map_drop=0.1)]) == (
        "mAP holds its gate on these 458 queries, which are too few to show that it would on others: the loss may be as"
        " large as 0.43 points (95 % interval) where 0.1 are allowed; judge on more queries"
    )
    assert few_queries([change(-0.05, 0.38)]) is not None  # of 0.1, the usual gate
    assert few_queries([change(-0.05, 0.38)], [Gates(max_map_drop=0.5)]) is None
    assert few_queries([change(0.6, 0.65)], [Gates(max_map_drop=0.1)]) is None  # -0.05 at worst
    assert few_queries([change(0, 0)], [Gates(max_map_drop=0.0)]) is None


def test_each_model_is_held_against_its_own_gate() -> None:
    gates = [Gates(max_map_drop=most) for most in (0.1, 0.5, 0.5, 0.1)]
    told = few_queries([change(-0.02, 0.2), change(-0.4, 0.3), change(-0.1, 0.3), change(-2, 1)], gates)
    assert "mAP of 2 of 4 models holds its gate on these 458 queries" in str(told)
    assert "as large as 0.70 points (95 % interval) where 0.5 are allowed" in str(told)


def test_a_model_that_fails_its_gate_needs_no_warning() -> None:
    assert few_queries([change(-2, 3)], [Gates(max_map_drop=0.5)]) is None
