"""Crops of any kind through every back end: the same people, the same numbers, and clear refusals."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pmm_edge.data.loader import Crops
from pmm_edge.errors import DataError
from pmm_edge.export import Graph, export_onnx
from pmm_edge.images import prepare_crops, read_crop, resize_crop
from pmm_edge.runtime import Embedder, embed_files
from pmm_edge.runtime.embedder import CHUNK
from pmm_edge.runtime.onnx_backend import OnnxEmbedder


def crops(*sizes: tuple[int, int]) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in sizes]


def test_embedders_say_what_they_are(onnx: Embedder, torch: Embedder, tiny_onnx: Path) -> None:
    assert (onnx.backend, onnx.device, onnx.path) == ("onnxruntime", "cpu", tiny_onnx)
    assert (torch.backend, torch.device) == ("torch", "cpu")
    assert (onnx.spec.input.form, onnx.spec.input.height, onnx.spec.embedding_size) == ("uint8", 96, 1536)


def test_back_ends_agree_on_crops_of_any_size(onnx: Embedder, torch: Embedder) -> None:
    mixed = crops((96, 64), (200, 80), (31, 17), (1, 1))
    first, second = onnx.embed(mixed), torch.embed(mixed)
    assert first.shape == (4, 1536)
    assert first.dtype == second.dtype == np.float32
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-5 * second.max())


def test_a_list_one_array_and_views_are_the_same(onnx: Embedder) -> None:
    array = np.stack(crops((50, 40), (50, 40)))
    expected = onnx.embed(list(array))
    np.testing.assert_array_equal(onnx.embed(array), expected)
    frame = np.zeros((100, 100, 3), np.uint8)
    frame[20:70, 30:70] = array[1]
    np.testing.assert_allclose(onnx.embed([frame[20:70, 30:70]])[0], expected[1], rtol=1e-4, atol=1e-4)
    bgr = array[..., ::-1].copy()
    np.testing.assert_array_equal(onnx.embed(bgr[..., ::-1]), expected)


def test_no_crops_and_more_than_go_through_at_once(onnx: Embedder) -> None:
    assert onnx.embed([]).shape == (0, 1536)
    assert onnx.embed(np.empty((0, 96, 64, 3), np.uint8)).shape == (0, 1536)
    one = crops((96, 64))
    many = onnx.embed(one * (CHUNK + 2))
    assert many.shape == (CHUNK + 2, 1536)
    np.testing.assert_allclose(many, np.repeat(onnx.embed(one), CHUNK + 2, axis=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("crop", "message"),
    [
        (np.zeros((0, 20, 3), np.uint8), r"crop 1 has no pixels.*Leave out boxes"),
        (np.zeros((20, 10), np.uint8), r"crop 1 is grey.*Repeat"),
        (np.zeros((20, 10, 1), np.uint8), r"crop 1 is grey"),
        (np.zeros((20, 10, 4), np.uint8), r"crop 1 has an alpha channel.*:3"),
        (np.zeros((20, 10, 3), np.float32), r"crop 1 holds float32.*uint8 RGB values of 0 to 255"),
        (np.zeros((3, 20, 10), np.uint8), r"crop 1 has shape \(3, 20, 10\)"),
        (Image.new("RGB", (10, 20)), r"crop 1 is a Image, no array"),
    ],
)
def test_crops_that_cannot_be_embedded(crop: object, message: str, onnx: Embedder) -> None:
    with pytest.raises(DataError, match=message):
        onnx.embed([*crops((20, 10)), crop])


def test_one_bare_crop_is_no_list(onnx: Embedder) -> None:
    with pytest.raises(DataError, match=r"Pass \[crop\]"):
        onnx.embed(crops((20, 10))[0])


def test_an_edge_box_needs_neither_torch_nor_onnx(tiny_onnx: Path) -> None:
    script = f"""
import sys
for absent in ("torch", "torchvision", "onnx", "onnxscript", "safetensors"):
    sys.modules[absent] = None
import numpy as np, pmm_edge
from pmm_edge.errors import ModelError
print(pmm_edge.load({str(tiny_onnx)!r}).embed(np.zeros((2, 30, 20, 3), np.uint8)).shape)
try:
    pmm_edge.load("best.pt")
except ModelError as error:
    print(error)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[0] == "(2, 1536)"
    assert "best.pt needs torch, which is not installed. pip install 'pmm-edge[train]'" in ended.stdout


def test_importing_the_runtime_loads_no_engine() -> None:
    script = "import sys, pmm_edge.runtime; print([name for name in ('torch', 'onnxruntime') if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


@pytest.mark.parametrize(("batch", "count", "runs"), [(5, 12, [5, 5, 5]), (80, 80, [80])])
def test_chunks_are_the_batches_that_the_model_takes(
    batch: int, count: int, runs: list[int], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = export_onnx(tiny_checkpoint, tmp_path / "model.onnx", graph=Graph(static_batch=batch))
    embedder = OnnxEmbedder(exported.path, "cpu")
    ran = []

    def run(fed: np.ndarray) -> np.ndarray:
        ran.append(len(fed))
        return np.repeat(fed[:, 0, 0, :1].astype(np.float32), 1536, axis=1)

    monkeypatch.setattr(embedder, "_run", run)
    small = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    expected = small[:, 0, 0, :1].repeat(1536, axis=1)
    np.testing.assert_array_equal(embedder.embed(list(small)), expected)
    assert ran == runs  # at 64 crops a time, 80 would be 160
    paths = [tmp_path / f"{number}.png" for number in range(count)]
    for path, crop in zip(paths, small, strict=True):
        Image.fromarray(crop).save(path)
    np.testing.assert_array_equal(embed_files(embedder, paths).embeddings, expected)
    assert ran == 2 * runs


def test_training_and_runtime_read_the_same_pixels(onnx: Embedder, tiny_dataset: Path) -> None:
    paths = sorted((tiny_dataset / "query").iterdir())
    trained_on = Crops(paths, 96, 64).batch(np.arange(len(paths)))
    decoded = [np.asarray(Image.open(path)) for path in paths]
    assert decoded[0].shape == (128, 64, 3)
    np.testing.assert_array_equal(prepare_crops(decoded, 96, 64), trained_on)
    np.testing.assert_array_equal(embed_files(onnx, paths).embeddings, onnx.embed_prepared(trained_on))


def test_sixteen_bits_become_eight(tmp_path: Path) -> None:
    values = np.linspace(2000, 60000, 96 * 64).astype(np.uint16).reshape(96, 64)
    Image.fromarray(values).save(tmp_path / "deep.png")
    with Image.open(tmp_path / "deep.png") as image:
        assert image.mode.startswith("I")
    crop = read_crop(tmp_path / "deep.png", 96, 64)
    np.testing.assert_array_equal(crop, np.rint(values / 257)[..., None].repeat(3, axis=2))
    assert (crop.min(), crop.max()) == (8, 233)
    for deep in (values.astype(">u2"), values.astype(np.int32)):
        np.testing.assert_array_equal(resize_crop(Image.fromarray(deep), 96, 64), crop)
