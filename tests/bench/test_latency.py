"""What is timed is a full batch, and the figures are those of the runs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pmm_edge.bench import timing
from pmm_edge.bench.report import Clocks, Latency
from pmm_edge.bench.resources import Reading
from pmm_edge.bench.timing import measure_end_to_end, measure_latency, ratio_interval, without_cuda_graphs
from pmm_edge.errors import DataError, PmmError
from pmm_edge.runtime import Embedder, load
from pmm_edge.spec import InputSpec, ModelSpec

CROPS = np.zeros((3, 4, 2, 3), np.uint8)


class Recorder(Embedder):
    """Moves a clock by what the next run takes, and notes the batches; no network."""

    def __init__(self, clock: list[float], takes: Callable[[int], float], gpu_ms: float | None = None) -> None:
        spec = ModelSpec("pmm", "resnet18", 4, InputSpec(4, 2), 3, {"I": (0, 3)}, 1)
        super().__init__(spec, Path("model"), "none", "cpu")
        self.clock, self.takes, self.gpu_ms = clock, takes, gpu_ms
        self.shapes: list[tuple[int, ...]] = []

    def embed_prepared(self, images: np.ndarray) -> np.ndarray:
        self.shapes.append(images.shape)
        self.clock[0] += self.takes(len(self.shapes))
        return np.zeros((len(images), 3), np.float32)

    def gpu_milliseconds(self, images: np.ndarray) -> float | None:
        return self.gpu_ms


def measured(*takes: Callable[[int], float], batch: int = 8) -> list[Latency]:
    clock = [0.0]
    embedders = [Recorder(clock, take) for take in takes]
    found = measure_latency(embedders, [CROPS] * len(takes), batch, clock=lambda: clock[0])
    assert {shape for embedder in embedders for shape in embedder.shapes} == {(batch, 4, 2, 3)}
    return found


def test_figures_are_those_of_the_runs() -> None:
    clock = [0.0]
    embedder = Recorder(clock, lambda run: 0.1, gpu_ms=7.0)
    (found,) = measure_latency([embedder], [CROPS], 8, clock=lambda: clock[0])
    assert (found.batch, found.scope, found.cuda_graph, found.runs) == (8, "model", False, 50)
    assert (found.median_ms, found.p90_ms, found.p99_ms) == pytest.approx((100, 100, 100))
    assert found.variation == pytest.approx(0)
    assert found.images_per_second == pytest.approx(80)
    assert (found.ratio, found.ratio_low, found.ratio_high) == (1, 1, 1)
    assert found.gpu_ms == 7


def test_clocks_and_what_kept_them_down_are_those_of_all_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = [
        Reading(3400, 1755),
        Reading(3100, 1410, ("its power limit",)),
        Reading(3300, 1600, ("its temperature",)),
    ]
    asked = []

    def reader(device: str) -> Callable[[], Reading]:
        asked.append(device)
        return lambda: readings.pop() if readings else Reading(3200, 1500, ("its temperature",))

    monkeypatch.setattr(timing, "clock_reader", reader)
    (found,) = measured(lambda run: 0.1)
    assert (found.cpu_clocks, found.gpu_clocks) == (Clocks(3100, 3400), Clocks(1410, 1755))
    assert found.slowed_by == ["its temperature", "its power limit"]
    assert asked == ["cpu"]


def test_tails_and_variation() -> None:
    (found,) = measured(lambda run: 1.0 if run % 10 == 0 else 0.1)
    assert found.median_ms == pytest.approx(100)
    assert found.p99_ms == pytest.approx(1000)
    assert found.variation == pytest.approx(1.42, abs=0.2)


def test_ratios_are_to_the_first() -> None:
    reference, faster, slower = measured(lambda run: 0.1, lambda run: 0.05, lambda run: 0.3)
    assert reference.ratio == 1
    for found, ratio in ((faster, 0.5), (slower, 3.0)):
        assert (found.ratio, found.ratio_low, found.ratio_high) == pytest.approx((ratio,) * 3)


def test_what_slows_a_turn_down_for_both_leaves_the_ratio_sharp() -> None:
    drift = np.linspace(1, 3, 20)
    reference, own = ([[speed * slow] * 5 for slow in drift] for speed in (0.1, 0.05))
    ratio, low, high = ratio_interval(own, reference)
    assert (low, ratio, high) == pytest.approx((0.5, 0.5, 0.5))


def test_noise_between_turns_widens_the_interval() -> None:
    random = np.random.default_rng(0)
    reference, own = ([[value] * 5 for value in random.lognormal(0, 0.3, 20)] for _ in range(2))
    ratio, low, high = ratio_interval(own, reference)
    assert low < ratio < high
    assert high - low > 0.1


def test_turns_of_one_alone_are_left_out() -> None:
    assert ratio_interval([[1.0], [1.0], [9.0]], [[2.0], [2.0], []]) == pytest.approx((0.5, 0.5, 0.5))


def test_the_interval_holds_the_true_ratio_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    held = 0
    for _ in range(60):
        slow = random.lognormal(0, 0.05, 20)  # what a turn's neighbours do to both
        own, reference = (
            [list(speed * factor * random.lognormal(0, 0.05, 5)) for factor in slow] for speed in (0.8, 1.0)
        )
        _, low, high = ratio_interval(own, reference, resamples=200)
        held += low <= 0.8 <= high
    assert held >= 52  # of 57 expected


def test_from_files_to_embeddings(tiny_onnx: Path, tiny_dataset: Path) -> None:
    paths = sorted((tiny_dataset / "query").glob("*.jpg"))[:2]
    embedder = load(tiny_onnx, "cpu")
    own, again = measure_end_to_end([embedder, embedder], paths, 3, min_runs=5, min_seconds=0.0)
    assert (own.batch, own.scope, own.cuda_graph, own.gpu_ms) == (3, "end to end", False, None)
    assert own.runs >= 5
    assert 0 < again.ratio_low <= again.ratio <= again.ratio_high


def test_files_that_cannot_be_timed(tiny_onnx: Path, tmp_path: Path) -> None:
    embedder = load(tiny_onnx, "cpu")
    with pytest.raises(DataError, match=r"cannot read image .*missing\.jpg"):
        measure_end_to_end([embedder], [tmp_path / "missing.jpg"], 1)
    with pytest.raises(PmmError, match="no images"):
        measure_end_to_end([embedder], [], 1)


def test_no_graphs_to_leave_out(tiny_onnx: Path) -> None:
    assert without_cuda_graphs(load(tiny_onnx, "cpu")) is None
