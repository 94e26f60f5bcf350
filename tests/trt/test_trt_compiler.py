"""The real compiler of TensorRT for RTX builds what `pmm export` writes. It needs no GPU; only running engines does.

Its API is that of TensorRT 11. The doubles of the other tests keep what needs a GPU.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import double
import numpy as np
import onnx
import pytest
import torch
from certify import model_report
from color_network import color_network
from onnx import helper, numpy_helper
from test_trt_contract import RTX, installed

import pmm_edge
from pmm_edge.bench.certification import write_certificates
from pmm_edge.bench.report import BenchReport
from pmm_edge.errors import ModelError
from pmm_edge.export import graph
from pmm_edge.export.exporter import INT8_OPSET
from pmm_edge.export.quantize import cast_to_fp16, quantize, value_ranges
from pmm_edge.export.tensorrt import BuiltEngine, build_engine, compile_network
from pmm_edge.files import sha256
from pmm_edge.model import build_model
from pmm_edge.runtime.cuda import NotOnThisMachineError
from pmm_edge.runtime.manifest import RTX_DEFAULT, RTX_GPUS, BatchProfile, BuildSettings, manifest_path, read_manifest
from pmm_edge.runtime.model_file import ModelFile
from pmm_edge.runtime.tensorrt_backend import error_logger
from pmm_edge.spec import InputForm, InputSpec, ModelSpec, Quantization

SETTINGS = BuildSettings(BatchProfile(1, 2, 4), gpus=RTX_DEFAULT)


@pytest.fixture(scope="session")
def rtx() -> Iterator[Any]:
    """The compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(installed(*RTX))
        import tensorrt_rtx_bindings

        yield tensorrt_rtx_bindings


@pytest.fixture
def build(rtx: Any, record_property: Callable) -> Callable[..., BuiltEngine]:
    """Build an engine in `engine_path`, and count it in the summary of the tests."""

    def run(path: Path, settings: BuildSettings = SETTINGS, **options: Any) -> BuiltEngine:
        built = build_engine(path, settings.engine_path(path), settings, **options)
        record_property("compiled", f"{settings.compiler} {rtx.__version__}")
        return built

    return run


@pytest.mark.parametrize(
    ("method", "backbone", "form", "normalized", "opset"),
    [
        ("pmm", "resnet18", "uint8", False, 17),
        ("bdb", "resnet18", "raw", True, 18),
        ("baseline", "resnet18", "normalized", False, 19),
        ("pmm", "resnet18", "normalized", True, 20),
        ("pmm", "resnet50", "uint8", False, 18),
        ("pcb", "resnet18", "raw", True, 20),
        ("pcb-rpp", "resnet18", "uint8", False, 19),
        ("cama", "resnet18", "normalized", True, 20),
        ("baseline", "mobilenet_v3_small", "uint8", False, 17),
        ("bdb", "mobilenet_v3_large", "raw", True, 18),
        ("pmm", "efficientnet_b0", "normalized", False, 19),
    ],
)
def test_exported_networks(
    method: str, backbone: str, form: InputForm, normalized: bool, opset: int, build: Callable, tmp_path: Path
) -> None:
    """Every value with every precision; static and dynamic batches take turns."""
    torch.manual_seed(0)
    method, _, rpp = method.partition("-")
    network = build_model(method, num_classes=4, backbone=backbone, height=96, width=64, rpp=bool(rpp))
    network.refined = bool(rpp)
    width = max(stop for _, stop in network.stages.values())
    spec = ModelSpec(method, backbone, 4, InputSpec(96, 64, form), width, network.stages, normalized_output=normalized)
    exported = graph.inference_network(network, spec.input, normalized)

    @cache
    def parts_in(opset: int) -> graph.Parts:
        return graph.split(graph.onnx_graph(exported, spec, opset))

    images = np.random.default_rng(0).integers(0, 256, (4, 96, 64, 3), dtype=np.uint8)
    sizes = {}
    precisions = {"resnet50": ("fp16",), "mobilenet_v3_large": ("int8",), "efficientnet_b0": ("int8",)}
    for number, precision in enumerate(precisions.get(backbone, ("fp32", "fp16", "int8"))):
        quantization = None
        lowest = INT8_OPSET if precision == "int8" else opset
        parts = parts_in(max(opset, lowest))
        content = parts.network
        if precision == "fp16":
            content, _ = cast_to_fp16(parts.network)
        if precision == "int8":
            quantization = Quantization("tensorrt", "minmax", len(images), float_type="fp16")
            content = quantize(parts.network, value_ranges(parts.network, images, spec.input, "minmax"), "tensorrt")
        static = 3 if (opset + number) % 2 else None
        described = replace(spec, precision=precision, quantization=quantization)
        path = tmp_path / f"{precision}.onnx"
        onnx.save(graph.finalize(parts.join(content), described, static), path)
        gpus = RTX_DEFAULT if "resnet" in backbone else RTX_DEFAULT[1:2]  # each takes seconds for so many layers
        gpus = ("sm75", *gpus[1:]) if precision == "fp16" else gpus  # Turing can run nothing else
        built = build(path, replace(SETTINGS, batch=BatchProfile.chosen(None, static), gpus=gpus))
        assert built.manifest.spec.precision == precision
        sizes[precision] = built.path.stat().st_size
    if backbone == "resnet18":
        assert sizes["fp16"] < 0.55 * sizes["fp32"]
        assert sizes["int8"] < 0.7 * sizes["fp16"]


def test_the_manifest(rtx: Any, build: Callable, tmp_path: Path) -> None:
    path = color_network(tmp_path / "model.onnx")
    built = build(path)
    manifest = read_manifest(built.path)
    assert manifest == built.manifest
    assert built.path.name == "model-rtx.engine"
    assert (manifest.onnx, manifest.onnx_sha256) == ("model.onnx", sha256(path))
    assert (manifest.engine_size, manifest.engine_sha256) == (built.path.stat().st_size, sha256(built.path))
    assert (manifest.machine.compute_capability, manifest.machine.tensorrt) == (",".join(RTX_DEFAULT), rtx.__version__)
    assert manifest.precision.layers == {}
    assert manifest.settings.command(path) == (
        f"pmm export {path} --rtx --gpu sm80,sm86,sm89,sm120 --batch-profile 1,2,4"
    )


def test_gpus(build: Callable, tmp_path: Path) -> None:
    path = color_network(tmp_path / "model.onnx")
    for name in (*RTX_GPUS[1:], ",".join(RTX_GPUS[1:])):
        assert build(path, replace(SETTINGS, gpus=tuple(name.split(",")))).manifest.machine.compute_capability == name
    with pytest.raises(ModelError) as caught:  # Turing has no FP32 products
        build(path, replace(SETTINGS, gpus=("sm75", "sm86")))
    assert "--precision fp16" in caught.value.remedy
    assert "node_of_embeddings" in caught.value.problem
    assert build(path, replace(SETTINGS, workspace_gib=0.5, optimization_level=5)).manifest.engine_size > 0


def with_node(path: Path, operator: str, *inputs: str, **constants: np.ndarray) -> Path:
    """Add a node to the network, whose result nobody reads."""
    model = onnx.load(path)
    model.graph.node.insert(1, helper.make_node(operator, [*inputs, *constants], ["unread"], "the_node"))
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    onnx.save(model, path)
    return path


def test_what_is_refused(rtx: Any, build: Callable, tmp_path: Path) -> None:
    """The errors name the node, and the engine that was built before stays."""
    path = color_network(tmp_path / "model.onnx")
    engine = build(path).path
    files = {file: file.read_bytes() for file in (engine, manifest_path(engine))}
    spec, logger = read_manifest(engine).spec, error_logger(rtx)
    unknown = with_node(color_network(path), "Det", square=np.eye(2, dtype=np.float32))
    with pytest.raises(ModelError, match="node Det the_node"):
        build(unknown)
    # Of INT8 for CPUs: activations with zero points.
    zero_point = {"scale": np.array(1, np.float32), "zero": np.array(128, np.uint8)}
    for_cpus = with_node(color_network(path), "QuantizeLinear", "pixels", **zero_point)
    with pytest.raises(ModelError, match="the_node"):
        build(for_cpus)
    truncated = ModelFile(path, [], path.read_bytes()[:-50])  # reading it from a file would refuse it first
    with pytest.raises(ModelError, match=r"cannot parse .*model\.onnx"):
        compile_network(rtx, logger, truncated, "x", spec, SETTINGS)
    assert {file: file.read_bytes() for file in files} == files


def test_progress_and_ctrl_c(build: Callable, tmp_path: Path) -> None:
    path, heard = color_network(tmp_path / "model.onnx"), list[tuple[str, int, int, str]]()
    build(path, report=lambda *reported: heard.append((*reported, "")[:4]))
    names, done, totals, inner = zip(*heard, strict=True)
    assert set(names) == {"model-rtx.engine: Building engine"}
    assert list(done) == sorted(done)
    assert (done[0], done[-1], set(totals)) == (0, totals[0], {totals[0]})
    assert len(set(inner)) > 5
    SETTINGS.engine_path(path).unlink()

    def interrupt(what: str, done: int, total: int, detail: str = "") -> None:
        if detail:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(path, report=interrupt)
    assert not SETTINGS.engine_path(path).exists()


def test_a_signal_while_the_compiler_runs_cancels_it(build: Callable, tmp_path: Path) -> None:
    """It arrives while TensorRT computes, so that Python sees it only in the next method that TensorRT calls."""
    path = color_network(tmp_path / "model.onnx")
    ctrl_c = threading.Timer(0.005, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        build(path, report=lambda *_: None if ctrl_c.ident else ctrl_c.start())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not SETTINGS.engine_path(path).exists()


def test_the_command(rtx: Any, record_property: Callable, pmm: Callable, tmp_path: Path, monkeypatch: Any) -> None:
    """`pmm export --rtx`, `pmm verify`, and loading without a driver."""
    path = color_network(tmp_path / "model.onnx", precision="int8", quantization=Quantization("tensorrt", "minmax", 4))
    assert "sm75" in pmm("export", path, "--rtx", "--gpu", "sm75,sm86").error
    ended = pmm("export", path, "--rtx", "--gpu", "SM86,sm89", "--batch-profile", "1,2,4")
    assert ended.exit_code == 0, ended.stderr
    assert "--precision fp16" in ended.stderr  # INT8 convolutions are not in NVIDIA's support matrix
    record_property("compiled", f"TensorRT for RTX {rtx.__version__}")
    engine = tmp_path / "model-rtx.engine"
    assert read_manifest(engine).settings.gpus == ("sm86", "sm89")
    reports = [replace(model_report(file), path=str(file)) for file in (path, engine)]
    write_certificates(BenchReport(reports[0], reports[1:], "tiny", "0" * 64, 24, {}, "2026-11-22T20:00:00+00:00"))
    assert pmm("verify", engine).exit_code == 0
    gpu = double.FakeGpu()
    gpu.fails["cudaGetDeviceCount"] = 2
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", double.cuda_runtime(gpu))
    with pytest.raises(NotOnThisMachineError) as caught:
        pmm_edge.load(engine)
    assert "\n" not in str(caught.value)
    assert str(engine) in caught.value.problem
    assert str(path) in caught.value.remedy
    ended = pmm("bench", engine, "--reference", path, "--data", tmp_path)
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert ended.stderr == f"error: {caught.value}\n"
    engine.write_bytes(engine.read_bytes()[:-1])
    assert pmm("verify", engine).exit_code == 1


def test_without_the_compiler(pmm: Callable, monkeypatch: Any, tmp_path: Path) -> None:
    for name in ("tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    ended = pmm("export", color_network(tmp_path / "model.onnx"), "--rtx", "--gpu", "sm120")
    assert ended.exit_code == 1
    assert f"pmm export {tmp_path}/model.onnx --rtx --gpu sm120 --batch-profile 1,16,64" in ended.stderr, "it runs here"
    assert "[rtx]" in ended.stderr
