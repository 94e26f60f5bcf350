from dataclasses import replace

import pytest

from pmm_edge.errors import PmmError
from pmm_edge.trainer.config import TrainConfig
from pmm_edge.trainer.step import learning_rate


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [
        (1, 1e-4),
        (4, 1e-4),
        (5, 2e-4),
        (49, 1e-3),
        (50, 1e-3),
        (199, 1e-3),
        (200, 1e-4),
        (299, 1e-4),
        (300, 1e-5),
        (400, 1e-5),
    ],
)
def test_the_paper_schedule(epoch, rate):
    assert learning_rate(TrainConfig(), epoch) == pytest.approx(rate)
    assert learning_rate(TrainConfig(lr=5e-4), epoch, 0.9) == pytest.approx(rate / 2)


def test_a_short_run_goes_through_the_same_curve():
    config = TrainConfig(epochs=20)
    rates = [learning_rate(config, epoch) for epoch in range(1, 21)]
    assert rates[0] == pytest.approx(1e-4) and rates[-1] == pytest.approx(1e-5)
    assert rates.count(pytest.approx(1e-3)) == 8 - 1


def test_cosine_rises_linearly_and_decays_to_zero():
    config = TrainConfig(epochs=10, lr=2e-3, schedule="cosine")
    points = {(1, 0.5): 1e-3, (2, 0.0): 2e-3, (6, 0.5): 1e-3, (10, 0.9999): 0.0}
    assert {point: learning_rate(config, *point) for point in points} == pytest.approx(points, abs=1e-9)


def test_a_learning_rate_must_be_positive():
    with pytest.raises(PmmError):
        replace(TrainConfig(), lr=0.0)
