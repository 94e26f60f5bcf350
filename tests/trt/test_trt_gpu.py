"""The real thing: `pytest -m gpu` on a machine with a GPU, TensorRT and cuda-python."""

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pmm_edge
from pmm_edge.errors import PmmError
from pmm_edge.export import export
from pmm_edge.export.tensorrt import BuiltEngine, build_engine
from pmm_edge.runtime.cuda import Cuda
from pmm_edge.runtime.manifest import BatchProfile, BuildSettings
from pmm_edge.runtime.tensorrt_backend import TensorRTEmbedder, import_tensorrt

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


@pytest.fixture(scope="module", params=["fp16", "int8"])
def lower(request: pytest.FixtureRequest, onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The tiny network in FP16, and in INT8 for TensorRT: the file and the type that its products must run in."""
    folder = tmp_path_factory.mktemp("lower")
    checkpoint = request.getfixturevalue("tiny_checkpoint")
    noise = write_noise(folder / "noise")
    options = {"calibration_method": "minmax"} if request.param == "int8" else {}
    out = folder / f"{request.param}.onnx"
    exported = export(checkpoint, out=out, precision=request.param, calibration=noise, **options).files[0]
    return exported.path, request.param.upper()


def write_noise(root: Path) -> Path:
    """64 training images to calibrate on, of the kind that CROPS are."""
    random = np.random.default_rng(1)
    for folder, count, first in (("bounding_box_train", 64, 1), ("query", 4, 101), ("bounding_box_test", 8, 101)):
        (root / folder).mkdir(parents=True)
        for number in range(count):
            name = f"{first + number % 4:04d}_c{1 + number // 4 % 3}s1_{number:06d}_00.png"
            Image.fromarray(random.integers(0, 256, (96, 64, 3), dtype=np.uint8)).save(root / folder / name)
    return root


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


def test_a_lower_precision_runs_in_it_and_agrees_with_onnx_runtime(lower: tuple[Path, str], tmp_path: Path) -> None:
    path, kind = lower
    built = build_engine(path, tmp_path / "model.engine", BuildSettings(BatchProfile(1, 2, 4)))
    products = built.manifest.precision.products
    assert products.get(kind, 0) >= 0.9 * sum(products.values()), products
    expected = pmm_edge.load(path, "cpu").embed(CROPS)
    least = {"FP16": 0.999, "INT8": 0.99}[kind]  # INT8 rounds between fused layers in its own way
    assert least_cosine(pmm_edge.load(built.path).embed(CROPS), expected) >= least
