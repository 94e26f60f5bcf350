"""What a build requests from TensorRT, what it writes, and its errors."""

import json
import sys
from pathlib import Path

import double
import pytest
from color_network import color_network

from pmm_edge.errors import CheckFailedError, ModelError, OutputError, PmmError
from pmm_edge.export.tensorrt import BuiltEngine, build_engine, count_layers, layer_type
from pmm_edge.files import sha256
from pmm_edge.runtime.cuda import NotOnThisMachineError
from pmm_edge.runtime.manifest import BatchProfile, BuildSettings, PrecisionCount, read_manifest
from pmm_edge.spec import Quantization

INT8_LAYERS = [{"Name": "conv", "LayerType": "CaskConvolution", "Weights": {"Type": "Int8", "Count": 9}}]


def build(onnx: Path, settings: BuildSettings = BuildSettings()) -> BuiltEngine:
    return build_engine(onnx, onnx.with_suffix(".engine"), settings)


def only_the_onnx_file(onnx: Path) -> bool:
    return [path.name for path in onnx.parent.iterdir()] == [onnx.name]


def test_the_manifest_describes_the_engine(built: BuiltEngine, gpu: double.FakeGpu, onnx: Path) -> None:
    manifest = read_manifest(built.path)
    assert manifest == built.manifest
    assert (manifest.onnx, manifest.onnx_sha256) == ("model.onnx", sha256(onnx))
    assert (manifest.engine_size, manifest.engine_sha256) == (built.path.stat().st_size, sha256(built.path))
    machine = manifest.machine
    assert (machine.gpu, machine.compute_capability, machine.tensorrt) == ("Orin", "8.7", "10.3.0")
    assert (machine.cuda, machine.driver[:4]) == ("12.6", "12.8")
    assert manifest.settings.batch == BatchProfile(2, 3, 4)
    assert manifest.precision.layers == manifest.precision.products == {"FP32": 1}
    assert sorted(path.name for path in onnx.parent.iterdir()) == ["model.engine", "model.manifest.json", "model.onnx"]
    assert not gpu.memory
    assert gpu.calls["cudaStreamDestroy"] == gpu.calls["cudaStreamCreateWithFlags"] == 1


def test_settings_reach_tensorrt(gpu: double.FakeGpu, onnx: Path) -> None:
    build(onnx, BuildSettings(BatchProfile(1, 2, 8), 1.5, 5, True, True, timing_cache=False))
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
    assert default.hardware_compatibility_level == trt.HardwareCompatibilityLevel.NONE


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize(
    "layers",
    [
        double.FP32_LAYERS,
        ["names", "only"],
        [*double.FP32_LAYERS, {"LayerType": "PointWiseV2", "Inputs": [{"DataType": "Half"}, {"DataType": "Int8"}]}],
        [*double.FP32_LAYERS * 52, *double.FP16_LAYERS, *INT8_LAYERS],
    ],
)
def test_an_engine_in_another_precision_is_not_written(
    precision: str, layers: list, gpu: double.FakeGpu, onnx: Path
) -> None:
    color_network(onnx, precision=precision)
    gpu.layers = layers
    with pytest.raises(CheckFailedError):
        build(onnx)
    assert only_the_onnx_file(onnx)


def test_an_engine_in_the_precision_of_its_graph(gpu: double.FakeGpu, onnx: Path) -> None:
    gpu.layers = [*double.FP16_LAYERS, *double.FP16_LAYERS, *double.FP32_LAYERS]
    built = build(color_network(onnx, precision="fp16"))
    assert built.manifest.precision.layers == {"FP16": 2, "FP32": 1}


def test_layers_kept_in_float_do_not_count(gpu: double.FakeGpu, onnx: Path) -> None:
    gpu.layers = [*double.FP32_LAYERS * 3, *INT8_LAYERS * 2]
    quantization = Quantization("tensorrt", "minmax", 512)
    with pytest.raises(CheckFailedError):
        build(color_network(onnx, precision="int8", quantization=quantization))
    quantization = Quantization("tensorrt", "minmax", 512, float_layers=("conv1", "layer1.0.conv1"))
    built = build(color_network(onnx, precision="int8", quantization=quantization))
    assert built.manifest.precision.products == {"FP32": 3, "INT8": 2}


def test_int8_for_cpus_is_refused_even_without_tensorrt(onnx: Path) -> None:
    color_network(onnx, precision="int8", quantization=Quantization("cpu", "minmax", 512))
    with pytest.raises(ModelError, match=str(onnx)):
        build(onnx)


def test_parser_errors_name_the_node(gpu: double.FakeGpu, onnx: Path) -> None:
    gpu.parser_errors = [("node_7", "GridSample", "no importer\n registered"), ("", "", "and more")]
    with pytest.raises(ModelError, match="node GridSample node_7: no importer registered; and more"):
        build(onnx)


def test_a_failed_build_reports_the_error_and_keeps_the_old_engine(built: BuiltEngine, gpu: double.FakeGpu) -> None:
    before = built.path.read_bytes()
    gpu.error = "could not find any\nimplementation"
    with pytest.raises(ModelError, match="could not find any implementation"):
        build(built.path.with_suffix(".onnx"))
    assert built.path.read_bytes() == before
    assert read_manifest(built.path) == built.manifest


def test_static_batches(gpu: double.FakeGpu, onnx: Path) -> None:
    color_network(onnx, batch=4)
    for profile in (BatchProfile(), BatchProfile(4, 5, 6)):
        with pytest.raises(PmmError) as caught:
            build(onnx, BuildSettings(profile))
        assert "4,4,4" in caught.value.remedy
    assert build(onnx, BuildSettings(BatchProfile(4, 4, 4))).manifest.settings.batch.maximum == 4


def test_outputs_that_cannot_be_written(gpu: double.FakeGpu, onnx: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for source, out, error in (
        (onnx, "model.trt", PmmError),
        (tmp_path / "missing.onnx", "model.engine", ModelError),
        (onnx, "file/model.engine", OutputError),
    ):
        with pytest.raises(error):
            build_engine(source, tmp_path / out)


def test_progress_shows_the_outermost_phase_with_the_inner_one(gpu: double.FakeGpu, onnx: Path) -> None:
    heard: list[tuple[str, int, int, str]] = []
    build_engine(onnx, onnx.with_suffix(".engine"), report=lambda *reported: heard.append((*reported, "")[:4]))
    assert heard == [
        ("model.engine: Building", 0, 2, ""),
        *(("model.engine: Building", 0, 2, f"Timing {step}/4") for step in (0, 1, 2, 3, 4)),
        ("model.engine: Building", 1, 2, ""),
        ("model.engine: Building", 2, 2, ""),
    ]


def test_ctrl_c_cancels_the_build(gpu: double.FakeGpu, onnx: Path) -> None:
    def report(what: str, done: int, total: int, detail: str = "") -> None:
        if "2/4" in detail:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(onnx, onnx.with_suffix(".engine"), report=report)
    assert only_the_onnx_file(onnx)


def test_the_timing_cache(gpu: double.FakeGpu, onnx: Path, tmp_path: Path) -> None:
    def known_before() -> int:
        build(onnx)
        return gpu.built[-1]._cache._content[-1]

    assert known_before() == 0
    (file,) = (tmp_path / "home" / "tensorrt").iterdir()
    assert file.name == "10.3.0-Orin.timing"
    assert known_before() == len(b"TIMES\x00")
    for content in (b"garbage", b"OTHER"):  # damaged, or of another device
        file.write_bytes(content)
        assert known_before() == 0
    gpu.name = "NVIDIA H100 80GB"
    assert known_before() == 0


@pytest.mark.usefixtures("homeless")
def test_without_a_cache_folder_the_build_only_takes_longer(gpu: double.FakeGpu, onnx: Path) -> None:
    assert build(onnx).path.exists()


def no_driver() -> None:
    raise RuntimeError("Failed to dlopen libcuda.so.1")


@pytest.mark.parametrize("missing", ["status", "count", "driver", "cuda-python", "old", "tensorrt"])
def test_a_missing_requirement_gives_the_command_for_the_target(
    missing: str, install: double.Install, onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = install(tensorrt="8.6.1" if missing == "old" else "10.3.0")
    if missing == "status":
        gpu.fails["cudaGetDeviceCount"] = 35
    elif missing == "count":
        gpu.count = 0
    elif missing == "driver":
        monkeypatch.setattr(sys.modules["cuda.bindings.runtime"], "cudaGetDeviceCount", no_driver)
    elif missing == "cuda-python":
        for name in ("cuda.bindings.runtime", "cuda.cudart"):
            monkeypatch.setitem(sys.modules, name, None)
    elif missing == "tensorrt":
        monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(NotOnThisMachineError) as caught:
        build(onnx, BuildSettings(BatchProfile(1, 8, 32), workspace_gib=2))
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    assert "pmm export model.onnx --trt --batch-profile 1,8,32 --workspace 2 " in caught.value.remedy
    assert (
        "trtexec --onnx=model.onnx --saveEngine=model.engine --stronglyTyped --noTF32"
        " --minShapes=images:1x96x64x3 --optShapes=images:8x96x64x3 --maxShapes=images:32x96x64x3"
        " --builderOptimizationLevel=3 --profilingVerbosity=detailed --memPoolSize=workspace:2048"
    ) in caught.value.remedy


DYNAMIC = {"Name": "x", "Format/Datatype": "N/A due to dynamic shapes"}


def ten(*formats: str) -> list[dict[str, str]]:
    """Tensors as TensorRT 10 describes them."""
    return [{"Name": "x", "Format/Datatype": text} for text in formats]


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ({"Inputs": ten("Half"), "Outputs": ten("Float")}, "FP16"),
        ({"Inputs": ten("Row major linear FP32"), "Outputs": ten("Half")}, "FP32"),
        ({"Inputs": ten("Channel major FP16 format where channel % 8 == 0.")}, "FP16"),
        ({"Inputs": ten("Thirty-two wide channel vectorized row major Int8 format.", "Half")}, "INT8"),
        ({"Inputs": ten("Row major linear BFloat16 format")}, "BF16"),
        ({"Inputs": [{"Format": "Row major linear FP16 format (kLINEAR)", "DataType": "Half"}]}, "FP16"),
        ({"Inputs": [{"Format": "kLINEAR", "Datatype": "FP8"}]}, "FP8"),
        ({"Inputs": ten("UInt8"), "Outputs": ten("Half")}, "FP16"),
        ({"Inputs": ten("Int32", "Bool")}, "unknown"),
        ({"Inputs": [DYNAMIC], "Weights": {"Type": "Int8", "Count": 9}}, "INT8"),
        ({"Inputs": [DYNAMIC], "Outputs": [DYNAMIC], "Weights": {"Type": "Half", "Count": 9}}, "FP16"),
        ({"Inputs": [DYNAMIC], "TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8f32_i8i32_f32_n"}, "INT8"),
        ({"Inputs": [DYNAMIC], "TacticName": "sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc"}, "FP16"),
        ({"Inputs": [DYNAMIC], "TacticName": "sm80_xmma_fprop_implicit_gemm_tf32f32_tf32f32_f32"}, "FP32"),
        ({"Inputs": [DYNAMIC], "TacticName": "ampere_h16816gemm_128x64_ldg8_stages_64x3_tn"}, "FP16"),
        ({"Inputs": [DYNAMIC], "TacticName": "cudnn_something"}, "unknown"),
        ({"Name": "alone"}, "unknown"),
    ],
)
def test_layer_type(layer: dict, expected: str) -> None:
    assert layer_type(layer) == expected


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
    expected = PrecisionCount({"FP16": 3, "FP32": 1, "INT8": 1, "unknown": 1}, {"FP16": 3})
    assert count_layers(json.loads(json.dumps(layers))) == expected
