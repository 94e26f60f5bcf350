"""The sentence of each gate says by how much and on which image; what nobody asked for is the precision's."""

import math
from pathlib import Path

import numpy as np
import pytest

from pmm_edge.bench import AskedGates, Gates
from pmm_edge.bench.parity import compare
from pmm_edge.bench.report import Change, Closeness, RetrievalChange, cosine_failures, length_failure, map_failure
from pmm_edge.errors import PmmError


def closeness(least: float, mean: float) -> Closeness:
    return Closeness(least, least, mean, 0.0, 0.0, "query/worst.jpg")


def test_what_is_not_asked_for_is_the_precisions() -> None:
    asked = AskedGates(min_cosine=0.95)
    assert asked.of("fp32") == Gates(min_cosine=0.95)
    assert asked.of("int8") == Gates(min_cosine=0.95, max_map_drop=0.5, min_mean_cosine=0.99, max_stretch=1.1)
    assert AskedGates().of("fp16") == Gates(
        min_cosine=0.999, max_map_drop=0.1, min_mean_cosine=0.9999, max_stretch=1.01
    )
    assert AskedGates(max_stretch=2).of("fp32") == Gates(max_stretch=2)


@pytest.mark.parametrize(
    "gates",
    [
        {"min_cosine": 1.5},
        {"min_mean_cosine": math.nan},
        {"max_map_drop": -1},
        {"max_map_drop": math.nan},
        {"max_stretch": 0.9},
    ],
)
def test_a_gate_that_nothing_could_hold_is_refused(gates: dict[str, float]) -> None:
    with pytest.raises(PmmError):
        AskedGates(**gates)


def test_cosine_gates_say_by_how_much_and_where() -> None:
    gates = Gates(min_cosine=0.999, min_mean_cosine=0.9999)
    assert cosine_failures(closeness(0.9995, 0.99995), gates) == []
    assert cosine_failures(closeness(0.9, 0.99), gates) == [
        "cosine 0.900000 is 0.099 below the least allowed 0.999, on query/worst.jpg (mean 0.990000)",
        "mean cosine 0.990000 is 0.0099 below the least allowed 0.9999",
    ]
    assert len(cosine_failures(closeness(math.nan, math.nan), gates)) == 2


def test_map_gate_is_in_points_and_says_how_sure_it_is() -> None:
    nothing = Change(0, 0, 0)
    change = RetrievalChange(nothing, Change(-0.002, -0.005, 0.001), nothing, 100, [])
    assert map_failure(0.8, 0.798, change, Gates(max_map_drop=0.3)) is None
    assert map_failure(0.798, 0.8, change, Gates()) is None
    assert map_failure(0.8, 0.798, change, Gates()) == (
        "mAP 79.80 is 0.20 points (95 % interval -0.10 to 0.50) below the reference's 80.00, 0.1 are allowed"
    )


def test_lengths_that_cosine_does_not_see() -> None:
    random = np.random.default_rng(0)
    embeddings, paths = random.normal(size=(6, 8)).astype(np.float32), [Path(f"{number}.jpg") for number in range(6)]

    def failure(candidate: np.ndarray, gates: Gates = Gates()) -> str:
        return str(length_failure(compare(embeddings, candidate, paths), gates))

    assert failure(1.0005 * embeddings) == "None"
    assert "is 1.2 times as long" in failure(1.2 * embeddings)
    assert "is 0.5 times as long" in failure(0.5 * embeddings)
    assert failure(1.2 * embeddings, Gates(max_stretch=1.25)) == "None"
    one = embeddings.copy()
    one[4] *= 0.9
    assert failure(one).startswith(
        "the embedding of 4.jpg is 0.9 times as long as the reference's (all of them 0.9 to 1)"
    )
    one[4] = np.nan
    assert failure(one) == "None"
    assert failure(0 * embeddings) == "None"  # all zeros are another sentence's
