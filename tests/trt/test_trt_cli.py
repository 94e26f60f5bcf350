"""`pmm export --trt` where there is a GPU, where there is none, and where there is no torch."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import double
import pytest
from color_network import color_network
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from pmm_edge.errors import OutputError


def test_checkpoint_to_engine(pmm: Callable, gpu: double.FakeGpu, tiny_checkpoint: Path, tmp_path: Path) -> None:
    ended = pmm(
        "export", tiny_checkpoint, "--out", tmp_path / "a.onnx", "--trt", "--batch", "1,2,8", "--workspace", "2"
    )
    assert ended.exit_code == 0, ended.stderr
    assert "a.engine" in ended.stdout
    assert "built for Orin with TensorRT 10.3.0" in ended.stdout
    assert "1 FP32" in ended.stdout
    assert {path.name for path in tmp_path.glob("a.*")} == {"a.onnx", "a.engine", "a.manifest.json"}


def test_an_exported_file_to_engine_as_json(pmm: Callable, gpu: double.FakeGpu, onnx: Path, tmp_path: Path) -> None:
    ended = pmm("export", onnx, "--trt", "--out", tmp_path / "b.engine", "--no-timing-cache", "--json")
    assert ended.exit_code == 0, ended.stderr
    printed = json.loads(ended.stdout)
    assert printed["exported"] == []
    assert printed["engine"]["path"] == str(tmp_path / "b.engine")
    assert printed["engine"]["settings"]["timing_cache"] is False
    assert not (tmp_path / "home").exists()


def test_without_tensorrt_the_onnx_file_is_written_and_the_rest_said(
    pmm: Callable, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    ended = pmm("export", tiny_checkpoint, "--out", tmp_path / "model.onnx", "--trt", "--batch", "1,4,8")
    assert ended.exit_code == 1
    assert "model.onnx" in ended.stdout
    assert (tmp_path / "model.onnx").is_file()
    assert not (tmp_path / "model.engine").exists()
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith(
        f"error: {tmp_path / 'model.onnx'} is ready, but its engine cannot be built here: TensorRT is"
    )
    assert "pmm export model.onnx --trt --batch-profile 1,4,8" in last
    assert "trtexec --onnx=model.onnx --saveEngine=model.engine --stronglyTyped" in last


@pytest.mark.parametrize("batch", [(), ("--batch", "4,4,4")])
def test_a_static_batch_is_the_engines_only_one(
    batch: tuple[str, ...], pmm: Callable, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    out = tmp_path / "model.onnx"
    ended = pmm("export", tiny_checkpoint, "--out", out, "--trt", "--static-batch", "4", *batch)
    last = ended.stderr.strip().splitlines()[-1]
    assert "pmm export model.onnx --trt --batch-profile 4,4,4" in last
    assert "--minShapes=images:4x96x64x3 --optShapes=images:4x96x64x3 --maxShapes=images:4x96x64x3" in last


def refused(pmm: Callable, *arguments: object) -> str:
    ended = pmm("export", *arguments)
    assert (ended.exit_code, ended.stdout) == (2, "")
    return ended.stderr.strip().splitlines()[-1]


def test_wrong_use(pmm: Callable, gpu: double.FakeGpu, onnx: Path) -> None:
    assert "invalid batch profile 64,16,1. Give minimum,optimal,maximum" in refused(
        pmm, onnx, "--trt", "--batch", "64,16,1"
    )
    assert refused(pmm, onnx, "--batch", "1,2,3", "--version-compatible").endswith("Add --trt")
    assert "invalid optimization level 9" in refused(pmm, onnx, "--trt", "--optimization-level", "9")
    for workspace in ("nan", "inf", "-inf"):
        assert f"invalid workspace of {workspace} GiB" in refused(pmm, onnx, "--trt", "--workspace", workspace)
    assert "is exported already" in refused(pmm, onnx, "--trt", "--safetensors")
    assert "does not exist" in refused(pmm, onnx.with_name("none.onnx"), "--trt")
    assert not onnx.with_suffix(".engine").exists()


def test_an_exported_file_is_not_another(pmm: Callable, gpu: double.FakeGpu, onnx: Path, tmp_path: Path) -> None:
    for option in (("--input-form", "raw"), ("--opset", "17"), ("--precision", "fp16")):
        assert "is exported already" in refused(pmm, onnx, "--trt", *option)
    other = onnx.with_name("other.onnx")
    for bundle in (("--deepstream", tmp_path / "d"), ("--triton", tmp_path / "t"), ("--trt",)):
        assert "is exported already" in refused(pmm, onnx, "--out", other, *bundle)
    assert "is exported already" in refused(pmm, onnx, "--out", onnx.with_suffix(".engine"), "--triton", tmp_path / "t")
    assert [path.name for path in onnx.parent.iterdir()] == ["model.onnx"]
    assert pmm("export", onnx, "--trt", "--input-form", "uint8").exit_code == 0


def test_the_batch_of_an_exported_file_is_the_engines(
    pmm: Callable, gpu: double.FakeGpu, onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    color_network(onnx, batch=4)
    assert "contradicts the static batch 4 of the graph" in refused(pmm, onnx, "--trt", "--batch", "1,2,3")
    ended = pmm("export", onnx, "--trt", "--json")
    assert json.loads(ended.stdout)["engine"]["settings"]["batch"] == {"minimum": 4, "optimal": 4, "maximum": 4}
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    ended = pmm("export", onnx, "--trt", "--out", onnx.with_name("x.engine"))
    last = ended.stderr.strip().splitlines()[-1]
    assert "pmm export model.onnx --trt --batch-profile 4,4,4 --out x.engine " in last
    assert "--saveEngine=x.engine" in last
    assert "--minShapes=images:4x96x64x3" in last


def config_of(folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


@pytest.mark.parametrize("form", ["uint8", "raw"])
def test_triton_serves_the_engine_of_the_input_that_clients_send(
    form: str, pmm: Callable, gpu: double.FakeGpu, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    repository, out = tmp_path / "models", tmp_path / "a.onnx"
    arguments = ("--out", out, "--input-form", form, "--trt", "--batch", "1,2,8", "--triton", repository, "--json")
    ended = pmm("export", tiny_checkpoint, *arguments)
    assert ended.exit_code == 0, ended.stderr
    printed, folder = json.loads(ended.stdout), repository / "pmm_resnet18_trt"
    assert printed["engine"]["spec"]["input"]["form"] == form
    served = printed["engine" if form == "uint8" else "served_engine"]
    assert served["spec"]["input"]["form"] == "uint8"
    assert (folder / "1" / "model.plan").read_bytes() == Path(served["path"]).read_bytes()
    config = config_of(folder)
    assert (config.platform, config.input[0].data_type) == ("tensorrt_plan", model_config_pb2.TYPE_UINT8)
    assert (config.max_batch_size, list(config.dynamic_batching.preferred_batch_size)) == (8, [2, 8])


def test_what_triton_and_deepstream_cannot_be_given_is_refused_first(
    pmm: Callable, gpu: double.FakeGpu, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    triton, deepstream, out = ("--triton", tmp_path / "t"), ("--deepstream", tmp_path / "d"), tmp_path / "a.onnx"
    to = (tiny_checkpoint, "--out", out)
    lone = refused(pmm, *to, "--trt", "--batch", "4,8,16", *triton)
    assert lone.endswith("Build it with --batch-profile 1,8,16")
    for bundle in (triton, deepstream):
        said = refused(pmm, *to, "--static-batch", "4", *bundle)
        assert said.endswith("Export it without --static-batch")
    int8 = ("--precision", "int8", "--target", "cpu", "--calibration", tmp_path)
    for consumer in (("--trt",), deepstream, ("--trt", *triton)):
        assert "is INT8 for CPUs" in refused(pmm, *to, *int8, *consumer)
    full = tmp_path / "full"
    (full / "pmm_resnet18").mkdir(parents=True)
    (full / "pmm_resnet18" / "config.pbtxt").touch()
    assert f"{full} exists and is not an empty folder" in refused(pmm, *to, "--deepstream", full)
    taken = refused(pmm, *to, "--triton", full)
    assert taken.endswith("is not an empty folder. Give the model another name with --triton-name")
    assert "'a/b'" in refused(pmm, *to, "--triton", full, "--triton-name", "a/b")
    assert refused(pmm, *to, "--triton-name", "a").endswith("Add --triton")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_without_tensorrt_the_bundle_that_serves_the_engine_is_told(
    pmm: Callable, onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    repository = tmp_path / "models"
    ended = pmm("export", onnx, "--trt", "--triton", repository, "--triton-name", "people")
    assert ended.exit_code == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert f"pmm export model.onnx --trt --batch-profile 1,16,64 --triton {repository} --triton-name people " in last
    assert not repository.exists()


def test_a_bundle_that_fails_does_not_hide_why_the_engine_is_missing(
    pmm: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OutputError("cannot write tracker: No space left on device")

    raw = color_network(tmp_path / "export" / "raw.onnx", form="raw")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr("pmm_edge.export.bundles.deepstream_bundle", full)
    ended = pmm("export", raw, "--trt", "--deepstream", tmp_path / "tracker")
    assert ended.exit_code == 2
    first, last = ended.stderr.strip().splitlines()[-2:]
    assert "its engine cannot be built here: TensorRT is not installed" in first
    assert last == "error: cannot write tracker: No space left on device"


def test_an_edge_box_builds_and_loads_without_torch(onnx: Path, tmp_path: Path) -> None:
    script = f"""
import sys
for absent in ("torch", "torchvision", "onnx", "onnxscript", "safetensors"):
    sys.modules[absent] = None
sys.path.insert(0, {str(Path(__file__).parent)!r})
import double
gpu = double.FakeGpu()
sys.modules["tensorrt"] = double.tensorrt(gpu)
sys.modules["cuda.bindings.runtime"] = double.cuda_runtime(gpu)
sys.argv = ["pmm", "export", {str(onnx)!r}, "--trt", "--no-timing-cache"]
from pmm_edge.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
import numpy as np, pmm_edge
print(pmm_edge.load({str(onnx.with_suffix(".engine"))!r}).embed(np.zeros((2, 30, 20, 3), np.uint8)).shape)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "(2, 8)"
