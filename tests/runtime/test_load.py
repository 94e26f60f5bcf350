"""Files that do not load: one line that names the file, a remedy, and nothing of the engine's own log."""

import json
from pathlib import Path

import onnx
import pytest
import torch
from color_network import color_network
from safetensors.torch import save_file

import pmm_edge
from pmm_edge.errors import ModelError
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


def test_checkpoints_of_another_version(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(tiny_checkpoint, weights_only=True)
    checkpoint["spec"] = json.dumps(json.loads(checkpoint["spec"]) | {"schema": 2})
    torch.save(checkpoint, tmp_path / "spec.pt")
    refused(tmp_path / "spec.pt")
    for named in ("pmm-edge checkpoint 99", "pmm-edge checkpoint x", 1, None):
        torch.save({"format": named}, tmp_path / "other.pt")
        refused(tmp_path / "other.pt")


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
