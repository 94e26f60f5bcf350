"""An engine embeds what its ONNX file does, however many crops come, from however many threads."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import double
import numpy as np
import pytest
from colour_network import colour_network

import pmm_edge
from pmm_edge.errors import ModelError
from pmm_edge.export.tensorrt import BuiltEngine, build_engine
from pmm_edge.runtime import tensorrt_backend
from pmm_edge.runtime.cuda import GpuError, NotOnThisMachineError
from pmm_edge.runtime.manifest import BatchProfile, BuildSettings
from pmm_edge.runtime.tensorrt_backend import TensorRTEmbedder
from pmm_edge.spec import InputForm, InputSpec

_RANDOM = np.random.default_rng(0)
CROPS = [np.full((120, 50, 3), colour, np.uint8) for colour in _RANDOM.integers(0, 256, (11, 3))]


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.fixture
def expected(onnx: Path) -> np.ndarray:
    return pmm_edge.load(onnx, "cpu").embed(CROPS)


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 11])
def test_any_number_of_crops(count: int, cuda_graphs: bool, built: BuiltEngine, expected: np.ndarray) -> None:
    embedder = TensorRTEmbedder(built.path, cuda_graphs=cuda_graphs)
    for _ in range(2):  # recorded, then replayed
        close(embedder.embed(CROPS[:count]), expected[:count])


def test_an_engine_is_fed_batches_of_its_maximum(gpu: double.FakeGpu, onnx: Path) -> None:
    built = build_engine(onnx, onnx.with_suffix(".engine"), BuildSettings(BatchProfile(1, 80, 80)))
    embedder, expected = pmm_edge.load(built.path), pmm_edge.load(onnx, "cpu")
    crops = 16 * CROPS  # 176
    close(embedder.embed(crops), expected.embed(crops))
    assert gpu.calls["cudaGraphLaunch"] == 3


def test_embedders_say_what_they_are(built: BuiltEngine) -> None:
    embedder = pmm_edge.load(built.path)
    assert (embedder.backend, embedder.device, embedder.path) == ("tensorrt", "cuda:0", built.path)
    assert embedder.spec == built.manifest.spec
    assert embedder.embed([]).shape == (0, 8)


@pytest.mark.parametrize("form", ["raw", "normalized"])
def test_every_input_form(form: InputForm, gpu: double.FakeGpu, tmp_path: Path) -> None:
    onnx = colour_network(tmp_path / "model.onnx", form)
    built = build_engine(onnx, tmp_path / "model.engine", BuildSettings(BatchProfile(1, 2, 4)))
    close(pmm_edge.load(built.path).embed(CROPS), pmm_edge.load(onnx, "cpu").embed(CROPS))


def test_a_graph_for_each_batch_size_and_no_more(built: BuiltEngine, gpu: double.FakeGpu) -> None:
    embedder = pmm_edge.load(built.path)
    for count in (1, 2, 4, 3, 4, 1, 8):
        embedder.embed(CROPS[:count])
    assert gpu.calls["cudaGraphInstantiate"] == 3  # 1 is padded to 2, 8 is 4 twice
    assert gpu.calls["cudaGraphLaunch"] == 8


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_gpu_time_is_that_of_the_layers_alone(cuda_graphs: bool, built: BuiltEngine, gpu: double.FakeGpu) -> None:
    embedder = TensorRTEmbedder(built.path, cuda_graphs=cuda_graphs)
    images = np.zeros((9, 96, 64, 3), np.uint8)
    assert embedder.cuda_graphs == cuda_graphs
    for _ in range(2):  # the double counts 1 ms a copy, 10 ms an image
        assert embedder.gpu_milliseconds(images[:3]) == 30
        assert embedder.gpu_milliseconds(images) == 100  # 4, 4, and 1 padded to 2
    del embedder
    assert gpu.calls["cudaEventDestroy"] == gpu.calls["cudaEventCreate"] == 4  # two for the time, one for each buffer


def test_timing_leaves_the_embeddings_as_they_were(built: BuiltEngine, expected: np.ndarray) -> None:
    embedder = pmm_edge.load(built.path)
    prepared = np.stack([np.full((96, 64, 3), crop[0, 0], np.uint8) for crop in CROPS[:3]])
    assert embedder.gpu_milliseconds(prepared)
    close(embedder.embed(CROPS[:3]), expected[:3])


def test_what_is_returned_is_not_overwritten(built: BuiltEngine, expected: np.ndarray) -> None:
    embedder = pmm_edge.load(built.path)
    first = embedder.embed(CROPS[:3])
    embedder.embed(CROPS[3:6])
    close(first, expected[:3])


def test_threads_share_an_embedder(built: BuiltEngine, expected: np.ndarray) -> None:
    embedder = pmm_edge.load(built.path)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda start: embedder.embed(CROPS[start : start + 3]), [0, 3, 6] * 8))
    for result, start in zip(results, [0, 3, 6] * 8, strict=True):
        close(result, expected[start : start + 3])


def test_memory_goes_back_with_the_embedder(built: BuiltEngine, gpu: double.FakeGpu) -> None:
    embedder = pmm_edge.load(built.path)
    embedder.embed(CROPS)
    assert gpu.memory
    del embedder
    assert not gpu.memory
    assert gpu.calls["cudaGraphExecDestroy"] == gpu.calls["cudaGraphInstantiate"]
    assert gpu.calls["cudaStreamDestroy"] == gpu.calls["cudaStreamCreateWithFlags"]


@pytest.mark.parametrize(
    "call",
    [
        "cudaSetDevice",
        "cudaMallocHost",
        "cudaMalloc",
        "cudaMemcpyAsync",
        "cudaStreamSynchronize",
        "cudaStreamBeginCapture",
        "cudaStreamEndCapture",
        "cudaGraphInstantiate",
        "cudaGraphDestroy",
        "cudaGraphLaunch",
        "cudaGetDeviceProperties",
        "cudaRuntimeGetVersion",
        "cudaDriverGetVersion",
        "cudaEventCreate",
        "cudaEventRecord",
        "cudaEventSynchronize",
        "cudaEventElapsedTime",
    ],
)
def test_every_status_is_checked(call: str, built: BuiltEngine, gpu: double.FakeGpu) -> None:
    gpu.fails[call] = 2
    with pytest.raises(GpuError, match=r"CUDA failed while .* \(cudaErrorMemoryAllocation: .*\)\. ") as caught:
        embedder = pmm_edge.load(built.path)
        embedder.embed(CROPS)
        embedder.gpu_milliseconds(np.zeros((2, 96, 64, 3), np.uint8))
    assert "\n" not in str(caught.value)


def test_only_a_lack_of_memory_is_called_one(built: BuiltEngine, gpu: double.FakeGpu) -> None:
    embedder = pmm_edge.load(built.path)
    for status, remedy in ((2, "memory full"), (35, "Start the program again")):
        gpu.fails["cudaSetDevice"] = status
        with pytest.raises(GpuError) as caught:
            embedder.embed(CROPS[:2])
        assert remedy in caught.value.remedy


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_the_next_chunk_is_prepared_while_the_gpu_works(
    cuda_graphs: bool,
    built: BuiltEngine,
    gpu: double.FakeGpu,
    expected: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    embedder = TensorRTEmbedder(built.path, cuda_graphs=cuda_graphs)
    embedder.embed(CROPS)  # records what is to be recorded
    waiting = []

    def told(images: np.ndarray, spec: InputSpec) -> np.ndarray:
        waiting.append(len(gpu.queue))
        return images

    monkeypatch.setattr(tensorrt_backend, "network_input", told)
    close(embedder.embed(CROPS), expected)  # 4, 4 and 3, in one call
    copies_layers_and_event = 4
    assert waiting == [0, copies_layers_and_event, copies_layers_and_event]


def test_work_of_a_call_that_failed_is_waited_for(
    built: BuiltEngine, gpu: double.FakeGpu, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder = pmm_edge.load(built.path)
    embedder.embed(CROPS)
    prepare, fed = tensorrt_backend.network_input, []

    def interrupted(images: np.ndarray, spec: InputSpec) -> np.ndarray:
        fed.append(images)
        if len(fed) == 2:
            raise KeyboardInterrupt
        return prepare(images, spec)

    monkeypatch.setattr(tensorrt_backend, "network_input", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedder.embed(CROPS)
    assert not gpu.queue
    close(embedder.embed(CROPS), expected)


def test_what_tensorrt_refuses(built: BuiltEngine, gpu: double.FakeGpu) -> None:
    embedder = pmm_edge.load(built.path)
    gpu.says = "out of\nmemory"
    with pytest.raises(GpuError, match=r"cannot run .*model\.engine at batch 4 \(out of memory\)"):
        embedder.embed(CROPS)
    with pytest.raises(ModelError, match=r"TensorRT 10\.3\.0 cannot load .*\(out of memory\).*Build it again"):
        pmm_edge.load(built.path)
    gpu.says = None
    close(embedder.embed(CROPS[:2]), embedder.embed(CROPS[:2]))  # and goes on when it can


def test_a_capture_that_fails_leaves_the_stream_usable(
    built: BuiltEngine, gpu: double.FakeGpu, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder = pmm_edge.load(built.path)
    context = sys.modules["tensorrt"].IExecutionContext
    execute = context.execute_async_v3
    monkeypatch.setattr(
        context, "execute_async_v3", lambda self, handle: gpu.recording is None and execute(self, handle)
    )
    with pytest.raises(GpuError, match="cannot run"):
        embedder.embed(CROPS[:2])
    assert gpu.recording is None
    monkeypatch.setattr(context, "execute_async_v3", execute)
    close(embedder.embed(CROPS[:2]), expected[:2])


def test_devices(built: BuiltEngine, gpu: double.FakeGpu) -> None:
    with pytest.raises(ModelError, match=r"cannot run on the device cpu\. Load \S*/model\.onnx there"):
        pmm_edge.load(built.path, "cpu")
    with pytest.raises(ModelError, match="unknown device 'dla'"):
        pmm_edge.load(built.path, "dla")
    with pytest.raises(NotOnThisMachineError, match="no GPU cuda:1: CUDA finds 1"):
        pmm_edge.load(built.path, "cuda:1")
    gpu.count = 2
    assert pmm_edge.load(built.path, "cuda:1").device == "cuda:1"


def test_machines_without_tensorrt(built: BuiltEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(NotOnThisMachineError, match=r"TensorRT is not installed\. On a Jetson it comes with JetPack"):
        pmm_edge.load(built.path)


def test_a_manifest_that_promises_more_than_the_engine_takes(
    built: BuiltEngine, install: Callable[..., double.FakeGpu]
) -> None:
    manifest = built.path.with_suffix(".manifest.json")
    manifest.write_text(manifest.read_text().replace('"maximum": 4', '"maximum": 8'))
    with pytest.raises(ModelError, match=r"does not take a batch of 8, as its manifest says"):
        pmm_edge.load(built.path).embed(CROPS[:8])
