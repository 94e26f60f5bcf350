"""Building engines: what is requested from TensorRT and written, errors, `pmm export --trt`, and the doctor."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import double
import pytest
from color_network import color_network
from double import FP16, FP32, INT8
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from pmm_edge.doctor import Finding, Status, check_tensorrt, readiness
from pmm_edge.errors import CheckFailedError, ModelError, OutputError, PmmError
from pmm_edge.export.exporter import export
from pmm_edge.export.tensorrt import BuiltEngine, build_engine, count_layers, layer_type
from pmm_edge.files import sha256
from pmm_edge.runtime.cuda import NotOnThisMachineError
from pmm_edge.runtime.manifest import BatchProfile, BuildSettings, PrecisionCount, read_manifest
from pmm_edge.spec import Quantization


def build(onnx: Path, settings: BuildSettings = BuildSettings()) -> BuiltEngine:
    return build_engine(onnx, onnx.with_suffix(".engine"), settings)


def files_beside(onnx: Path) -> list[str]:
    return sorted(path.name for path in onnx.parent.iterdir() if path != onnx)


def test_the_manifest_describes_the_engine(built: BuiltEngine, gpu: double.FakeGpu, onnx: Path) -> None:
    manifest = read_manifest(built.path)
    assert manifest == built.manifest
    assert (manifest.onnx, manifest.onnx_sha256) == ("model.onnx", sha256(onnx))
    assert (manifest.engine_size, manifest.engine_sha256) == (built.path.stat().st_size, sha256(built.path))
    machine = manifest.machine
    assert (machine.gpu, machine.compute_capability, machine.tensorrt) == ("Orin", "8.7", "10.3.0")
    assert machine.cuda == "12.6"
    assert manifest.settings.batch == BatchProfile(2, 3, 4)
    assert manifest.precision == PrecisionCount({"FP32": 1}, {"FP32": 1})
    assert files_beside(onnx) == ["model.engine", "model.manifest.json"]
    assert not gpu.memory
    assert gpu.calls["cudaStreamDestroy"] == gpu.calls["cudaStreamCreateWithFlags"] == 1


def test_settings_reach_tensorrt(gpu: double.FakeGpu, onnx: Path) -> None:
    build(onnx, BuildSettings(BatchProfile(1, 2, 8), 1.5, 5, "ampere", True, timing_cache=False))
    build(onnx)
    config, default = gpu.built
    trt = sys.modules["tensorrt"]
    assert config._profile == {"name": "images", "min": (1, 96, 64, 3), "opt": (2, 96, 64, 3), "max": (8, 96, 64, 3)}
    assert config._pools == {trt.MemoryPoolType.WORKSPACE: 3 << 29}
    assert config.builder_optimization_level == 5
    assert config.hardware_compatibility_level == trt.HardwareCompatibilityLevel.AMPERE_PLUS
    assert config._flags == {trt.BuilderFlag.VERSION_COMPATIBLE}
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    assert config._cache is None
    assert (default._pools, default._flags, default.builder_optimization_level) == ({}, set(), 3)


def test_hardware_compatible_same_needs_tensorrt_10_9(
    install: Callable[..., double.FakeGpu], onnx: Path, pmm: Callable
) -> None:
    install("A10", "8.6", "10.8.0")
    ended = pmm("export", onnx, "--trt", "--hardware-compatible", "same")
    assert (ended.exit_code, files_beside(onnx)) == (1, [])
    for shown in ("10.8.0", "10.9", "--hardware-compatible ampere"):
        assert shown in ended.stderr.strip().splitlines()[-1]
    gpu = install("A10", "8.6", "10.9.0")
    assert pmm("export", onnx, "--trt", "--hardware-compatible", "same").ok
    levels = sys.modules["tensorrt"].HardwareCompatibilityLevel
    assert gpu.built[-1].hardware_compatibility_level == levels.SAME_COMPUTE_CAPABILITY
    assert read_manifest(onnx.with_suffix(".engine")).settings.hardware_compatible == "same"
    assert "'ampere', 'same'" in pmm("export", onnx, "--trt", "--hardware-compatible", "all").error


@pytest.mark.parametrize("tensorrt", ["10.3.0", "10.16.2", "11.4.1"])
def test_the_command_of_trtexec(
    tensorrt: str, install: Callable[..., double.FakeGpu], onnx: Path, tmp_path: Path, pmm: Callable
) -> None:
    install(tensorrt=tensorrt)
    typed = "" if tensorrt[:2] == "11" else " --stronglyTyped"
    always = f"{typed} --noTF32 --useCudaGraph --builderOptimizationLevel="
    shapes = "--minShapes=images:2x96x64x3 --optShapes=images:3x96x64x3 --maxShapes=images:4x96x64x3"
    expected = f"trtexec --onnx={onnx} {shapes}{always}3"
    assert build(onnx, BuildSettings(BatchProfile(2, 3, 4))).trtexec == expected
    assert expected in pmm("export", onnx, "--trt", "--batch-profile", "2,3,4").ok.stderr
    static = color_network(tmp_path / "a b.onnx", form="raw", batch=4)
    settings = BuildSettings(BatchProfile(4, 4, 4), 0.5, 5, "ampere", True)
    options = "--memPoolSize=workspace:536870912B --hardwareCompatibilityLevel=ampere+ --versionCompatible"
    assert build(static, settings).trtexec == f"trtexec '--onnx={static}'{always}5 {options}"
    if tensorrt != "10.3.0":
        same = build(onnx, BuildSettings(BatchProfile(1, 1, 1), hardware_compatible="same")).trtexec
        assert same.endswith("--hardwareCompatibilityLevel=sameComputeCapability")
        assert "--maxShapes=images:1x96x64x3" in same


KEPT_IN_FLOAT = Quantization("tensorrt", "minmax", 512, float_layers=("conv1", "layer1.0.conv1"))


@pytest.mark.parametrize(
    ("precision", "quantization", "layers", "products"),
    [
        ("fp16", None, [FP16, FP16, FP32], {"FP16": 2, "FP32": 1}),
        ("fp16", None, [FP32], None),
        ("fp16", None, [FP32] * 52 + [FP16], None),
        ("int8", None, ["a name without details"], None),
        ("int8", None, [FP32, {"LayerType": "PointWiseV2", "Inputs": [{"DataType": "Int8"}]}], None),
        ("int8", None, [FP32] * 3 + [INT8] * 2, None),
        ("int8", KEPT_IN_FLOAT, [FP32] * 3 + [INT8] * 2, {"FP32": 3, "INT8": 2}),
    ],
)
def test_an_engine_that_is_mostly_in_another_precision_is_not_written(
    precision: str, quantization: Quantization | None, layers: list, products: dict, gpu: double.FakeGpu, onnx: Path
) -> None:
    color_network(onnx, precision=precision, quantization=quantization)
    gpu.layers = layers
    if products:
        assert build(onnx).manifest.precision.products == products
    else:
        with pytest.raises(CheckFailedError):
            build(onnx)
        assert files_beside(onnx) == []


def test_what_is_refused(gpu: double.FakeGpu, onnx: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    static = color_network(tmp_path / "static.onnx", batch=4)
    for_cpus = Quantization("cpu", "minmax", 512)
    int8_cpu = color_network(tmp_path / "int8_cpu.onnx", precision="int8", quantization=for_cpus)
    for source, options, error, named in (
        (onnx, {"out": tmp_path / "model.trt"}, PmmError, ".engine"),
        (onnx, {"out": tmp_path / "file" / "model.engine"}, OutputError, "file"),
        (tmp_path / "missing.onnx", {}, ModelError, "missing.onnx"),
        (int8_cpu, {}, ModelError, "int8_cpu.onnx"),
        (static, {"batch_profile": "1,16,64"}, PmmError, "4,4,4"),
    ):
        with pytest.raises(error, match=named):
            export(source, trt=True, **options)


def test_the_timing_cache(gpu: double.FakeGpu, onnx: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    def after_the_build() -> bytes:
        build(onnx)
        return gpu.built[-1]._cache

    assert after_the_build() == b"timings"
    (file,) = (tmp_path / "home" / "tensorrt").iterdir()
    assert file.name == "10.3.0-Orin.timing"
    assert after_the_build() == b"timings" * 2
    for content in (b"damaged", b"of another device"):
        file.write_bytes(content)
        assert after_the_build() == b"timings"
    request.getfixturevalue("homeless")
    assert after_the_build() is None


@pytest.mark.parametrize("missing", ["status", "count", "driver", "cuda-python", "old", "tensorrt"])
def test_a_missing_requirement_gives_the_command_for_the_target(
    missing: str, install: Callable[..., double.FakeGpu], onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = install(tensorrt="8.6.1" if missing == "old" else "10.3.0")
    gpu.fails["cudaGetDeviceCount"] = 2 if missing == "status" else 0
    gpu.count = 0 if missing == "count" else 1
    if missing == "driver":
        failing = Mock(side_effect=RuntimeError("Failed to dlopen libcuda.so.1"))
        monkeypatch.setattr(sys.modules["cuda.bindings.runtime"], "cudaGetDeviceCount", failing)
    absent = {"cuda-python": ("cuda.bindings.runtime", "cuda.cudart"), "tensorrt": ("tensorrt",)}
    for name in absent.get(missing, ()):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(NotOnThisMachineError) as caught:
        build(onnx, BuildSettings(BatchProfile(1, 8, 32), workspace_gib=2))
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    assert caught.value.remedy.endswith("pmm export model.onnx --trt --batch-profile 1,8,32 --workspace 2")


DYNAMIC = {"Name": "x", "Format/Datatype": "N/A due to dynamic shapes"}


def ten(*formats: str) -> list[dict[str, str]]:
    """Tensors as TensorRT 10 describes them."""
    return [{"Name": "x", "Format/Datatype": text} for text in formats]


def test_layer_type() -> None:
    for layer, expected in (
        ({"Inputs": ten("Half"), "Outputs": ten("Float")}, "FP16"),
        ({"Inputs": ten("Row major linear FP32"), "Outputs": ten("Half")}, "FP32"),
        ({"Inputs": ten("Channel major FP16 format where channel % 8 == 0.")}, "FP16"),
        ({"Inputs": ten("Thirty-two wide channel vectorized row major Int8 format.", "Half")}, "INT8"),
        ({"Inputs": ten("Row major linear BFloat16 format")}, "BF16"),
        ({"Inputs": [{"Format": "Row major linear FP16 format (kLINEAR)", "DataType": "Half"}]}, "FP16"),
        ({"Inputs": [{"Format": "kLINEAR", "Datatype": "FP8"}]}, "FP8"),
        ({"Inputs": ten("Int32", "Bool")}, "unknown"),
        ({"Inputs": [DYNAMIC], "Outputs": [DYNAMIC], "Weights": {"Type": "Half"}}, "FP16"),
        ({"Inputs": [DYNAMIC], "TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8f32_i8i32_f32_n"}, "INT8"),
        ({"Inputs": [DYNAMIC], "TacticName": "sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc"}, "FP16"),
        ({"Inputs": [DYNAMIC], "TacticName": "ampere_h16816gemm_128x64_ldg8_stages_64x3_tn"}, "FP16"),
        ({"Inputs": [DYNAMIC], "TacticName": "cudnn_something"}, "unknown"),
    ):
        assert layer_type(layer) == expected, layer


def test_count_layers_skips_copies_and_recognizes_products() -> None:
    layers = [
        {"LayerType": "Reformat", "Inputs": ten("Half")},
        {"LayerType": "NoOp", "Inputs": ten("Half")},
        {"LayerType": "CaskConvolution", "Inputs": [DYNAMIC], "Weights": {"Type": "Half"}},
        {"LayerType": "gemm", "Inputs": ten("Half")},
        {"LayerType": "kgen", "Name": "__myl_ConvAddRelu_myl0_3", "Inputs": ten("Half")},
        {"LayerType": "kgen", "Name": "__myl_Convert_myl0_1", "Inputs": ten("Float"), "Outputs": ten("Half")},
        {"LayerType": "kgen", "Name": "conv1_DequantizeLinear", "Inputs": ten("Int8"), "Outputs": ten("Float")},
        "a name alone",
    ]
    assert count_layers(layers) == PrecisionCount({"FP16": 3, "FP32": 1, "INT8": 1, "unknown": 1}, {"FP16": 3})


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


def test_without_tensorrt_the_command_for_the_target_is_reported(
    onnx: Path, tmp_path: Path, pmm: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    repository = tmp_path / "models"
    result = export(onnx, out=tmp_path / "x.engine", trt=True, triton=repository, triton_name="people")
    assert (result.engine, result.bundles) == (None, {})
    (failure,) = result.failures
    assert isinstance(failure, NotOnThisMachineError)
    command = "pmm export model.onnx --trt --batch-profile 1,16,64 --out x.engine"
    assert failure.remedy.endswith(f"{command} --triton {repository} --triton-name people")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    (failure,) = export(onnx, rtx=True, gpu="sm86").failures  # it can be built on this machine, where the file is
    assert failure.remedy.endswith(f"pmm export {onnx} --rtx --gpu sm86 --batch-profile 1,16,64")
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


def test_the_doctor_opens_the_gpu(gpu: double.FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    found = check_tensorrt()
    assert found == Finding(Status.OK, "10.3.0 on Orin with CUDA 12.6")
    none = Finding(Status.INFO, "not installed")
    assert readiness("trt", found, found, none).status is Status.OK
    broken = Finding(Status.PROBLEM, "ImportError: broken")  # exports are checked with ONNX Runtime
    assert readiness("trt", broken, found, none).status is Status.PROBLEM
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", double.tensorrt_rtx(gpu))
    assert check_tensorrt(rtx=True).status is Status.OK
    assert gpu.calls["cudaStreamDestroy"] == 2
    gpu.fails["cudaGetDeviceCount"] = 2
    assert check_tensorrt().status is Status.PROBLEM
    builds = check_tensorrt(rtx=True)
    assert builds.status is Status.LIMITED
    assert readiness("rtx", found, none, builds).status is Status.OK
    assert (
        readiness("rtx", found, found, none).status is readiness("rtx", broken, found, builds).status is Status.PROBLEM
    )
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert check_tensorrt().status is Status.INFO
