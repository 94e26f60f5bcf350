"""`pmm export --trt` where there is a GPU, where there is none, and where there is no torch."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import double
import pytest


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
    assert last.startswith(f"error: {tmp_path / 'model.onnx'} is ready, its engine cannot be built here: TensorRT is")
    assert "pmm export model.onnx --trt --batch 1,4,8" in last
    assert "trtexec --onnx=model.onnx --saveEngine=model.engine --stronglyTyped" in last


@pytest.mark.parametrize("batch", [(), ("--batch", "4,4,4")])
def test_a_static_batch_is_the_engines_only_one(
    batch: tuple[str, ...], pmm: Callable, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    out = tmp_path / "model.onnx"
    ended = pmm("export", tiny_checkpoint, "--out", out, "--trt", "--static-batch", "4", *batch)
    last = ended.stderr.strip().splitlines()[-1]
    assert "pmm export model.onnx --trt --batch 4,4,4" in last
    assert "--minShapes=images:4x96x64x3 --optShapes=images:4x96x64x3 --maxShapes=images:4x96x64x3" in last


def refused(pmm: Callable, *arguments: object) -> str:
    ended = pmm("export", *arguments)
    assert (ended.exit_code, ended.stdout) == (2, "")
    return ended.stderr.strip().splitlines()[-1]


def test_wrong_use(pmm: Callable, gpu: double.FakeGpu, onnx: Path) -> None:
    assert "64,16,1 is out of order. Give minimum,optimal,maximum" in refused(pmm, onnx, "--trt", "--batch", "64,16,1")
    assert "--batch, --version-compatible says how to build an engine" in refused(
        pmm, onnx, "--batch", "1,2,3", "--version-compatible"
    )
    contradiction = refused(pmm, onnx.with_name("best.pt"), "--trt", "--static-batch", "4", "--batch", "1,4,8")
    assert contradiction.endswith("contradicts the graph's static batch of 4. Leave it out, or give --batch 4,4,4")
    assert "optimization level 9 does not exist" in refused(pmm, onnx, "--trt", "--optimization-level", "9")
    assert "has no weights for --safetensors" in refused(pmm, onnx, "--trt", "--safetensors")
    assert "does not exist" in refused(pmm, onnx.with_name("none.onnx"), "--trt")
    assert not onnx.with_suffix(".engine").exists()


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
