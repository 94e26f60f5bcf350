"""Which provider of ONNX Runtime runs a network on machines with a GPU; the sessions are doubles."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from color_network import color_network

import pmm_edge
from pmm_edge.errors import ModelError, PmmWarning
from pmm_edge.runtime import onnx_backend

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
REASON = "libcublas.so.13: cannot open"


@pytest.fixture
def network(tmp_path: Path) -> Path:
    return color_network(tmp_path / "model.onnx")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with a driver, on which sessions accept only some of the listed providers."""

    def put(*accepted: str) -> None:
        class Session(onnxruntime.InferenceSession):
            def __init__(self, model: Any, options: Any, providers: list[Any], **others: Any) -> None:
                super().__init__(model, options, providers=[CPU], **others)
                names = [provider if isinstance(provider, str) else provider[0] for provider in providers]
                self._accepted = [name for name in names if name in (*accepted, CPU)]

            def get_providers(self) -> list[str]:
                return self._accepted

        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
        monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
        monkeypatch.setattr(onnx_backend, "driver_is_there", lambda: True)
        monkeypatch.setattr(onnx_backend, "load_error", lambda: REASON)

    return put


def test_a_working_gpu_is_used_silently(machine: Callable, network: Path) -> None:
    machine(CUDA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embedder = pmm_edge.load(network)
        assert (embedder.backend, embedder.device) == ("onnxruntime", "cuda:0")
        assert pmm_edge.load(network, "cpu").device == "cpu"
        assert pmm_edge.load(network, 1).device == "cuda:1"


def test_a_gpu_that_cannot_be_used_is_a_warning_or_an_error(machine: Callable, network: Path) -> None:
    machine()
    with pytest.warns(PmmWarning, match=REASON) as warned:
        assert pmm_edge.load(network).device == "cpu"
    assert len(warned) == 1
    with pytest.raises(ModelError, match=REASON):
        pmm_edge.load(network, "cuda:1")
    network.write_bytes(network.read_bytes()[:100])  # the GPU is not blamed for a wrong file
    for device in (None, "cuda"):
        with pytest.raises(ModelError) as caught:
            pmm_edge.load(network, device)
        assert REASON not in str(caught.value)


def test_a_build_without_cuda_warns_only_if_there_is_a_gpu(
    machine: Callable, network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.warns(PmmWarning, match=CUDA):
        assert pmm_edge.load(network).device == "cpu"
    monkeypatch.setattr(onnx_backend, "driver_is_there", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pmm_edge.load(network).device == "cpu"
