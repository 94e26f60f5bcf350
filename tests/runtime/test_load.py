"""Files that do not load: one line that says which and what to do, and nothing of the engine's own log."""

import json
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import save_file

import pmm_edge
from pmm_edge.errors import ModelError
from pmm_edge.export import export_safetensors
from pmm_edge.spec import METADATA_KEY


def refused(path: Path, message: str, device: str | None = "cpu") -> None:
    with pytest.raises(ModelError, match=message) as caught:
        pmm_edge.load(path, device)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


def test_missing_files(tmp_path: Path) -> None:
    refused(tmp_path / "model.onnx", r"model\.onnx does not exist\. Make it with pmm export")
    refused(tmp_path / "model.safetensors", r"does not exist\. Make it with pmm export --safetensors")
    refused(tmp_path / "best.pt", r"best\.pt does not exist")
    refused(tmp_path / "model.engine", r"model\.engine does not exist\. Build it here: pmm export .*model\.onnx --trt")


def test_kinds_that_do_not_load(tmp_path: Path) -> None:
    refused(tmp_path / "model.tflite", r"of no kind that can be loaded\. Name a \.onnx")


def test_truncated_files(
    tiny_onnx: Path, tiny_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = export_safetensors(tiny_checkpoint, tmp_path / "model.safetensors").path
    for source in (tiny_onnx, tiny_checkpoint, weights):
        short = tmp_path / f"short{source.suffix}"
        short.write_bytes(source.read_bytes()[:100_000])
        refused(short, "truncated")
        short.write_bytes(b"")
        refused(short, "truncated|carries no pmm-edge spec")
    assert capfd.readouterr() == ("", "")


def test_files_without_our_metadata(tiny_onnx: Path, tmp_path: Path) -> None:
    model = onnx.load(tiny_onnx)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "bare.onnx")
    refused(tmp_path / "bare.onnx", r"bare\.onnx carries no pmm-edge spec.*Export it again")
    save_file({}, tmp_path / "bare.safetensors")
    refused(tmp_path / "bare.safetensors", "carries no pmm-edge spec")


def test_weights_that_are_not_those_of_the_spec(tiny_checkpoint: Path, tmp_path: Path) -> None:
    spec = pmm_edge.load(tiny_checkpoint, "cpu").spec
    save_file({}, tmp_path / "empty.safetensors", metadata={METADATA_KEY: spec.to_json()})
    refused(tmp_path / "empty.safetensors", "are not those of its spec")


def test_a_graph_that_is_not_what_its_spec_says(tiny_onnx: Path, tmp_path: Path) -> None:
    model = onnx.load(tiny_onnx)
    metadata = model.metadata_props[0]
    metadata.value = metadata.value.replace('"height": 96', '"height": 192')
    onnx.save(model, tmp_path / "other.onnx")
    refused(tmp_path / "other.onnx", "is not what its spec says")


@pytest.mark.parametrize(
    ("number", "writer", "said"),
    [
        (
            2,
            "9.1.0",
            r"has format 2, written by pmm-edge 9\.1\.0; .* nothing newer\. Install pmm-edge 9\.1\.0 or later$",
        ),
        (0, "0.0.9", r"has format 0, written by pmm-edge 0\.0\.9; .* nothing older\. Train or export it again"),
        (2, None, r"has format 2, written by a newer pmm-edge; .*\. Install a later pmm-edge$"),
        (0, None, r"has format 0, written by an older pmm-edge; .* or install an older pmm-edge$"),
    ],
)
def test_files_of_another_version(
    number: int, writer: str | None, said: str, tiny_checkpoint: Path, tiny_onnx: Path, tmp_path: Path
) -> None:
    checkpoint = torch.load(tiny_checkpoint, weights_only=True)
    spec = json.loads(checkpoint["spec"]) | {"schema": number, "tools": {"pmm-edge": writer} if writer else {}}
    checkpoint["spec"] = json.dumps(spec)
    torch.save(checkpoint, tmp_path / "spec.pt")
    refused(tmp_path / "spec.pt", rf"the spec of .*spec\.pt {said}")
    model = onnx.load(tiny_onnx)
    model.metadata_props[0].value = checkpoint["spec"]
    onnx.save(model, tmp_path / "spec.onnx")
    refused(tmp_path / "spec.onnx", rf"the spec of .*spec\.onnx {said}")
    save_file({}, tmp_path / "spec.safetensors", metadata={METADATA_KEY: checkpoint["spec"]})
    refused(tmp_path / "spec.safetensors", rf"the spec of .*spec\.safetensors {said}")
    if writer is None:  # the file around the spec does not say
        torch.save({"format": f"pmm-edge checkpoint {number}", "anything": 1}, tmp_path / "file.pt")
        refused(tmp_path / "file.pt", rf"file\.pt {said}")


def test_files_of_no_version(tmp_path: Path) -> None:
    for named in ("pmm-edge checkpoint", "pmm-edge checkpoint x", 1, None):
        torch.save({"format": named}, tmp_path / "other.pt")
        refused(tmp_path / "other.pt", "other.pt is not a pmm-edge checkpoint")


def test_devices(tiny_onnx: Path, tiny_checkpoint: Path) -> None:
    for path in (tiny_onnx, tiny_checkpoint):
        refused(path, "unknown device 'tpu'. Choose cpu, cuda", device="tpu")
        refused(path, "device cuda:97 cannot be used", device="cuda:97")
        assert pmm_edge.load(path, "cpu").device == "cpu"
    refused(tiny_onnx, "device tensorrt:97 cannot be used by onnxruntime .*: .*pmm export --trt", device="tensorrt:97")
    refused(tiny_checkpoint, "unknown device 'tensorrt'.*runs only .onnx files", device="tensorrt")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"opset": 27}, r"has opset 27, onnxruntime [\d.]+ reads \d+ at most\. .* --opset 17, or install a newer"),
        ({"ir": 99}, r"has ONNX format \(IR\) 99, onnxruntime [\d.]+ reads \d+ at most\. .* or install a newer"),
    ],
)
def test_files_that_are_too_new_for_the_runtime(
    change: dict[str, int], said: str, tiny_onnx: Path, tmp_path: Path
) -> None:
    model = onnx.load(tiny_onnx)
    model.opset_import[0].version = change.get("opset", 18)
    model.ir_version = change.get("ir", model.ir_version)
    onnx.save(model, tmp_path / "new.onnx")
    refused(tmp_path / "new.onnx", rf"new\.onnx {said} onnxruntime$")


def test_a_spec_that_breaks_what_reads_it(tiny_onnx: Path, tmp_path: Path) -> None:
    model = onnx.load(tiny_onnx)
    written = model.metadata_props[0].value
    for old, new, said in (
        ('"dataset": null', f'"dataset": {"[" * 100_000}{"]" * 100_000}', "RecursionError: "),
        ('"schema": 1', '"schema": Infinity', "OverflowError: "),
    ):
        assert old in written
        model.metadata_props[0].value = written.replace(old, new)
        onnx.save(model, tmp_path / "wrong.onnx")
        refused(tmp_path / "wrong.onnx", rf"the spec of .*wrong\.onnx cannot be read \({said}")


def test_an_input_the_spec_cannot_mean(tiny_onnx: Path, tmp_path: Path) -> None:
    model = onnx.load(tiny_onnx)
    spec = json.loads(model.metadata_props[0].value)
    for entry, value, said in (
        ("form", "RAW", "input form 'RAW' is none of uint8, raw, normalized"),
        ("mean", [0.5, 0.5], "mean .* is not three numbers"),
        ("std", [0.2, float("nan"), 0.2], "std .* is not three numbers"),
        ("std", [0.2, 0.2, 0], "std .* is not above 0"),
    ):
        model.metadata_props[0].value = json.dumps(spec | {"input": spec["input"] | {entry: value}})
        onnx.save(model, tmp_path / "wrong.onnx")
        refused(tmp_path / "wrong.onnx", rf"the spec of .*wrong\.onnx cannot be read \(ValueError: {said}")
    for entry in ("architecture", "mix"):
        model.metadata_props[0].value = json.dumps(spec | {entry: "osnet"})
        onnx.save(model, tmp_path / "wrong.onnx")
        refused(tmp_path / "wrong.onnx", f"{entry} 'osnet' is none of")
