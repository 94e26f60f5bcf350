"""What does not load or run: one line that names the file, a remedy, and nothing of the engine's own log."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from color_network import color_network
from safetensors.torch import save_file
from torch import nn

import pmm_edge
from pmm_edge.errors import ModelError, PmmWarning
from pmm_edge.runtime import onnx_backend
from pmm_edge.runtime.torch_backend import TorchEmbedder, is_out_of_memory, without_tf32
from pmm_edge.spec import METADATA_KEY


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        pmm_edge.load(path, "cpu")
    assert "\n" not in str(caught.value)
    assert caught.value.remedy
    assert str(path) in caught.value.problem
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("model.onnx", "pmm export"),
        ("model.safetensors", "pmm export --safetensors"),
        ("best.pt", "pmm"),
        ("model.engine", "model.onnx --trt"),
        ("model.tflite", ".onnx"),
    ],
)
def test_missing_and_unknown_files(name: str, command: str, tmp_path: Path) -> None:
    assert command in refused(tmp_path / name)


def test_truncated_files(tiny_onnx: Path, tiny_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    save_file({"a": torch.zeros(9)}, tmp_path / "model.safetensors")
    for source in (tiny_onnx, tiny_checkpoint, tmp_path / "model.safetensors"):
        short = tmp_path / f"short{source.suffix}"
        content = source.read_bytes()
        for length in (0, min(len(content) - 4, 100_000)):
            short.write_bytes(content[:length])
            refused(short)
    assert capfd.readouterr() == ("", "")


def test_weights_without_a_spec_or_of_another_network(tiny_checkpoint: Path, tmp_path: Path) -> None:
    save_file({}, tmp_path / "bare.safetensors")
    assert "spec" in refused(tmp_path / "bare.safetensors")
    spec = torch.load(tiny_checkpoint, weights_only=True)["spec"]
    save_file({}, tmp_path / "empty.safetensors", metadata={METADATA_KEY: spec})
    refused(tmp_path / "empty.safetensors")


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("schema", 2),
        ("architecture", "osnet"),
        ("embedding_size", 0),
        ("height", 192),  # not that of the graph
        ("form", "RAW"),
        ("std", [0.2, 0.2, 0]),
    ],
)
def test_graphs_with_a_wrong_spec_or_none(entry: str, value: object, tmp_path: Path) -> None:
    path = color_network(tmp_path / "wrong.onnx")
    model = onnx.load(path)
    spec = json.loads(model.metadata_props[0].value)
    holder = spec["input"] if entry in spec["input"] else spec
    assert entry in holder
    holder[entry] = value
    model.metadata_props[0].value = json.dumps(spec)
    onnx.save(model, path)
    refused(path)
    del model.metadata_props[:]
    onnx.save(model, path)
    assert "spec" in refused(path)


@pytest.mark.parametrize(("opset", "ir"), [(99, 10), (18, 99)])
def test_files_that_are_too_new_for_the_runtime(opset: int, ir: int, tmp_path: Path) -> None:
    model = onnx.load(color_network(tmp_path / "new.onnx"))
    model.opset_import[0].version, model.ir_version = opset, ir
    onnx.save(model, tmp_path / "new.onnx")
    assert "99" in refused(tmp_path / "new.onnx")


def test_devices(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for path in (color_network(tmp_path / "model.onnx"), tiny_checkpoint):
        for device in ("tpu", "tensorrt", "cuda:97", "97"):
            with pytest.raises(ModelError, match=device):
                pmm_edge.load(path, device)
        assert pmm_edge.load(path, "cpu").device == "cpu"


# Which provider of ONNX Runtime runs a network on machines with a GPU; the sessions are doubles

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


# PyTorch, the reference

CROPS = np.zeros((3, 96, 64, 3), np.uint8)


def test_errors_of_torch_become_one_line(tiny_checkpoint: Path) -> None:
    embedder = pmm_edge.load(tiny_checkpoint, "cpu")
    assert isinstance(embedder, TorchEmbedder)
    with pytest.raises(ModelError) as caught:
        embedder.embed_prepared(np.broadcast_to(CROPS[:1], (10**13, 96, 64, 3)))
    assert is_out_of_memory(caught.value.__cause__)
    assert "10000000000000" in caught.value.problem
    assert embedder.embed_prepared(CROPS).shape == (3, 1536)  # a smaller batch still runs
    for error, full in (
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more"), True),
        (RuntimeError("CUDA error: an illegal memory access\nCompile with TORCH_USE_CUDA_DSA"), False),
        (RuntimeError(), False),
    ):

        class Network(nn.Module):
            def forward(self, images: torch.Tensor, error: Exception = error) -> torch.Tensor:
                raise error

        embedder.network = Network()
        with pytest.raises(ModelError) as caught:
            embedder.embed_prepared(CROPS)
        assert "\n" not in str(caught.value)
        assert str(embedder.path) in caught.value.problem
        assert ("smaller batch" in caught.value.remedy) == full


def test_tf32_is_off_and_restored() -> None:
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before, products.allow_tf32 = products.allow_tf32, True
    try:
        with convolutions.flags(enabled=True, allow_tf32=True):
            with without_tf32():
                assert (products.allow_tf32, convolutions.allow_tf32) == (False, False)
            assert (products.allow_tf32, convolutions.allow_tf32) == (True, True)
    finally:
        products.allow_tf32 = before
