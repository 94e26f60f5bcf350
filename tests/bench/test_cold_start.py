"""A real process loads a real network; one that dies is one line."""

import sys
from pathlib import Path

import pytest

from pmm_edge.bench import timing
from pmm_edge.bench.timing import measure_cold_start
from pmm_edge.errors import ModelError, PmmError


def test_a_real_network(tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy.py").write_text("raise RuntimeError('the working folder is not to be imported from')")
    monkeypatch.chdir(tmp_path)
    ballast = bytearray(600 << 20)
    ballast[:: 1 << 12] = b"x" * len(ballast[:: 1 << 12])  # what this process holds is not the other's
    found = measure_cold_start(tiny_onnx, "cpu", 4)
    assert 50 < found.first_embedding_ms < 60_000
    assert 60 < found.peak_memory_mib < 600
    assert (found.batch, found.peak_gpu_memory_mib) == (4, None)


def test_a_model_that_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"process of its own: .*ModelError: .*none\.onnx does not exist") as caught:
        measure_cold_start(tmp_path / "none.onnx", "cpu", 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("child", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by signal 9"),
        ("import sys; sys.exit(3)", "it ended with exit code 3"),
        ("print('hello')", "it ended with exit code 0"),
        ("import time; time.sleep(60)", "after 0.5 s at the latest"),
    ],
)
def test_a_process_that_dies(child: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_CHILD", child)
    with pytest.raises(ModelError, match=said):
        measure_cold_start(Path("model.onnx"), "cpu", 1, timeout=0.5 if "sleep" in child else 60)


def test_what_engines_print_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_CHILD", "import time; print('[1, 2] hello'); print([time.monotonic(), 77.0])")
    assert measure_cold_start(Path("model.onnx"), "cpu", 1).peak_memory_mib == 77.0


def test_memory_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        used = iter([1000.0, 1000.0, 1600.0, 1900.0])

        @property
        def used_mib(self) -> float:
            return next(self.used, 1400.0)

    monkeypatch.setattr(timing, "open_gpu", lambda device: Gpu())
    monkeypatch.setattr(timing, "_CHILD", "import time; time.sleep(0.3); print([time.monotonic(), 77.0])")
    assert measure_cold_start(Path("model.onnx"), "cuda:0", 1).peak_gpu_memory_mib == 900.0


def test_the_process_gets_the_device_of_onnxruntimes_tensorrt_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_CHILD", "import json, sys; sys.exit(json.loads(sys.argv[1])[1])")
    with pytest.raises(ModelError, match="process of its own: tensorrt:1"):
        measure_cold_start(Path("model.onnx"), "tensorrt:1", 1)


def test_no_batch() -> None:
    with pytest.raises(PmmError, match="a batch of 0"):
        measure_cold_start(Path(sys.executable), "cpu", 0)
