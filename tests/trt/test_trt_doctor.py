"""The doctor's probe of TensorRT says what the runtime itself would say."""

import sys

import double
import pytest

from pmm_edge.doctor import readiness, tensorrt
from pmm_edge.runtime.cuda import NotOnThisMachineError

ONNX_RUNTIME = {"providers": {"CPUExecutionProvider": None}}


def trt(found: dict) -> object:
    return next(item for item in readiness(ONNX_RUNTIME, found) if item.command == "trt")


def test_a_machine_that_has_it(gpu: double.FakeGpu) -> None:
    found = tensorrt()
    assert (found["version"], found["gpu"]) == ("10.3.0", "Orin")
    assert trt(found).usable
    assert not gpu.memory
    assert gpu.calls["cudaStreamDestroy"] == 1


def test_an_engine_is_built_from_a_file_that_onnx_runtime_has_read(gpu: double.FakeGpu) -> None:
    (ready,) = [item for item in readiness({"error": "ImportError: broken"}, tensorrt()) if item.command == "trt"]
    assert ready.words == "cannot work: onnxruntime: ImportError: broken"
    assert ready.remedies == ["pip install -U pmm-edge"]


def test_a_machine_without_a_gpu(gpu: double.FakeGpu) -> None:
    gpu.fails["cudaGetDeviceCount"] = 35
    found = tensorrt()
    assert found["version"] == "10.3.0"
    assert "CUDA cannot use a GPU" in found["cuda_error"]
    assert trt(found).missing == [found["cuda_error"]]
    assert trt(found).remedies == [found["cuda_remedy"]]


def test_a_machine_without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(NotOnThisMachineError, match="TensorRT is not installed"):
        tensorrt()
