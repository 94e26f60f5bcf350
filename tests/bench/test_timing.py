"""Interleaved timing, latency and cold start. In the timing tests only the work moves the clock."""

import errno
import os
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from pmm_edge.bench import timing
from pmm_edge.bench.report import Latency
from pmm_edge.bench.timing import Workload, measure_cold_start, measure_latency, ratio_interval
from pmm_edge.errors import DataError, ModelError
from pmm_edge.runtime import Embedder, load
from pmm_edge.spec import InputSpec, ModelSpec


class Machine:
    """A clock, and workloads that move it and record who ran when."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def workload(self, name: str, *seconds: float) -> Workload:
        """Each run takes the next of `seconds`; the last one repeats."""
        left = list(seconds)

        def run() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return Workload(run)

    def time(self, *workloads: Workload) -> list[list[int]]:
        """Time for at least 50 runs and 2 s; return the number of runs in each turn."""
        timing.time_interleaved(workloads, 50, 2.0)
        return [[len(turn) for turn in workload.turns] for workload in workloads]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(timing, "perf_counter", lambda: machine.now)
    return machine


def test_workloads_of_any_speed_get_the_same_turns(machine: Machine) -> None:
    slow, fast = machine.workload("slow", 0.5), machine.workload("fast", 1 / 64)
    assert machine.time(slow, fast) == [[5] * 10, [13] * 10]
    order = [(name, len(list(runs))) for name, runs in groupby(machine.calls)]
    assert order[2:] == [("slow", 6), ("fast", 14)] * 10  # after the warm-up; the first run of a turn is not counted
    assert machine.time(machine.workload("very fast", 1 / 1024)) == [[103] * 20]


@pytest.mark.parametrize(
    ("seconds", "typical", "runs"),
    [
        ([0.05], 0.05, 6),
        ([2.0], 2.0, 2),
        ([0.2, 0.1, 0.1, 0.05, 0.02, 0.02], 0.02, None),
        ([0.01 * 1.2**number for number in range(40)], None, 19),  # never stable
    ],
)
def test_the_warm_up_ends_when_stable_or_late(
    seconds: list[float], typical: float | None, runs: int | None, machine: Machine
) -> None:
    median = timing.warm_up(machine.workload("a", *seconds).run)
    assert typical is None or median == pytest.approx(typical)
    assert runs is None or len(machine.calls) == runs
    assert machine.now < 5


def test_clocks_and_gpu_time_are_read_untimed_at_the_end_of_each_turn(machine: Machine) -> None:
    workload = machine.workload("a", 0.5)

    def read_clocks() -> tuple[None, int]:
        machine.now += 100
        machine.calls.append("clocks")
        return None, len(machine.calls)

    workload.read_clocks, workload.gpu_milliseconds = read_clocks, lambda: machine.calls.append("events") or 3.0
    machine.time(workload)
    assert np.array(workload.turns) == pytest.approx(np.full((10, 5), 0.5))
    assert machine.calls[-80:] == [*["a"] * 6, "clocks", "events"] * 10
    assert workload.gpu_ms == [3.0] * 10
    assert len({gpu for _, gpu in workload.clocks}) == 10


class Recorder(Embedder):
    """Moves a clock by the time of the next run and records the batches; there is no network."""

    def __init__(self, machine: Machine, *seconds: float, gpu_ms: float | None = None) -> None:
        super().__init__(ModelSpec("pmm", "none", 1, InputSpec(4, 2), 3, {}), Path("model"), "none", "cpu")
        self.machine, self.seconds, self.gpu_ms = machine, seconds, gpu_ms
        self.shapes: list[tuple[int, ...]] = []

    def embed_prepared(self, images: np.ndarray) -> np.ndarray:
        self.machine.now += self.seconds[len(self.shapes) % len(self.seconds)]
        self.shapes.append(images.shape)
        return np.zeros((len(images), 3), np.float32)

    def gpu_milliseconds(self, images: np.ndarray) -> float | None:
        return self.gpu_ms


def test_figures_of_known_times(machine: Machine) -> None:
    def measured(*seconds: tuple[float, ...], gpu_ms: float | None = None) -> list[Latency]:
        embedders = [Recorder(machine, *own, gpu_ms=gpu_ms) for own in seconds]
        found = measure_latency(embedders, [np.zeros((3, 4, 2, 3), np.uint8)] * len(seconds), 8)
        assert {shape for embedder in embedders for shape in embedder.shapes} == {(8, 4, 2, 3)}
        return found

    (found,) = measured((0.1,), gpu_ms=7.0)
    assert (found.batch, found.scope, found.cuda_graph, found.runs, found.gpu_ms) == (8, "model", False, 50, 7)
    assert (found.median_ms, found.p90_ms, found.p99_ms) == pytest.approx((100, 100, 100))
    assert (found.variation, found.images_per_second) == pytest.approx((0, 80))
    assert (found.ratio, found.ratio_low, found.ratio_high) == pytest.approx((1, 1, 1))
    (found,) = measured((*[0.1] * 9, 1.0))
    assert (found.median_ms, found.p99_ms, found.variation) == pytest.approx((100, 1000, 1.42), rel=0.2)
    for found, ratio in zip(measured((0.1,), (0.05,), (0.3,)), (1, 0.5, 3), strict=True):
        assert (found.ratio, found.ratio_low, found.ratio_high) == pytest.approx((ratio,) * 3)


def test_the_interval_covers_the_true_ratio() -> None:
    drift = np.linspace(1, 3, 20)[:, None]  # slows both down, and does not widen the interval
    assert ratio_interval(np.full((20, 5), 0.05) * drift, np.full((20, 9), 0.1) * drift) == pytest.approx((0.5,) * 3)
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        turns = random.lognormal(0, 0.05, (20, 1))
        own, reference = (speed * turns * random.lognormal(0, 0.05, (20, 5)) for speed in (0.8, 1.0))
        _, low, high = ratio_interval(own, reference, resamples=200)
        covered += low <= 0.8 <= high
    assert covered >= 52  # 57 expected


def test_from_files_to_embeddings(tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    paths = sorted((tiny_dataset / "query").glob("*.jpg"))[:2]
    embedder = load(tiny_onnx, "cpu")
    own, again = measure_latency([embedder, embedder], [], 3, min_runs=5, min_seconds=0.0, files=paths)
    assert (own.batch, own.scope, own.cuda_graph, own.gpu_ms) == (3, "end to end", False, None)
    assert own.runs >= 5
    assert 0 < again.ratio_low <= again.ratio <= again.ratio_high
    with pytest.raises(DataError):
        measure_latency([embedder], [], 1, files=[tmp_path / "missing.jpg"])


def test_cold_start_of_a_real_network(tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy.py").write_text("raise RuntimeError('imported from the working directory')")
    monkeypatch.chdir(tmp_path)
    ballast = np.ones(600 << 20, np.uint8)  # memory of this process does not count
    found = measure_cold_start(tiny_onnx, "cpu", 4)
    assert 50 < found.first_embedding_ms < 60_000
    assert 60 < found.peak_memory_mib < ballast.nbytes >> 20
    assert found.batch == 4


@pytest.mark.parametrize(
    ("child", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "exit code -9"),
        ("raise RuntimeError('line 1\\nline 2')", "line 2"),
        ("import time; time.sleep(60)", "no result after 1 s"),
    ],
)
def test_a_process_that_fails_is_one_line(child: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_CHILD", child)
    with pytest.raises(ModelError) as caught:
        measure_cold_start(Path("model.onnx"), "cpu", 1, timeout=1 if "sleep" in child else 60)
    assert "\n" not in str(caught.value)
    assert f"model.onnx in a separate process: {reason}" in str(caught.value)


def test_without_memory_for_another_process_the_cold_start_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr("subprocess.run", no_memory)
    with pytest.raises(ModelError, match=r"model\.onnx"):
        measure_cold_start(Path("model.onnx"), "cpu", 1)
