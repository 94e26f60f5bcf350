"""A simulated machine with a GPU and TensorRT: doubles replace the real packages."""

import sys
from collections.abc import Callable
from pathlib import Path

import double
import pytest
from color_network import color_network

from pmm_edge.export.tensorrt import BuiltEngine, build_engine
from pmm_edge.runtime.manifest import BatchProfile, BuildSettings


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., double.FakeGpu]:
    """Put a GPU and a version of TensorRT on this machine, in place of earlier ones."""

    def put(name: str = "Orin", compute_capability: str = "8.7", tensorrt: str = "10.3.0") -> double.FakeGpu:
        gpu = double.FakeGpu(name, compute_capability)
        monkeypatch.setitem(sys.modules, "tensorrt", double.tensorrt(gpu, tensorrt))
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", double.cuda_runtime(gpu))
        monkeypatch.setenv("PMM_HOME", str(tmp_path / "home"))
        return gpu

    return put


@pytest.fixture
def gpu(install: Callable[..., double.FakeGpu]) -> double.FakeGpu:
    return install()


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    """An ONNX file that a test may change."""
    return color_network(tmp_path / "export" / "model.onnx")


@pytest.fixture
def built(gpu: double.FakeGpu, onnx: Path) -> BuiltEngine:
    """An engine for batches of 2 to 4."""
    return build_engine(onnx, onnx.with_suffix(".engine"), BuildSettings(BatchProfile(2, 3, 4)))
