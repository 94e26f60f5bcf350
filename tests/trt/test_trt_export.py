"""Engines in `pmm export`: with a GPU, without one, and without torch."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import double
import pytest
from color_network import color_network
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from pmm_edge.errors import PmmError
from pmm_edge.export.exporter import export
from pmm_edge.runtime.cuda import NotOnThisMachineError
from pmm_edge.runtime.manifest import BatchProfile


@pytest.fixture
def no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)


def test_a_checkpoint_to_an_engine_that_triton_serves(
    gpu: double.FakeGpu, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "models"
    result = export(
        tiny_checkpoint, out=tmp_path / "a.onnx", input_form="raw", trt=True, batch_profile="1,2,8", triton=repository
    )
    assert result.failures == []
    assert result.engine.path == tmp_path / "a.engine"
    assert result.engine.manifest.spec.input.form == "raw"
    assert result.engine.manifest.settings.batch == BatchProfile(1, 2, 8)
    served = result.served_engine
    assert served.manifest.spec.input.form == "uint8"
    folder = repository / "pmm_resnet18_trt"
    assert (folder / "1" / "model.plan").read_bytes() == served.path.read_bytes()
    config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert (config.platform, config.input[0].data_type) == ("tensorrt_plan", model_config_pb2.TYPE_UINT8)
    assert (config.max_batch_size, list(config.dynamic_batching.preferred_batch_size)) == (8, [2, 8])


def test_an_exported_file_to_an_engine(gpu: double.FakeGpu, onnx: Path, tmp_path: Path) -> None:
    result = export(onnx, out=tmp_path / "b.engine", trt=True, timing_cache=False, workspace_gib=2)
    assert result.files == []
    assert result.engine.path == tmp_path / "b.engine"
    settings = result.engine.manifest.settings
    assert (settings.timing_cache, settings.workspace_gib) == (False, 2)
    assert not (tmp_path / "home").exists()


def test_a_static_batch_is_the_profile_of_the_engine(gpu: double.FakeGpu, onnx: Path) -> None:
    color_network(onnx, batch=4)
    with pytest.raises(PmmError):
        export(onnx, trt=True, batch_profile="1,2,3")
    assert export(onnx, trt=True).engine.manifest.settings.batch == BatchProfile(4, 4, 4)


def test_without_tensorrt_the_commands_for_the_target_are_reported(
    no_tensorrt: None, onnx: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "models"
    result = export(onnx, out=tmp_path / "x.engine", trt=True, triton=repository, triton_name="people")
    assert (result.engine, result.bundles) == (None, [])
    (failure,) = result.failures
    assert isinstance(failure, NotOnThisMachineError)
    command = "pmm export model.onnx --trt --batch-profile 1,16,64 --out x.engine"
    assert f"{command} --triton {repository} --triton-name people " in failure.remedy
    assert not repository.exists()


def test_the_command_line_without_tensorrt(no_tensorrt: None, pmm: Callable, onnx: Path) -> None:
    ended = pmm("export", onnx, "--trt")
    assert ended.exit_code == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert str(onnx) in last
    assert "pmm export model.onnx --trt --batch-profile 1,16,64" in last
    assert "trtexec --onnx=model.onnx --saveEngine=model.engine --stronglyTyped" in last


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
