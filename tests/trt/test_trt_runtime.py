"""An engine gives the embeddings of its ONNX file, for any number of crops and threads."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import double
import numpy as np
import pytest
from color_network import color_network

import pmm_edge
from pmm_edge.errors import ModelError
from pmm_edge.export.tensorrt import BuiltEngine, build_engine
from pmm_edge.runtime import tensorrt_backend
from pmm_edge.runtime.cuda import GpuError, NotOnThisMachineError
from pmm_edge.runtime.manifest import BatchProfile, BuildSettings, manifest_path
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
    return TensorRTEmbedder(built.path, cuda_graphs=request.param)


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
    embedder = TensorRTEmbedder(built.path)
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
    StreamEndCapture GraphInstantiate GraphDestroy GraphLaunch GetDeviceProperties RuntimeGetVersion DriverGetVersion
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
