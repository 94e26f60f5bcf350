"""Engines in `pmm export` and the doctor: with a GPU, without one, and without torch."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import double
import pytest
from color_network import color_network
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from pmm_edge.doctor import Probe, Status, probe_tensorrt, readiness
from pmm_edge.export.exporter import export
from pmm_edge.runtime.cuda import NotOnThisMachineError
from pmm_edge.runtime.manifest import BatchProfile


def test_a_checkpoint_to_an_engine_that_triton_serves(
    gpu: double.FakeGpu, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    options = {"input_form": "raw", "trt": True, "batch_profile": "1,2,8", "triton": tmp_path / "models"}
    result = export(tiny_checkpoint, out=tmp_path / "a.onnx", **options)
    assert result.failures == []
    assert result.engine.path == tmp_path / "a.engine"
    assert result.engine.manifest.settings.batch == BatchProfile(1, 2, 8)
    served = result.served_engine
    assert (result.engine.manifest.spec.input.form, served.manifest.spec.input.form) == ("raw", "uint8")
    folder = tmp_path / "models" / "pmm_resnet18_trt"
    assert (folder / "1" / "model.plan").read_bytes() == served.path.read_bytes()
    config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert (config.platform, config.input[0].data_type) == ("tensorrt_plan", model_config_pb2.TYPE_UINT8)
    assert (config.max_batch_size, list(config.dynamic_batching.preferred_batch_size)) == (8, [2, 8])


def test_an_exported_file_with_a_static_batch_to_an_engine(gpu: double.FakeGpu, onnx: Path, tmp_path: Path) -> None:
    color_network(onnx, batch=4)
    result = export(onnx, out=tmp_path / "b.engine", trt=True, timing_cache=False, workspace_gib=2)
    assert result.files == []
    assert result.engine.path == tmp_path / "b.engine"
    settings = result.engine.manifest.settings
    assert (settings.batch, settings.timing_cache, settings.workspace_gib) == (BatchProfile(4, 4, 4), False, 2)
    assert not (tmp_path / "home").exists()


def test_without_tensorrt_the_commands_for_the_target_are_reported(
    onnx: Path, tmp_path: Path, pmm: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    repository = tmp_path / "models"
    result = export(onnx, out=tmp_path / "x.engine", trt=True, triton=repository, triton_name="people")
    assert (result.engine, result.bundles) == (None, [])
    (failure,) = result.failures
    assert isinstance(failure, NotOnThisMachineError)
    command = "pmm export model.onnx --trt --batch-profile 1,16,64 --out x.engine"
    assert f"{command} --triton {repository} --triton-name people " in failure.remedy
    assert not repository.exists()
    ended = pmm("export", onnx, "--trt")
    assert ended.exit_code == 1
    assert str(onnx) in ended.stderr.strip().splitlines()[-1]


def test_the_edge_install_builds_and_loads_an_engine(onnx: Path) -> None:
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


def test_the_doctor_probes_tensorrt_and_the_gpu(gpu: double.FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime, found = Probe(devices={"cpu": None}), probe_tensorrt()
    assert (found.version, found.error, found.gpus) == ("10.3.0", None, ["Orin with CUDA 12.6"])
    assert readiness("trt", onnxruntime, found).status is Status.OK
    assert (
        readiness("trt", Probe(error="ImportError: broken"), found).status is Status.PROBLEM
    )  # exports are checked with it
    assert gpu.calls["cudaStreamDestroy"] == 1
    gpu.fails["cudaGetDeviceCount"] = 2
    found = probe_tensorrt()
    ready = readiness("trt", onnxruntime, found)
    assert (found.version, found.gpus, ready.status, ready.remedy) == ("10.3.0", [], Status.PROBLEM, found.remedy)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(NotOnThisMachineError):
        probe_tensorrt()
