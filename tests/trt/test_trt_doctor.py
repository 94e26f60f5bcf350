"""The doctor's probe of TensorRT agrees with the runtime."""

import sys

import double
import pytest

from pmm_edge.doctor import Probe, probe_tensorrt, readiness
from pmm_edge.runtime.cuda import NotOnThisMachineError

WORKING = Probe(providers={"CPUExecutionProvider": None})


def test_a_machine_that_has_it(gpu: double.FakeGpu) -> None:
    found = probe_tensorrt()
    assert (found.version, found.error) == ("10.3.0", None)
    assert found.gpus[0].startswith("Orin")
    assert readiness("trt", WORKING, found).good is True
    assert readiness("trt", Probe(error="ImportError: broken"), found).good is False  # exports are checked with it
    assert not gpu.memory
    assert gpu.calls["cudaStreamDestroy"] == 1


def test_a_machine_without_a_gpu(gpu: double.FakeGpu) -> None:
    gpu.fails["cudaGetDeviceCount"] = 35
    found = probe_tensorrt()
    assert (found.version, found.gpus) == ("10.3.0", [])
    ready = readiness("trt", WORKING, found)
    assert (ready.good, ready.remedy) == (False, found.remedy)
    assert found.error in ready.value


def test_a_machine_without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(NotOnThisMachineError):
        probe_tensorrt()
