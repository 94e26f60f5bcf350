"""Interleaved timing, latency and cold start. In the timing tests only the work moves the clock."""

from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from pmm_edge.bench import timing
from pmm_edge.bench.report import Latency
from pmm_edge.bench.resources import ClockReading
from pmm_edge.bench.timing import (
    Timings,
    Workload,
    measure_cold_start,
    measure_end_to_end,
    measure_latency,
    ratio_interval,
    time_interleaved,
    warm_up,
    without_cuda_graphs,
)
from pmm_edge.errors import DataError, ModelError, PmmError
from pmm_edge.runtime import Embedder, load
from pmm_edge.spec import InputSpec, ModelSpec

CROPS = np.zeros((3, 4, 2, 3), np.uint8)


class Machine:
    """A clock, and workloads that move it and record who ran when."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def clock(self) -> float:
        return self.now

    def workload(self, name: str, *seconds: float) -> Workload:
        """Each run takes the next of `seconds`; the last one repeats."""
        left = list(seconds)

        def run() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return Workload(run)


def timed(machine: Machine, *workloads: Workload, min_runs: int = 50, min_seconds: float = 2.0) -> list[Timings]:
    return time_interleaved(workloads, min_runs, min_seconds, clock=machine.clock)


def test_slow_work_gets_enough_runs_and_fast_work_enough_seconds() -> None:
    machine = Machine()
    (slow,) = timed(machine, machine.workload("a", 0.5))
    assert [len(turn) for turn in slow.turns] == [5] * 10
    assert slow.seconds == pytest.approx([0.5] * 50)
    (fast,) = timed(machine, machine.workload("b", 0.001))
    assert len(fast.turns) == 20
    assert 2.0 <= sum(fast.seconds) < 2.2


def test_workloads_of_any_speed_get_the_same_turns() -> None:
    machine = Machine()
    slow, fast = timed(machine, machine.workload("slow", 0.5), machine.workload("fast", 1 / 64))
    assert [len(turn) for turn in slow.turns] == [5] * 10
    assert [len(turn) for turn in fast.turns] == [14] * 10  # 2 s plus the margin
    order = [(name, len(list(runs))) for name, runs in groupby(machine.calls)]
    assert order[2:] == [("slow", 6), ("fast", 15)] * 10  # after the warm-up; the first run of a turn is not counted


def test_the_warm_up_ends_when_stable_or_late() -> None:
    machine = Machine()
    assert warm_up(machine.workload("a", 1.0, 0.5, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1).run, machine.clock) == pytest.approx(
        0.1
    )
    assert len(machine.calls) >= 8
    machine = Machine()
    warm_up(machine.workload("never stable", *(0.1 * 1.2**number for number in range(40))).run, machine.clock)
    assert machine.now < 10
    machine = Machine()
    warm_up(machine.workload("seconds", 2.0).run, machine.clock)
    assert len(machine.calls) == 2


def test_work_that_becomes_faster_gets_more_turns() -> None:
    machine = Machine()
    first, second = timed(machine, machine.workload("a", *[0.05] * 30, 0.01), machine.workload("b", 0.05))
    assert sum(first.seconds) >= 2.0
    assert first.turns[-1]
    assert not second.turns[-1]  # it had enough
    assert len(first.turns) == len(second.turns)


def test_progress_estimates_the_time_left() -> None:
    machine, told = Machine(), []
    time_interleaved([machine.workload("a", 1.0)], 50, 2.0, lambda *said: told.append(said), "timing", machine.clock)
    assert told[0][:3] == ("timing", 0, 100)
    assert told[1] == ("timing", 10, 100, "54 s left")  # 9 turns of 6 runs
    assert told[-1][:3] == ("timing", 100, 100)
    assert [said[1] for said in told] == sorted(said[1] for said in told)


def test_clocks_and_gpu_time_are_read_untimed_at_the_end_of_each_turn() -> None:
    machine = Machine()
    run = machine.workload("a", 0.5).run

    def read_clocks() -> ClockReading:
        machine.now += 100
        machine.calls.append("clocks")
        return ClockReading(gpu_mhz=len(machine.calls))

    def gpu_milliseconds() -> float:
        machine.calls.append("events")
        return 3.0

    (found,) = timed(machine, Workload(run, gpu_milliseconds, read_clocks))
    assert found.seconds == pytest.approx([0.5] * 50)
    assert machine.calls[-80:] == [*["a"] * 6, "clocks", "events"] * 10
    assert found.gpu_ms == [3.0] * 10
    assert len({reading.gpu_mhz for reading in found.clocks}) == 10


class Recorder(Embedder):
    """Moves a clock by the time of the next run and records the batches; there is no network."""

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


def measured(*takes: Callable[[int], float], gpu_ms: float | None = None) -> list[Latency]:
    clock = [0.0]
    embedders = [Recorder(clock, take, gpu_ms) for take in takes]
    found = measure_latency(embedders, [CROPS] * len(takes), 8, clock=lambda: clock[0])
    assert {shape for embedder in embedders for shape in embedder.shapes} == {(8, 4, 2, 3)}
    return found


def test_figures_of_constant_times() -> None:
    (found,) = measured(lambda run: 0.1, gpu_ms=7.0)
    assert (found.batch, found.scope, found.cuda_graph, found.runs) == (8, "model", False, 50)
    assert (found.median_ms, found.p90_ms, found.p99_ms) == pytest.approx((100, 100, 100))
    assert (found.variation, found.images_per_second) == pytest.approx((0, 80))
    assert (found.ratio, found.ratio_low, found.ratio_high) == (1, 1, 1)
    assert found.gpu_ms == 7
    (found,) = measured(lambda run: 1.0 if run % 10 == 0 else 0.1)
    assert (found.median_ms, found.p99_ms, found.variation) == pytest.approx((100, 1000, 1.42), rel=0.2)


def test_ratios_are_to_the_first_model() -> None:
    reference, faster, slower = measured(lambda run: 0.1, lambda run: 0.05, lambda run: 0.3)
    assert reference.ratio == 1
    for found, ratio in ((faster, 0.5), (slower, 3.0)):
        assert (found.ratio, found.ratio_low, found.ratio_high) == pytest.approx((ratio,) * 3)


def test_the_interval_of_a_ratio() -> None:
    drift = np.linspace(1, 3, 20)  # slows both down alike: the ratio stays sharp
    reference, own = ([[speed * slow] * 5 for slow in drift] for speed in (0.1, 0.05))
    assert ratio_interval(own, reference) == pytest.approx((0.5, 0.5, 0.5))
    random = np.random.default_rng(0)
    reference, own = ([[value] * 5 for value in random.lognormal(0, 0.3, 20)] for _ in range(2))
    ratio, low, high = ratio_interval(own, reference)
    assert low < ratio < high
    assert high - low > 0.1
    assert ratio_interval([[1.0], [1.0], [9.0]], [[2.0], [2.0], []]) == pytest.approx((0.5, 0.5, 0.5))


def test_the_interval_covers_the_true_ratio() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        slow = random.lognormal(0, 0.05, 20)
        own, reference = (
            [list(speed * factor * random.lognormal(0, 0.05, 5)) for factor in slow] for speed in (0.8, 1.0)
        )
        _, low, high = ratio_interval(own, reference, resamples=200)
        covered += low <= 0.8 <= high
    assert covered >= 52  # 57 expected


def test_from_files_to_embeddings(tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    paths = sorted((tiny_dataset / "query").glob("*.jpg"))[:2]
    embedder = load(tiny_onnx, "cpu")
    own, again = measure_end_to_end([embedder, embedder], paths, 3, min_runs=5, min_seconds=0.0)
    assert (own.batch, own.scope, own.cuda_graph, own.gpu_ms) == (3, "end to end", False, None)
    assert own.runs >= 5
    assert 0 < again.ratio_low <= again.ratio <= again.ratio_high
    assert without_cuda_graphs(embedder) is None
    with pytest.raises(DataError):
        measure_end_to_end([embedder], [tmp_path / "missing.jpg"], 1)
    with pytest.raises(PmmError):
        measure_end_to_end([embedder], [], 1)


def test_cold_start_of_a_real_network(tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy.py").write_text("raise RuntimeError('imported from the working directory')")
    monkeypatch.chdir(tmp_path)
    ballast = bytearray(600 << 20)
    ballast[:: 1 << 12] = b"x" * len(ballast[:: 1 << 12])  # memory of this process does not count
    found = measure_cold_start(tiny_onnx, "cpu", 4)
    assert 50 < found.first_embedding_ms < 60_000
    assert 60 < found.peak_memory_mib < 600
    assert (found.batch, found.peak_gpu_memory_mib) == (4, None)


@pytest.mark.parametrize(
    "child",
    [
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import sys; sys.exit(3)",
        "print('no figures')",
        "import time; time.sleep(60)",
        "raise RuntimeError('line 1\\nline 2')",
    ],
)
def test_a_process_that_fails_is_one_line(child: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_CHILD", child)
    with pytest.raises(ModelError) as caught:
        measure_cold_start(Path("model.onnx"), "cpu", 1, timeout=0.5 if "sleep" in child else 60)
    assert "\n" not in str(caught.value)
    assert "model.onnx" in str(caught.value)


def test_gpu_memory_device_and_output_of_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        used = iter([1000.0, 1000.0, 1600.0, 1900.0])

        @property
        def used_mib(self) -> float:
            return next(self.used, 1400.0)

    child = "import json, sys, time; print('[1, 2] log'); time.sleep(0.3); print([time.monotonic(), 77.0]);"
    monkeypatch.setattr(timing, "open_gpu", lambda device: Gpu())
    monkeypatch.setattr(timing, "_CHILD", f"{child} assert json.loads(sys.argv[1])[1] == 'tensorrt:1'")
    found = measure_cold_start(Path("model.onnx"), "tensorrt:1", 1)
    assert (found.peak_memory_mib, found.peak_gpu_memory_mib) == (77.0, 900.0)
