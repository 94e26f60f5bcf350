"""The real thing: `pytest -m gpu` on a machine with a GPU, TensorRT and cuda-python."""

import time
from pathlib import Path

import numpy as np
import pytest

import pmm_edge
from pmm_edge.errors import PmmError
from pmm_edge.export.tensorrt import BuiltEngine, build_engine
from pmm_edge.runtime.build_settings import BatchProfile, BuildSettings
from pmm_edge.runtime.cuda import Cuda
from pmm_edge.runtime.tensorrt_backend import TensorRTEmbedder
from pmm_edge.runtime.tensorrt_library import import_tensorrt

pytestmark = pytest.mark.gpu
CROPS = np.random.default_rng(0).integers(0, 256, (11, 96, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def onnx(request: pytest.FixtureRequest) -> Path:
    """The tiny network, asked for only where there is something to run it."""
    try:
        import_tensorrt()
        Cuda().release()
    except PmmError as error:
        pytest.skip(str(error))
    return request.getfixturevalue("tiny_onnx")


@pytest.fixture(scope="module")
def engine(onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> BuiltEngine:
    out = tmp_path_factory.mktemp("engine") / "model.engine"
    return build_engine(onnx, out, BuildSettings(BatchProfile(1, 2, 4)))


@pytest.fixture(scope="module")
def expected(onnx: Path) -> np.ndarray:
    return pmm_edge.load(onnx, "cpu").embed(CROPS)


def least_cosine(first: np.ndarray, second: np.ndarray) -> float:
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(((first * second).sum(axis=1) / lengths).min())


def test_the_engine_agrees_with_onnx_runtime(engine: BuiltEngine, expected: np.ndarray) -> None:
    assert least_cosine(pmm_edge.load(engine.path).embed(CROPS), expected) >= 0.9999


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_every_batch_size_gives_the_same(cuda_graphs: bool, engine: BuiltEngine, expected: np.ndarray) -> None:
    embedder = TensorRTEmbedder(engine.path, cuda_graphs=cuda_graphs)
    for batch in (*range(1, 6), *range(5, 0, -1)):  # recorded, then replayed
        assert least_cosine(embedder.embed(CROPS[:batch]), expected[:batch]) >= 0.9999, batch


def test_identical_crops_of_one_batch_give_identical_rows(engine: BuiltEngine) -> None:
    rows = pmm_edge.load(engine.path).embed(np.repeat(CROPS[:1], 4, axis=0))
    np.testing.assert_allclose(rows, rows[:1].repeat(4, axis=0), rtol=1e-5, atol=1e-5 * rows.max())


def test_cuda_graphs_change_nothing(engine: BuiltEngine) -> None:
    with_graphs, without = (TensorRTEmbedder(engine.path, cuda_graphs=on).embed(CROPS) for on in (True, False))
    np.testing.assert_allclose(with_graphs, without, rtol=0, atol=1e-5 * without.max())


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_gpu_time_is_within_the_wall_clock(cuda_graphs: bool, engine: BuiltEngine) -> None:
    embedder = TensorRTEmbedder(engine.path, cuda_graphs=cuda_graphs)
    embedder.gpu_milliseconds(CROPS[:4])
    start = time.perf_counter()
    timed = embedder.gpu_milliseconds(CROPS[:4])
    assert 0 < timed < 1000 * (time.perf_counter() - start)


def test_the_engine_tells_its_types(engine: BuiltEngine) -> None:
    precision = engine.manifest.precision
    assert precision.products.get("FP32", 0) > 0
    assert not {"FP16", "INT8"} & precision.products.keys()
