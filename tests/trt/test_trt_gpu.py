"""Real engines: `pytest -m gpu` on a machine with a GPU, TensorRT and cuda-python."""

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pmm_edge
from pmm_edge.errors import PmmError
from pmm_edge.export.exporter import export
from pmm_edge.export.tensorrt import BuiltEngine, build_engine
from pmm_edge.retrieval.distances import cosines
from pmm_edge.runtime.certificate import open_model
from pmm_edge.runtime.cuda import Cuda
from pmm_edge.runtime.manifest import BatchProfile, BuildSettings
from pmm_edge.runtime.tensorrt_backend import TensorRTEmbedder, import_tensorrt

pytestmark = pytest.mark.gpu
CROPS = np.random.default_rng(0).integers(0, 256, (11, 96, 64, 3), dtype=np.uint8)
SETTINGS = BuildSettings(BatchProfile(1, 2, 4))


@pytest.fixture(scope="module")
def onnx(request: pytest.FixtureRequest) -> Path:
    """The tiny network, exported only if there is a GPU to run it."""
    try:
        import_tensorrt()
        Cuda().release()
    except PmmError as error:
        pytest.skip(str(error))
    return request.getfixturevalue("tiny_onnx")


@pytest.fixture(scope="module")
def engine(onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> BuiltEngine:
    return build_engine(onnx, tmp_path_factory.mktemp("engine") / "model.engine", SETTINGS)


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_fp32_agrees_with_onnx_runtime_at_every_batch_size(cuda_graphs: bool, engine: BuiltEngine, onnx: Path) -> None:
    products = engine.manifest.precision.products
    assert products.get("FP32", 0) > 0
    assert not {"FP16", "INT8"} & products.keys()
    embedder = TensorRTEmbedder(open_model(engine.path), cuda_graphs=cuda_graphs)
    expected = pmm_edge.load(onnx, "cpu").embed(CROPS)
    for batch in (*range(1, 6), *range(5, 0, -1), 11):  # captured, then replayed
        assert cosines(expected[:batch], embedder.embed(CROPS[:batch])).min() >= 0.9999, batch
    embedder.gpu_milliseconds(CROPS[:4])
    start = time.perf_counter()
    timed = embedder.gpu_milliseconds(CROPS[:4])
    assert 0 < timed < 1000 * (time.perf_counter() - start)


def test_identical_crops_of_a_batch_give_identical_rows(engine: BuiltEngine) -> None:
    rows = pmm_edge.load(engine.path).embed(np.repeat(CROPS[:1], 4, axis=0))
    np.testing.assert_allclose(rows, rows[:1].repeat(4, axis=0), rtol=1e-5, atol=1e-5 * rows.max())


@pytest.mark.parametrize(("precision", "least"), [("fp16", 0.999), ("int8", 0.99)])
def test_a_lower_precision_is_used_and_agrees_with_onnx_runtime(
    precision: str, least: float, onnx: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    calibration = {"calibration": write_noise(tmp_path / "noise"), "calibration_method": "minmax"}
    options = {"precision": precision} | (calibration if precision == "int8" else {})
    path = export(tiny_checkpoint, out=tmp_path / "model.onnx", **options).files[0].path
    built = build_engine(path, tmp_path / "model.engine", SETTINGS)
    products = built.manifest.precision.products
    assert products.get(precision.upper(), 0) >= 0.9 * sum(products.values()), products
    expected = pmm_edge.load(path, "cpu").embed(CROPS)
    assert cosines(expected, pmm_edge.load(built.path).embed(CROPS)).min() >= least


def write_noise(root: Path) -> Path:
    """Write a data set with 64 training images like CROPS, for calibration."""
    for folder, count, first in (("bounding_box_train", 64, 1), ("query", 4, 101), ("bounding_box_test", 8, 101)):
        (root / folder).mkdir(parents=True)
        for number, crop in enumerate(np.random.default_rng(1).integers(0, 256, (count, 96, 64, 3), dtype=np.uint8)):
            name = f"{first + number % 4:04d}_c{1 + number // 4 % 3}s1_{number:06d}_00.png"
            Image.fromarray(crop).save(root / folder / name)
    return root
