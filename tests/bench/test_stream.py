"""Clients stream crops through a real network, and what they saw adds up."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pmm_edge.bench import stream
from pmm_edge.bench.stream import measure_stream
from pmm_edge.errors import DataError, PmmError
from pmm_edge.runtime import Embedder, load
from pmm_edge.spec import InputSpec, ModelSpec

CROPS = np.random.default_rng(0).integers(0, 256, (5, 96, 64, 3), dtype=np.uint8)


class MeanColour(Embedder):
    def __init__(self, largest: int = 99, runs: int = 10**9, takes: float = 0.0) -> None:
        super().__init__(ModelSpec("pmm", "none", 1, InputSpec(96, 64), 3, {}), Path("colour"), "none", "cpu")
        self.largest, self.runs, self.takes = largest, runs, takes

    def embed_prepared(self, images: np.ndarray) -> np.ndarray:
        self.runs -= 1
        time.sleep(self.takes)
        if len(images) > self.largest or self.runs < 0:
            raise RuntimeError(f"a batch of {len(images)}")
        return images.mean(axis=(1, 2), dtype=np.float32)


def test_a_real_network(tiny_onnx: Path) -> None:
    told = []
    found = measure_stream(load(tiny_onnx, "cpu"), CROPS, 3, 0.3, report=lambda *said: told.append(said))
    assert found.clients == 3
    assert 1 <= found.mean_batch <= found.largest_batch <= 3
    assert found.crops > 0
    assert 0 < found.median_ms <= found.p90_ms <= found.p99_ms
    # Little's law: of a closed loop, throughput times latency is the clients that wait.
    assert found.crops_per_second * found.median_ms / 1000 < 3 * 3
    assert (told[0][1:], told[-1]) == ((0, 100, "warming up"), ("streaming from 3 clients", 100, 100))


def test_one_client_alone_never_shares_a_batch() -> None:
    found = measure_stream(MeanColour(), CROPS, 1, 0.1)
    assert (found.largest_batch, found.mean_batch) == (1, 1)


def test_batches_have_a_cap() -> None:
    assert measure_stream(MeanColour(largest=2), CROPS, 6, 0.1, largest_batch=2).largest_batch <= 2


def test_a_network_that_is_slower_than_the_time_asked_for() -> None:
    found = measure_stream(MeanColour(takes=0.2), CROPS, 2, 0.01)
    assert found.crops >= 2
    assert found.crops_per_second == pytest.approx(8, rel=0.6)


def test_warming_up_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "WARM_UP_SECONDS", 0.0)
    embedder = MeanColour(largest=64)
    stream._warm_up(embedder, CROPS, 64)
    assert embedder.runs == 10**9 - 1


def test_crops_of_any_size() -> None:
    assert measure_stream(MeanColour(), [np.zeros((20, 10, 3), np.uint8)], 2, 0.1).crops > 0


def test_what_fails_ends_the_measurement() -> None:
    with pytest.raises(RuntimeError, match="a batch of"):
        measure_stream(MeanColour(runs=20), CROPS, 3, 60.0)
    assert not any(thread.name.startswith(("client", "batcher")) for thread in threading.enumerate())
    bad = [CROPS[0], np.zeros((3, 3), np.uint8)]
    with pytest.raises(DataError, match="is grey"):
        measure_stream(MeanColour(), bad, 2, 5.0)


@pytest.mark.parametrize(("clients", "crops", "seconds"), [(0, CROPS, 1.0), (1, [], 1.0), (1, CROPS, 0.0)])
def test_nothing_to_stream(clients: int, crops: np.ndarray, seconds: float) -> None:
    with pytest.raises(PmmError, match="cannot be measured"):
        measure_stream(MeanColour(), crops, clients, seconds)
