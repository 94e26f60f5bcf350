"""Which provider of ONNX Runtime runs a network on machines with a GPU; the sessions are doubles."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from color_network import color_network

import pmm_edge
from pmm_edge.errors import ModelError, PmmWarning
from pmm_edge.runtime import onnx_backend
from pmm_edge.runtime.manifest import BatchProfile

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
REASON = "libcublas.so.13: cannot open"

Requested = list[list[Any]]
Machine = Callable[..., Requested]


@pytest.fixture
def network(tmp_path: Path) -> Path:
    return color_network(tmp_path / "model.onnx")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """A machine with a driver, on which sessions accept only some of the listed providers."""

    def put(*accepted: str) -> Requested:
        requested: Requested = []

        class Session(onnxruntime.InferenceSession):
            def __init__(self, model: Any, options: Any, providers: list[Any], **others: Any) -> None:
                super().__init__(model, options, providers=[CPU], **others)
                requested.append(providers)
                names = [provider if isinstance(provider, str) else provider[0] for provider in providers]
                self._accepted = [name for name in names if name in (*accepted, CPU)]

            def get_providers(self) -> list[str]:
                return self._accepted

        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
        monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
        monkeypatch.setattr(onnx_backend, "driver_is_there", lambda: True)
        monkeypatch.setattr(onnx_backend, "load_error", lambda provider: REASON)
        monkeypatch.setenv("PMM_HOME", str(tmp_path / "home"))
        return requested

    return put


def test_a_working_gpu_is_used_silently(machine: Machine, network: Path) -> None:
    machine(CUDA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embedder = pmm_edge.load(network)
        assert (embedder.backend, embedder.device) == ("onnxruntime", "cuda:0")
        assert pmm_edge.load(network, "cpu").device == "cpu"
        assert pmm_edge.load(network, 1).device == "cuda:1"


def test_a_gpu_that_cannot_be_used_is_a_warning_or_an_error(machine: Machine, network: Path) -> None:
    machine()
    with pytest.warns(PmmWarning, match=REASON) as warned:
        assert pmm_edge.load(network).device == "cpu"
    assert len(warned) == 1
    for device in ("cuda:1", "tensorrt"):
        with pytest.raises(ModelError, match=REASON) as caught:
            pmm_edge.load(network, device)
        assert ("pmm export --trt" in caught.value.remedy) == (device == "tensorrt")


def test_a_build_without_cuda_warns_only_if_there_is_a_gpu(
    machine: Machine, network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.warns(PmmWarning, match=CUDA):
        assert pmm_edge.load(network).device == "cpu"
    monkeypatch.setattr(onnx_backend, "driver_is_there", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pmm_edge.load(network).device == "cpu"


@pytest.mark.parametrize("device", [None, "cuda", "tensorrt"])
def test_the_gpu_is_not_blamed_for_a_wrong_file(device: str | None, machine: Machine, network: Path) -> None:
    machine()
    network.write_bytes(network.read_bytes()[:100])
    with pytest.raises(ModelError) as caught:
        pmm_edge.load(network, device)
    assert REASON not in str(caught.value)


def test_tensorrt_is_used_only_on_request(machine: Machine, network: Path) -> None:
    requested = machine(TENSORRT, CUDA)
    assert pmm_edge.load(network).backend == "onnxruntime"
    assert not any(provider[0] == TENSORRT for providers in requested for provider in providers)
    embedder = pmm_edge.load(network, "tensorrt:1")
    assert (embedder.backend, embedder.device) == ("onnxruntime-tensorrt", "cuda:1")
    assert embedder.profile == BatchProfile(1, 16, 64)
    (name, options), (second, _), last = requested[-1]
    assert (name, second, last) == (TENSORRT, CUDA, CPU)
    assert options["device_id"] == "1"
    assert options["trt_profile_max_shapes"] == "images:64x96x64x3"
    assert Path(options["trt_engine_cache_path"]).is_dir()
    assert embedder.embed(np.zeros((67, 96, 64, 3), np.uint8)).shape == (67, 8)  # in batches of at most 64


def test_a_static_batch_needs_no_profile(machine: Machine, tmp_path: Path) -> None:
    requested = machine(TENSORRT)
    network = color_network(tmp_path / "static.onnx", batch=2)
    assert pmm_edge.load(network, "tensorrt").profile == BatchProfile(2, 2, 2)
    assert not any("profile" in option for option in requested[-1][0][1])


@pytest.mark.parametrize("device", ["cpu", "cuda:1", "tensorrt:1"])
def test_loads_with_gives_the_same_engine(device: str, machine: Machine, network: Path) -> None:
    machine(TENSORRT, CUDA)
    first = pmm_edge.load(network, device)
    again = pmm_edge.load(network, first.loads_with)
    assert first.loads_with == device
    assert (again.backend, again.device) == (first.backend, first.device)


def test_each_network_has_its_own_engine_cache(machine: Machine, network: Path, tmp_path: Path) -> None:
    """ONNX Runtime names cached engines by names in the graph: other weights would run with those of the first."""
    requested = machine(TENSORRT)
    other = color_network(tmp_path / "other" / "model.onnx", dataset="another")
    options = []
    for path in (network, network, other):
        pmm_edge.load(path, "tensorrt")
        options.append(requested[-1][0][1])
    first, again, changed = options
    assert first == again
    assert first["trt_engine_cache_path"] != changed["trt_engine_cache_path"]
    assert first["trt_timing_cache_path"] == changed["trt_timing_cache_path"]
