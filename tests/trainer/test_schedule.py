import pytest

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
    assert learning_rate(epoch) == pytest.approx(rate)


def test_a_short_run_goes_through_the_same_curve():
    rates = [learning_rate(epoch, epochs=20) for epoch in range(1, 21)]
    assert rates[0] == pytest.approx(1e-4) and rates[-1] == pytest.approx(1e-5)
    assert rates.count(pytest.approx(1e-3)) == 8 - 1
