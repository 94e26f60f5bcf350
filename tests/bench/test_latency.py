"""Models take turns, batches are full, and enough runs are made."""

from pathlib import Path

import numpy as np
import pytest

from pmm_edge.bench import measure_latency
from pmm_edge.runtime import Embedder
from pmm_edge.spec import InputSpec, ModelSpec


class Recorder(Embedder):
    """Notes who was called with what shape; no network."""

    def __init__(self, name: str, calls: list[tuple[str, tuple[int, ...]]]) -> None:
        spec = ModelSpec("pmm", "resnet18", 4, InputSpec(4, 2), 3, {"I": (0, 3)}, 1)
        super().__init__(spec, Path(name), "none", "cpu")
        self.calls = calls

    def embed_prepared(self, images: np.ndarray) -> np.ndarray:
        self.calls.append((self.path.name, images.shape))
        return np.zeros((len(images), 3), np.float32)


def test_models_take_turns_on_full_batches() -> None:
    calls: list[tuple[str, tuple[int, ...]]] = []
    images = [np.zeros((3, 4, 2, 3), np.uint8)] * 2
    found = measure_latency([Recorder("a", calls), Recorder("b", calls)], images, 8, min_runs=10, min_seconds=0)
    assert {shape for _, shape in calls} == {(8, 4, 2, 3)}
    names = "".join(name for name, _ in calls)
    assert names == "aaaaaabbbbbb" * 2  # one run that is not counted and five that are, in each turn
    assert [latency.runs for latency in found] == [10, 10]
    for latency in found:
        assert latency.batch == 8
        assert 0 < latency.median_ms <= latency.p90_ms
        assert latency.images_per_second == pytest.approx(8000 / latency.median_ms)


def test_runs_go_on_until_both_runs_and_seconds_are_reached() -> None:
    (latency,) = measure_latency(
        [Recorder("a", [])], [np.zeros((1, 4, 2, 3), np.uint8)], 1, min_runs=5, min_seconds=0.02
    )
    assert latency.runs > 5
