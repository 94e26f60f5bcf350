"""What a build asks of TensorRT, what it leaves behind, and what it says when it fails."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import double
import onnx as onnx_package
import pytest
from colour_network import colour_network

from pmm_edge.errors import CheckFailedError, ModelError, OutputError, PmmError
from pmm_edge.export.tensorrt import BuiltEngine, build_engine
from pmm_edge.files import sha256
from pmm_edge.runtime.cuda import GpuError, NotOnThisMachineError
from pmm_edge.runtime.manifest import BatchProfile, BuildSettings, read_manifest
from pmm_edge.spec import METADATA_KEY, ModelSpec, Quantization


def with_precision(onnx: Path, precision: str, **others: object) -> Path:
    """Have the file's spec say that its graph has another precision."""
    model = onnx_package.load(onnx)
    (metadata,) = model.metadata_props
    metadata.value = replace(ModelSpec.from_json(metadata.value), precision=precision, **others).to_json()
    assert metadata.key == METADATA_KEY
    onnx_package.save(model, onnx)
    return onnx


def test_the_manifest_says_what_was_built(built: BuiltEngine, onnx: Path) -> None:
    manifest = read_manifest(built.path)
    assert manifest == built.manifest
    assert (manifest.onnx, manifest.onnx_sha256) == ("model.onnx", sha256(onnx))
    assert (manifest.engine_size, manifest.engine_sha256) == (built.path.stat().st_size, sha256(built.path))
    machine = manifest.machine
    assert (machine.gpu, machine.compute_capability, machine.tensorrt, machine.cuda) == (
        "Orin",
        "8.7",
        "10.3.0",
        "12.6",
    )
    assert machine.driver.startswith("12.8")
    assert manifest.settings.batch == BatchProfile(2, 3, 4)
    assert manifest.precision.layers == manifest.precision.products == {"FP32": 1}
    assert manifest.spec.input.height == 96
    written = json.loads((onnx.parent / "model.manifest.json").read_text())
    assert written["settings"]["batch"] == {"minimum": 2, "optimal": 3, "maximum": 4}
    assert sorted(path.name for path in onnx.parent.iterdir()) == ["model.engine", "model.manifest.json", "model.onnx"]


def test_settings_reach_tensorrt(gpu: double.FakeGpu, onnx: Path) -> None:
    settings = BuildSettings(
        BatchProfile(1, 2, 8),
        workspace_gib=1.5,
        optimization_level=5,
        hardware_compatible=True,
        version_compatible=True,
        timing_cache=False,
    )
    build_engine(onnx, onnx.with_suffix(".engine"), settings)
    (config,) = gpu.built
    trt = sys.modules["tensorrt"]
    assert config._profile == {"name": "images", "min": (1, 96, 64, 3), "opt": (2, 96, 64, 3), "max": (8, 96, 64, 3)}
    assert config._pools == {trt.MemoryPoolType.WORKSPACE: 3 << 29}
    assert config.builder_optimization_level == 5
    assert config.hardware_compatibility_level == trt.HardwareCompatibilityLevel.AMPERE_PLUS
    assert config._flags == {trt.BuilderFlag.VERSION_COMPATIBLE}
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    assert config._cache is None


def test_nothing_but_safe_defaults_is_asked_for(gpu: double.FakeGpu, onnx: Path) -> None:
    build_engine(onnx, onnx.with_suffix(".engine"))
    (config,) = gpu.built
    assert (config._pools, config._flags, config.builder_optimization_level) == ({}, set(), 3)
    assert config.hardware_compatibility_level == 0


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_an_engine_without_the_precision_of_its_graph_is_not_written(
    precision: str, gpu: double.FakeGpu, onnx: Path
) -> None:
    with_precision(onnx, precision)
    with pytest.raises(CheckFailedError, match=rf"is {precision.upper()}, but 0 of .* 1 products run in it \(1 FP32;"):
        build_engine(onnx, onnx.with_suffix(".engine"))
    gpu.layers = ["names", "alone"]
    with pytest.raises(CheckFailedError, match=r"0 of the engine's 2 layers run in it \(2 unknown"):
        build_engine(onnx, onnx.with_suffix(".engine"))
    gpu.layers = [*double.FP32_LAYERS, {"LayerType": "PointWiseV2", "Inputs": [{"DataType": precision}]}]
    with pytest.raises(CheckFailedError, match=r"\(1 FP32;"):  # a helper in it is not the network in it
        build_engine(onnx, onnx.with_suffix(".engine"))
    assert [path.name for path in onnx.parent.iterdir()] == ["model.onnx"]


def test_an_engine_in_the_precision_of_its_graph(gpu: double.FakeGpu, onnx: Path) -> None:
    gpu.layers = [*double.FP16_LAYERS, *double.FP16_LAYERS, *double.FP32_LAYERS]
    built = build_engine(with_precision(onnx, "fp16"), onnx.with_suffix(".engine"))
    assert built.manifest.precision.layers == {"FP16": 2, "FP32": 1}


def test_one_layer_in_the_precision_of_the_graph_is_not_enough(gpu: double.FakeGpu, onnx: Path) -> None:
    with_precision(onnx, "fp16")
    gpu.layers = [*double.FP32_LAYERS * 52, *double.FP16_LAYERS]
    with pytest.raises(
        CheckFailedError, match=r"is FP16, but 1 of the engine's 53 products run in it \(52 FP32, 1 FP16"
    ):
        build_engine(onnx, onnx.with_suffix(".engine"))
    assert [path.name for path in onnx.parent.iterdir()] == ["model.onnx"]


def test_layers_that_the_graph_keeps_in_float_are_not_missed(gpu: double.FakeGpu, onnx: Path) -> None:
    int8 = [{"Name": "conv", "LayerType": "CaskConvolution", "Weights": {"Type": "Int8", "Count": 9}}]
    gpu.layers = [*double.FP32_LAYERS * 3, *int8 * 2]
    with_precision(onnx, "int8", quantization=Quantization("tensorrt", "minmax", 512))
    with pytest.raises(CheckFailedError, match=r"but 2 of the engine's 5 products .* keeps 0 in float"):
        build_engine(onnx, onnx.with_suffix(".engine"))
    with_precision(
        onnx, "int8", quantization=Quantization("tensorrt", "minmax", 512, float_layers=("conv1", "layer1.0.conv1"))
    )
    assert build_engine(onnx, onnx.with_suffix(".engine")).manifest.precision.products == {"FP32": 3, "INT8": 2}


def test_int8_for_cpus_is_refused_before_tensorrt_is_asked_for(onnx: Path) -> None:
    with_precision(onnx, "int8", target="cpu")
    with pytest.raises(ModelError, match=r"model\.onnx is INT8 for CPUs: .*Export it with --target tensorrt"):
        build_engine(onnx, onnx.with_suffix(".engine"))


def test_parser_errors_name_the_node(gpu: double.FakeGpu, onnx: Path) -> None:
    gpu.parser_errors = [("node_7", "GridSample", "no importer\n registered"), ("", "", "and more")]
    with pytest.raises(ModelError, match=r"cannot parse .*: node GridSample node_7: no importer registered; and more"):
        build_engine(onnx, onnx.with_suffix(".engine"))


def test_a_build_that_fails_says_what_tensorrt_said(gpu: double.FakeGpu, onnx: Path) -> None:
    gpu.says = "could not find any\nimplementation"
    with pytest.raises(ModelError, match=r"cannot build .*\(could not find any implementation\).*smaller --batch"):
        build_engine(onnx, onnx.with_suffix(".engine"))
    assert [path.name for path in onnx.parent.iterdir()] == ["model.onnx"]


def test_fixed_batches(gpu: double.FakeGpu, onnx: Path) -> None:
    colour_network(onnx, batch=4)
    with pytest.raises(PmmError, match=r"fixed batch of 4, the batch profile is 1,16,64\. .*--batch 4,4,4"):
        build_engine(onnx, onnx.with_suffix(".engine"))
    with pytest.raises(PmmError, match="fixed batch of 4, the batch profile is 4,5,6"):
        build_engine(onnx, onnx.with_suffix(".engine"), BuildSettings(BatchProfile(4, 5, 6)))
    built = build_engine(onnx, onnx.with_suffix(".engine"), BuildSettings(BatchProfile(4, 4, 4)))
    assert built.manifest.settings.batch.maximum == 4


def test_profiles_and_settings_out_of_range() -> None:
    with pytest.raises(PmmError, match=r"batch profile 64,16,1 is out of order\. Give minimum,optimal,maximum"):
        BatchProfile.parse("64,16,1")
    for text in ("1,16", "1,16,x", "", "-1,2,3", "1.5,2,3"):
        with pytest.raises(PmmError, match="is not three whole numbers"):
            BatchProfile.parse(text)
    with pytest.raises(PmmError, match="out of order"):
        BatchProfile.parse("0,1,2")
    with pytest.raises(PmmError, match="optimization level 6 does not exist"):
        BuildSettings(optimization_level=6)
    for workspace, named in ((0, "0"), (-1, "-1"), (float("nan"), "nan"), (float("inf"), "inf"), (1e300, r"1e\+300")):
        with pytest.raises(PmmError, match=f"workspace of {named} GiB cannot be had"):
            BuildSettings(workspace_gib=workspace)


def test_places_and_files_that_do_not_work(gpu: double.FakeGpu, onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(PmmError, match=r"does not end in \.engine\. Name it .*model\.engine"):
        build_engine(onnx, tmp_path / "model.trt")
    with pytest.raises(ModelError, match="does not exist"):
        build_engine(tmp_path / "none.onnx", tmp_path / "model.engine")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        build_engine(onnx, tmp_path / "file" / "model.engine")


def test_an_older_engine_stays_when_a_build_fails(built: BuiltEngine, gpu: double.FakeGpu, onnx: Path) -> None:
    before = built.path.read_bytes()
    gpu.says = "no"
    with pytest.raises(ModelError):
        build_engine(onnx, built.path)
    assert built.path.read_bytes() == before
    assert read_manifest(built.path) == built.manifest


def test_timings_are_kept_between_builds(gpu: double.FakeGpu, onnx: Path, tmp_path: Path) -> None:
    def build() -> bytes:
        build_engine(onnx, onnx.with_suffix(".engine"))
        return gpu.built[-1]._cache._content

    assert build() == b"TIMES\x00"  # nothing was known
    (file,) = (tmp_path / "home" / "tensorrt").iterdir()
    assert file.name == "10.3.0-Orin.timing"
    assert build() == b"TIMES\x06"
    file.write_bytes(file.read_bytes()[:-1])
    assert build() == b"TIMES\x00"
    assert build() == b"TIMES\x06"
    gpu.name = "NVIDIA H100 80GB"
    assert build() == b"TIMES\x00"


def test_a_timing_cache_that_tensorrt_refuses_is_as_if_not_there(gpu: double.FakeGpu, onnx: Path) -> None:
    from pmm_edge.export import tensorrt as timing

    config = sys.modules["tensorrt"].IBuilderConfig()
    config._cache = sys.modules["tensorrt"].ITimingCache(b"of another device")
    file = timing.cache_file("10.3.0", "Orin")
    timing.keep(config, file)
    build_engine(onnx, onnx.with_suffix(".engine"))
    assert gpu.built[-1]._cache._content == b"TIMES\x00"


def test_a_cache_folder_that_cannot_be_written_costs_nothing_but_time(
    gpu: double.FakeGpu, onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PMM_HOME", str(onnx))
    assert build_engine(onnx, onnx.with_suffix(".engine")).path.exists()


def test_a_user_without_a_home_folder_loses_nothing_but_time(
    gpu: double.FakeGpu, onnx: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("homeless")  # after the GPU, which comes with a cache folder
    assert build_engine(onnx, onnx.with_suffix(".engine")).path.exists()


def test_gpu_memory_is_given_back(built: BuiltEngine, gpu: double.FakeGpu) -> None:
    assert not gpu.memory
    assert gpu.calls["cudaStreamDestroy"] == gpu.calls["cudaStreamCreateWithFlags"] == 1


def test_the_gpu_refuses(gpu: double.FakeGpu, onnx: Path) -> None:
    gpu.fails["cudaStreamCreateWithFlags"] = 2
    with pytest.raises(GpuError, match=r"CUDA failed while creating a stream \(cudaErrorMemoryAllocation: what went"):
        build_engine(onnx, onnx.with_suffix(".engine"))


def missing(onnx: Path, message: str) -> str:
    with pytest.raises(NotOnThisMachineError, match=message) as caught:
        build_engine(onnx, onnx.with_suffix(".engine"), BuildSettings(BatchProfile(1, 8, 32), workspace_gib=2))
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_machines_without_what_it_takes(
    install: Callable[..., double.FakeGpu], onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = install()
    gpu.fails["cudaGetDeviceCount"] = 35
    missing(onnx, "no GPU that CUDA can use .cudaErrorInsufficientDriver")
    gpu.fails.clear()
    gpu.count = 0
    missing(onnx, "there is no GPU cuda:0: CUDA finds 0")
    monkeypatch.setattr(sys.modules["cuda.bindings.runtime"], "cudaGetDeviceCount", _no_driver)
    missing(onnx, r"no NVIDIA driver \(Failed to dlopen libcuda\.so\.1\)")
    for name in ("cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, name, None)
    missing(onnx, "cuda-python is not installed. pip install")
    install(tensorrt="8.6.1")
    missing(onnx, r"TensorRT 8\.6\.1 is older than 10\.3")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    said = missing(onnx, r"model\.onnx is ready, its engine cannot be built here: TensorRT is not installed")
    assert "run there: pmm export model.onnx --trt --batch 1,8,32 --workspace 2 " in said
    assert said.endswith(
        "(or: trtexec --onnx=model.onnx --saveEngine=model.engine --stronglyTyped --noTF32"
        " --minShapes=images:1x96x64x3 --optShapes=images:8x96x64x3 --maxShapes=images:32x96x64x3"
        " --builderOptimizationLevel=3 --profilingVerbosity=detailed --memPoolSize=workspace:2048)"
    )


def _no_driver() -> None:
    raise RuntimeError("Failed to dlopen libcuda.so.1")


def test_the_older_layout_of_cuda_python(gpu: double.FakeGpu, onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.cudart", sys.modules["cuda.bindings.runtime"])
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    assert build_engine(onnx, onnx.with_suffix(".engine")).manifest.machine.gpu == "Orin"
