"""Running engines: they give the embeddings of their ONNX file, and those that do not fit are refused."""

import json
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import double
import numpy as np
import onnx as onnx_package
import pytest
from certify import model_report
from color_network import color_network

import pmm_edge
from pmm_edge.bench.certification import write_certificates
from pmm_edge.bench.report import BenchReport
from pmm_edge.errors import ModelError, PmmError
from pmm_edge.export.tensorrt import BuiltEngine, build_engine
from pmm_edge.files import decode_json, sha256
from pmm_edge.runs import AboutRun, new_run_folder
from pmm_edge.runtime import tensorrt_backend
from pmm_edge.runtime.certificate import check_certificate, open_model
from pmm_edge.runtime.cuda import GpuError, NotOnThisMachineError
from pmm_edge.runtime.manifest import BatchProfile, BuildSettings, EngineManifest, Machine, manifest_path
from pmm_edge.runtime.tensorrt_backend import TensorRTEmbedder
from pmm_edge.spec import InputForm, InputSpec

CROPS = [np.full((120, 50, 3), color, np.uint8) for color in np.random.default_rng(0).integers(0, 256, (11, 3))]
IMAGES = np.stack([np.full((96, 64, 3), crop[0, 0], np.uint8) for crop in CROPS])


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.fixture
def expected(onnx: Path) -> np.ndarray:
    return pmm_edge.load(onnx, "cpu").embed(CROPS)


@pytest.fixture(params=[True, False], ids=["graphs", "layers"])
def embedder(request: pytest.FixtureRequest, built: BuiltEngine) -> TensorRTEmbedder:
    return TensorRTEmbedder(open_model(built.path), cuda_graphs=request.param)


def test_any_number_of_crops(embedder: TensorRTEmbedder, expected: np.ndarray) -> None:
    for count in (1, 2, 3, 4, 5, 8, 11, 11, 5, 1):  # captured, then replayed
        close(embedder.embed(CROPS[:count]), expected[:count])


@pytest.mark.parametrize("form", ["raw", "normalized"])
def test_every_input_form(form: InputForm, gpu: double.FakeGpu, tmp_path: Path) -> None:
    onnx = color_network(tmp_path / "model.onnx", form)
    built = build_engine(onnx, tmp_path / "model.engine", BuildSettings(BatchProfile(1, 80, 80)))
    crops = 16 * CROPS  # 176: two full batches and a rest
    close(pmm_edge.load(built.path).embed(crops), pmm_edge.load(onnx, "cpu").embed(crops))
    assert gpu.calls["cudaGraphLaunch"] == 3


def test_gpu_time_excludes_copies(embedder: TensorRTEmbedder, expected: np.ndarray) -> None:
    for _ in range(2):  # the double takes 1 ms per copy and 10 ms per image
        assert embedder.gpu_milliseconds(IMAGES[:3]) == 30
        assert embedder.gpu_milliseconds(IMAGES[:9]) == 100  # 4, 4, and 1 padded to 2
    close(embedder.embed(CROPS[:3]), expected[:3])


def test_threads_share_an_embedder(built: BuiltEngine, expected: np.ndarray) -> None:
    embedder, starts = pmm_edge.load(built.path), [0, 3, 6] * 8
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda start: embedder.embed(CROPS[start : start + 3]), starts))
    close(np.concatenate(results), np.concatenate([expected[start : start + 3] for start in starts]))


def test_one_graph_per_batch_size_and_all_are_freed(built: BuiltEngine, gpu: double.FakeGpu) -> None:
    embedder = TensorRTEmbedder(open_model(built.path))
    for count in (1, 2, 4, 3, 4, 1, 8):
        embedder.embed(CROPS[:count])
    assert gpu.calls["cudaGraphInstantiate"] == 3  # 1 is padded to 2, 8 is 4 twice
    assert gpu.calls["cudaGraphLaunch"] == 8
    embedder.gpu_milliseconds(IMAGES[:2])
    del embedder
    assert not gpu.memory
    assert gpu.calls["cudaGraphExecDestroy"] == 3
    assert gpu.calls["cudaStreamDestroy"] == gpu.calls["cudaStreamCreateWithFlags"]
    assert gpu.calls["cudaEventDestroy"] == gpu.calls["cudaEventCreate"]


CALLS = """SetDevice StreamCreateWithFlags MallocHost Malloc MemcpyAsync StreamSynchronize StreamBeginCapture
    StreamEndCapture GraphInstantiate GraphDestroy GraphLaunch GetDeviceProperties RuntimeGetVersion
    EventCreate EventRecord EventSynchronize EventElapsedTime"""


@pytest.mark.parametrize("call", CALLS.split())
def test_every_status_is_checked(call: str, built: BuiltEngine, gpu: double.FakeGpu) -> None:
    gpu.fails[f"cuda{call}"] = 2
    with pytest.raises(GpuError, match="cudaErrorMemoryAllocation") as caught:
        pmm_edge.load(built.path).gpu_milliseconds(IMAGES[:2])
    assert "memory" in caught.value.remedy
    assert "\n" not in str(caught.value)


def test_the_next_chunk_is_prepared_while_the_gpu_works(
    embedder: TensorRTEmbedder, gpu: double.FakeGpu, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interruption of that leaves no work behind."""
    embedder.embed(CROPS)  # captures the graphs
    prepare, waiting, copies_layers_and_event = tensorrt_backend.network_input, [], 4

    def interrupted(images: np.ndarray, spec: InputSpec) -> np.ndarray:
        waiting.append(len(gpu.queues[0]))
        if len(waiting) == 3:
            raise KeyboardInterrupt
        return prepare(images, spec)

    monkeypatch.setattr(tensorrt_backend, "network_input", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedder.embed(CROPS)  # 4, 4 and 3
    assert waiting == [0, copies_layers_and_event, copies_layers_and_event]
    assert gpu.queues == [[]]
    close(embedder.embed(CROPS), expected)


def test_errors_of_tensorrt(built: BuiltEngine, gpu: double.FakeGpu, expected: np.ndarray) -> None:
    embedder = pmm_edge.load(built.path)
    gpu.error = "out of\nmemory"
    with pytest.raises(GpuError, match=r"batch 4 \(out of memory\)"):
        embedder.embed(CROPS)
    with pytest.raises(ModelError, match=r"\(out of memory\)"):
        pmm_edge.load(built.path)
    gpu.error = ""
    close(embedder.embed(CROPS[:2]), expected[:2])


def test_a_failed_capture_leaves_the_stream_usable(
    built: BuiltEngine, gpu: double.FakeGpu, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder, context = pmm_edge.load(built.path), sys.modules["tensorrt"].IExecutionContext
    execute = context.execute_async_v3
    with monkeypatch.context() as patched:
        patched.setattr(context, "execute_async_v3", lambda *inputs: len(gpu.queues) == 1 and execute(*inputs))
        with pytest.raises(GpuError):
            embedder.embed(CROPS[:2])
    assert gpu.queues == [[]]
    close(embedder.embed(CROPS[:2]), expected[:2])


def test_devices(built: BuiltEngine, gpu: double.FakeGpu) -> None:
    with pytest.raises(ModelError) as caught:
        pmm_edge.load(built.path, "cpu")
    assert "model.onnx" in caught.value.remedy
    with pytest.raises(NotOnThisMachineError, match="cuda:1"):
        pmm_edge.load(built.path, "cuda:1")
    gpu.count = 2
    assert pmm_edge.load(built.path, 1).device == "cuda:1"


def test_a_manifest_that_promises_too_much(built: BuiltEngine) -> None:
    settings = replace(built.manifest.settings, batch=BatchProfile(2, 3, 8))
    manifest_path(built.path).write_text(replace(built.manifest, settings=settings).to_json())
    with pytest.raises(ModelError, match="batch of 8"):
        pmm_edge.load(built.path).embed(CROPS[:8])


def refused(engine: Path, command: str, named: Path | None = None) -> None:
    with pytest.raises(ModelError) as caught:
        pmm_edge.load(engine)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy.endswith(command)
    assert str(named or engine) in caught.value.problem


def test_damaged_and_changed_files(built: BuiltEngine, onnx: Path) -> None:
    content, command = built.path.read_bytes(), f"pmm export {onnx} --trt --batch-profile 2,3,4"
    for changed in (content[:-1], content[:-1] + bytes([content[-1] ^ 1])):
        built.path.write_bytes(changed)
        refused(built.path, command)
    built.path.write_bytes(content)
    onnx.write_bytes(onnx.read_bytes() + b" ")
    refused(built.path, command, onnx)
    onnx.unlink()
    assert pmm_edge.load(built.path).backend == "tensorrt"  # the engine does not need its ONNX file


def test_an_engine_in_another_folder_finds_its_onnx_file(gpu: double.FakeGpu, onnx: Path, tmp_path: Path) -> None:
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "deep")
    content = onnx.read_bytes()
    for folder in ("elsewhere", "link"):
        onnx.write_bytes(content)
        engine = build_engine(onnx, tmp_path / folder / "x.engine").path
        assert pmm_edge.load(engine).backend == "tensorrt"
        onnx.write_bytes(b"another")
        refused(engine, f"pmm export {onnx} --trt --batch-profile 1,16,64 --out {engine}", onnx)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("onnx", "/etc/passwd"),
        ("onnx", "a\0b"),
        ("machine.tensorrt", 10.3),
        ("settings.batch.minimum", 99),
        ("precision.layers", {"FP32": "all"}),
        ("spec.embedding_size", 0),
        ("schema", 9),
    ],
)
def test_invalid_entries_of_a_manifest(entry: str, value: object, built: BuiltEngine) -> None:
    path = manifest_path(built.path)
    *groups, name = entry.split(".")
    content = group = json.loads(path.read_text())
    for inner in groups:
        group = group[inner]
    group[name] = value
    path.write_text(json.dumps(content))
    refused(built.path, "--batch-profile 1,16,64", path)


def test_missing_and_unreadable_files(built: BuiltEngine, onnx: Path) -> None:
    path, command = manifest_path(built.path), f"pmm export {onnx} --trt --batch-profile 1,16,64"
    text = path.read_text()
    deep = text.replace('"schema": 1', f'"schema": {"[" * 100_000}')
    for garbled in ("", "[]", text[:-10], deep):
        path.write_text(garbled)
        refused(built.path, command, path)
    path.unlink()
    refused(built.path, command)
    built.path.unlink()
    refused(built.path, f"pmm export {onnx} --trt")


@pytest.mark.parametrize(
    ("compatible", "built_on", "here", "loads"),
    [
        ("", ("Orin", "8.7", "10.3.0"), ("Orin", "8.7", "10.13.0.35"), False),
        ("", ("Orin", "8.7", "10.3.0"), ("NVIDIA L4", "8.9", "10.3.0"), False),
        ("ampere", ("NVIDIA A10", "8.6", "10.3.0"), ("NVIDIA H100", "9.0", "10.3.0"), True),
        ("ampere", ("NVIDIA A10", "8.6", "10.3.0"), ("NVIDIA T4", "7.5", "10.3.0"), False),
        ("same", ("NVIDIA A10", "8.6", "10.13.0"), ("NVIDIA RTX A4000", "8.6", "10.13.0"), True),
        ("same", ("NVIDIA A10", "8.6", "10.13.0"), ("NVIDIA L4", "8.9", "10.13.0"), False),
        ("same", ("NVIDIA A10", "8.6", "10.13.0"), ("NVIDIA RTX A4000", "8.6", "10.16.2"), False),
        ("version", ("Orin", "8.7", "10.3.0"), ("Orin", "8.7", "10.13.0.35"), True),
        ("version", ("Orin", "8.7", "10.3.0"), ("Orin", "8.7", "11.4.0.106"), True),
        ("version", ("Orin", "8.7", "10.13.0.35"), ("Orin", "8.7", "10.3.0"), False),
        ("version", ("Orin", "8.7", "11.4.0.106"), ("Orin", "8.7", "10.13.0.35"), False),
        ("version", ("Orin", "8.7", "10.3.0"), ("Orin", "8.7", "12.0.0"), False),
        *(("version", ("Orin", "8.7", number), ("Orin", "8.7", "10.3.0"), False) for number in ("", "one", "9" * 5000)),
    ],
)
def test_other_machines(
    compatible: str,
    built_on: tuple,
    here: tuple,
    loads: bool,
    install: Callable[..., double.FakeGpu],
    built: BuiltEngine,
) -> None:
    changes = {"version_compatible": True} if compatible == "version" else {"hardware_compatible": compatible or None}
    option = "--version-compatible" if compatible == "version" else f"--hardware-compatible {compatible}"
    settings = replace(built.manifest.settings, **changes)
    manifest = replace(built.manifest, settings=settings, machine=Machine(*built_on, "12.6"))
    manifest_path(built.path).write_text(manifest.to_json())
    install(*here)
    if loads:
        assert pmm_edge.load(built.path).device == "cuda:0"
    else:
        refused(built.path, "--trt --batch-profile 2,3,4" + (f" {option}" if compatible else ""))


def test_settings_survive_the_file_and_the_command(built: BuiltEngine) -> None:
    settings = BuildSettings(BatchProfile(1, 2, 3), 0.5, 5, "same", True, False)
    manifest = replace(built.manifest, settings=settings)
    assert decode_json(EngineManifest, manifest.to_json(), "test") == manifest
    assert settings.command(Path("a b.onnx")) == (
        "pmm export 'a b.onnx' --trt --batch-profile 1,2,3 --workspace 0.5 --optimization-level 5"
        " --hardware-compatible same --version-compatible --no-timing-cache"
    )


def test_batch_profiles() -> None:
    for text in ("64,16,1", "0,1,2", "1,16", "1,16,x", "", "-1,2,3", "1.5,2,3"):
        with pytest.raises(PmmError) as caught:
            BatchProfile.parse(text)
        assert text in caught.value.problem
    assert BatchProfile.chosen(None, None) == BatchProfile(1, 16, 64)
    assert BatchProfile.chosen("1,2,3", None) == BatchProfile.chosen(BatchProfile(1, 2, 3), None)
    assert BatchProfile.chosen(None, 4) == BatchProfile.chosen("4,4,4", 4) == BatchProfile(4, 4, 4)
    with pytest.raises(PmmError):
        BatchProfile.chosen("1,2,4", 4)


def test_invalid_settings() -> None:
    for invalid in (*({"workspace_gib": size} for size in (0, -1, float("nan"), 1e300)), {"optimization_level": 6}):
        with pytest.raises(PmmError):
            BuildSettings(**invalid)


def test_an_engine_is_certified_with_its_manifest(built: BuiltEngine, onnx: Path) -> None:
    reports = [replace(model_report(path), path=str(path)) for path in (onnx, built.path)]
    write_certificates(BenchReport(reports[0], reports[1:], "tiny", "0" * 64, 24, {}, "2026-11-22T20:00:00+00:00"))
    manifest = manifest_path(built.path)
    assert check_certificate(built.path).engine_manifest_sha256 == sha256(manifest)
    assert pmm_edge.load(built.path, require_certificate=True).backend == "tensorrt"
    changed = replace(built.manifest, build_seconds=99.0).to_json()  # whose digest is right
    for path, content in ((manifest, changed.encode()), (onnx, b"another"), (built.path, b"another")):
        before = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(ModelError, match=path.name):
            check_certificate(built.path)
        path.write_bytes(before)


@pytest.mark.usefixtures("gpu")
def test_external_data_of_the_onnx_file_is_part_of_it(onnx: Path) -> None:
    onnx_package.save(
        onnx_package.load(onnx), onnx, save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    engine = build_engine(onnx, onnx.with_suffix(".engine")).path
    assert pmm_edge.load(engine).backend == "tensorrt"
    weights = onnx.with_name("weights.bin")
    weights.write_bytes(weights.read_bytes()[::-1])
    refused(engine, f"pmm export {onnx} --trt --batch-profile 1,16,64", onnx)


def test_a_damaged_manifest(built: BuiltEngine, onnx: Path) -> None:
    path = manifest_path(built.path)
    path.write_text(path.read_text().replace("0.485", "0.495"))
    refused(built.path, f"pmm export {onnx} --trt --batch-profile 1,16,64", path)


def test_an_engine_of_tensorrt_for_rtx(
    built: BuiltEngine, gpu: double.FakeGpu, expected: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs on the GPUs that it was built for, with the release that built it, and keeps its compiled kernels."""
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", double.tensorrt_rtx(gpu, "1.7.1"))
    settings = replace(built.manifest.settings, gpus=("sm80", "sm86"))
    manifest = replace(built.manifest, settings=settings, machine=Machine("RTX", "sm80,sm86", "1.7.1", ""))
    manifest_path(built.path).write_text(manifest.to_json())
    refused(built.path, "--rtx --gpu sm80,sm86 --batch-profile 2,3,4 --out " + str(built.path))
    gpu.major, gpu.minor = 8, 6
    for kernels in (b"kernels", b"kernelskernels"):
        close(pmm_edge.load(built.path).embed(CROPS[:3]), expected[:3])
        (cache,) = (tmp_path / "home" / "tensorrt-rtx").iterdir()
        assert cache.read_bytes() == kernels
    cache.write_bytes(b"of another GPU")
    close(pmm_edge.load(built.path).embed(CROPS[:3]), expected[:3])
    assert cache.read_bytes() == b"kernels"
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", double.tensorrt_rtx(gpu, "1.8.0"))
    refused(built.path, "--out " + str(built.path))


def test_bench_and_verify_of_an_engine_of_tensorrt_for_rtx(
    install: Callable[..., double.FakeGpu], onnx: Path, tiny_dataset: Path, pmm: Callable, monkeypatch: Any
) -> None:
    gpu = install("RTX 3090", "8.6")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", double.tensorrt_rtx(gpu))
    engine = onnx.with_name("model-rtx.engine")
    built = build_engine(onnx, engine, BuildSettings(BatchProfile(1, 2, 4)))
    machine, settings = Machine("RTX", "sm86", "1.7.1.116", ""), replace(built.manifest.settings, gpus=("sm86",))
    manifest_path(engine).write_text(replace(built.manifest, machine=machine, settings=settings).to_json())
    ended = pmm("bench", engine, "--reference", onnx, "--data", tiny_dataset, "--parity-only", "--json")
    (model,) = ended.json["models"]
    assert (model["backend"], model["device"], model["failures"]) == ("tensorrt", "cuda:0", [])
    assert pmm("verify", engine).ok
    gpu.fails["cudaGetDeviceCount"] = 2  # verifying needs no GPU
    assert pmm("verify", engine).ok
    ended = pmm("bench", engine, "--reference", onnx, "--data", tiny_dataset)
    assert (ended.exit_code, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
    assert str(engine) in ended.stderr


def test_the_bench_of_a_run_skips_engines_of_other_machines(
    install: Callable[..., double.FakeGpu],
    tiny_checkpoint: Path,
    tiny_onnx: Path,
    tiny_dataset: Path,
    tmp_path: Path,
    pmm: Callable,
    monkeypatch: Any,
) -> None:
    """Unless they are named or there is nothing else."""
    install()
    monkeypatch.chdir(tmp_path)
    run = new_run_folder(AboutRun("one", str(tiny_dataset), "0"), Path("runs/one"))
    (run / "export").mkdir()
    shutil.copy(tiny_checkpoint, run / "best.pt")
    onnx = Path(shutil.copy(tiny_onnx, run / "export" / "model.onnx"))
    engine = build_engine(onnx, onnx.with_suffix(".engine")).path
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    printed = pmm("bench", "--parity-only", "--limit", 4, "--json").json
    assert [model["path"] for model in printed["models"]] == [str(onnx)]
    (skipped,) = [warning for warning in printed["warnings"] if warning["kind"] == "not measured"]
    assert str(engine) in skipped["detail"]
    assert pmm("bench", engine, "--parity-only").exit_code == 1
    onnx.unlink()
    assert pmm("bench", "--parity-only").exit_code == 1
