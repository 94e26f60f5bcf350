"""The interval covers what chance does, a clear change is told from it, and the queries that changed are named."""

from pathlib import Path

import numpy as np
import pytest

from pmm_edge.bench.significance import few_queries, paired_changes, retrieval_change
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
    assert "2 queries tell a change of mAP to ±" in str(few_queries([change]))
    assert few_queries([retrieval_change(before, before, dataset())]) is None
