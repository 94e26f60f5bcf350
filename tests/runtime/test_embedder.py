"""Crops of any kind through every back end: equal embeddings, and errors that name the crop."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from color_network import color_network
from PIL import Image

import pmm_edge
from pmm_edge.bench import pipeline
from pmm_edge.bench.parity import gates_for
from pmm_edge.data.loader import Crops
from pmm_edge.errors import DataError, ModelError
from pmm_edge.images import cut_boxes, evenly, prepare_crops, read_crop, read_crops, resize_crop
from pmm_edge.runtime import Embedder, embed_files
from pmm_edge.runtime.certificate import open_model
from pmm_edge.runtime.embedder import CHUNK, parse_device
from pmm_edge.runtime.onnx_backend import OnnxEmbedder


@pytest.fixture(scope="module")
def color(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    return pmm_edge.load(color_network(tmp_path_factory.mktemp("color") / "model.onnx"), "cpu")


def crops(*sizes: tuple[int, int]) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in sizes]


def test_back_ends_agree_on_crops_of_any_size(onnx: Embedder, torch: Embedder) -> None:
    mixed = crops((96, 64), (200, 80), (31, 17), (1, 1))
    first, second = onnx.embed(mixed), torch.embed(mixed)
    assert first.shape == (4, 1536)
    assert first.dtype == second.dtype == np.float32
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-5 * second.max())


def test_float16_sums_are_those_of_onnxruntime_on_arm(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pmm_edge.runtime.embedder.sums_in_float16", lambda: True)
    embedder = pmm_edge.load(tiny_onnx, "cpu")
    for precision, device, expected in (("fp16", "cpu", True), ("fp32", "cpu", False), ("fp16", "cuda:0", False)):
        embedder.spec, embedder.device = replace(embedder.spec, precision=precision), device
        assert embedder.float16_sums is expected
        monkeypatch.setattr(pipeline, "load", lambda *_, **__: embedder)
        figures = pipeline._load(tiny_onnx, None, {}).figures
        assert (figures.float16_sums, figures.gates) == (expected, gates_for(precision, {}, expected))


def test_lists_arrays_and_views_give_the_same(color: Embedder) -> None:
    array = np.stack(crops((50, 40), (50, 40)))
    expected = color.embed(list(array))
    np.testing.assert_array_equal(color.embed(array), expected)
    frame = np.zeros((100, 100, 3), np.uint8)
    frame[20:70, 30:70] = array[1]
    np.testing.assert_allclose(color.embed([frame[20:70, 30:70]])[0], expected[1], rtol=1e-6)
    bgr = array[..., ::-1].copy()
    np.testing.assert_array_equal(color.embed(bgr[..., ::-1]), expected)
    assert color.embed([]).shape == color.embed(array[:0]).shape == (0, 8)
    np.testing.assert_allclose(color.embed([array[0]] * (CHUNK + 2)), np.repeat(expected[:1], CHUNK + 2, axis=0))


@pytest.mark.parametrize("engine", ["onnx", "torch", "color"])
def test_arrays_in_any_memory_layout(engine: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    embedder: Embedder = request.getfixturevalue(engine)
    size = embedder.spec.input
    array = np.stack(crops(*[(size.height, size.width)] * 3))
    expected = embedder.embed(array)
    mapped = np.memmap(tmp_path / "crops", np.uint8, "w+", shape=array.shape)
    mapped[:] = array
    frozen = array.copy()
    frozen.flags.writeable = False
    backwards = array[::-1, :, ::-1, ::-1].copy()[::-1, :, ::-1, ::-1]  # negative strides
    for same in (backwards, np.asfortranarray(array), frozen, mapped, np.repeat(array, 2, axis=2)[:, :, ::2]):
        np.testing.assert_array_equal(embedder.embed(same), expected)
        np.testing.assert_array_equal(embedder.embed(list(same)), expected)
        np.testing.assert_array_equal(embedder.embed_prepared(same), expected)


@pytest.mark.parametrize(
    "crop",
    [
        np.zeros((0, 20, 3), np.uint8),
        np.zeros((20, 10), np.uint8),
        np.zeros((20, 10, 1), np.uint8),
        np.zeros((20, 10, 4), np.uint8),
        np.zeros((20, 10, 3), np.float32),
        np.zeros((3, 20, 10), np.uint8),
        Image.new("RGB", (0, 20)),
        3.5,
        None,
    ],
)
def test_invalid_crops_are_named(crop: object, color: Embedder) -> None:
    with pytest.raises(DataError, match="crop 1"):
        color.embed([*crops((20, 10)), crop])
    with pytest.raises(DataError, match="color order"):
        color.embed([], order="RGB")
    for one in (crops((20, 10))[0], "a.jpg", Path("a.jpg"), Image.new("RGB", (10, 20))):
        with pytest.raises(DataError) as caught:
            color.embed(one)
        assert "[crop]" in caught.value.remedy


def test_paths_images_and_arrays_of_either_order_give_the_same(color: Embedder, tmp_path: Path) -> None:
    size = color.spec.input.height, color.spec.input.width
    arrays = crops((50, 40), (31, 17), size)
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    exif = Image.Exif()
    exif[0x0112] = 6
    for path, array in zip(paths, arrays, strict=True):
        Image.fromarray(np.rot90(array)).save(path, exif=exif)  # turned upright when it is read
    expected = np.concatenate([color.embed([array]) for array in arrays])
    bgr = [array[..., ::-1] for array in arrays]
    opened = [Image.open(path) for path in paths]
    for same in (arrays, paths, [*map(str, paths)], opened, [paths[0], arrays[1], opened[2]]):
        np.testing.assert_array_equal(color.embed(same), expected)
    for same in (bgr, [np.ascontiguousarray(array) for array in bgr], [bgr[0], opened[1], str(paths[2])]):
        np.testing.assert_array_equal(color.embed(same, order="bgr"), expected)
    np.testing.assert_array_equal(color.embed(bgr[2][None], order="bgr"), expected[2:])
    assert not np.allclose(color.embed(bgr), expected)
    paths[1].write_bytes(paths[1].read_bytes()[:-500])
    for bad in (paths[1], str(tmp_path / "missing.jpg")):
        with pytest.raises(DataError, match=Path(bad).name):
            color.embed([arrays[0], bad])
    with pytest.raises(DataError, match=r"crop 1 .*1\.png"):
        color.embed([arrays[0], Image.open(paths[1])])


def test_boxes_are_the_slices_of_a_frame(color: Embedder) -> None:
    random, (frame,) = np.random.default_rng(1), crops((90, 160))
    corners = np.sort(random.uniform(-30, 190, (40, 2, 2)), axis=1).reshape(40, 4)
    slices, inside = [], []
    for box in corners:
        x1, y1, x2, y2 = (int(np.clip(round(value), 0, 160 - 70 * (k % 2))) for k, value in enumerate(box))
        if x2 > x1 and y2 > y1:
            inside.append(box)
            slices.append(frame[y1:y2, x1:x2])
    assert 20 < len(slices) < 40
    expected = color.embed(slices)
    assert expected.dtype == np.float32 and expected.shape == (len(slices), 8)
    for boxes in (np.array(inside), np.array(inside, np.float32), [box.tolist() for box in inside]):
        np.testing.assert_array_equal(color.embed_boxes(frame, boxes), expected)
    np.testing.assert_array_equal(color.embed_boxes(frame, np.rint(inside).astype(int)), expected)
    np.testing.assert_array_equal(color.embed_boxes(frame[..., ::-1], inside, order="bgr"), expected)
    assert all(np.shares_memory(cut, frame) for cut in cut_boxes(frame, inside))
    for none in ([], np.empty((0, 4)), np.empty((0, 4), np.int64)):
        assert color.embed_boxes(frame, none).shape == (0, 8)


def test_boxes_without_pixels_are_named_by_index(color: Embedder) -> None:
    (frame,) = crops((90, 160))
    good = [10, 10, 30, 50]
    bad = {
        1: [30, 10, 30, 50],
        2: [30, 50, 10, 10],
        4: [np.nan, 0, 9, 9],
        5: [0, 0, np.inf, 9],
        6: [160, 0, 170, 9],
        7: [-9, -9, 0, 9],
        8: [5, 90, 9, 1e30],
        9: [5.1, 5, 5.4, 9],
    }
    with pytest.raises(DataError) as caught:
        color.embed_boxes(frame, [bad.get(index, good) for index in range(11)])
    assert "boxes 1, 2, 4, 5, 6, 7, 8, 9 of 11" in caught.value.problem
    for boxes in ([good[:3]], good, [[good]], [good, good[:2]], [["a"] * 4], np.zeros((2, 6))):
        with pytest.raises(DataError, match="boxes"):
            color.embed_boxes(frame, boxes)
    for other in (frame[..., 0], frame.astype(np.float32), frame[:0], frame[None], Image.fromarray(frame), "a.jpg"):
        with pytest.raises(DataError, match="frame"):
            color.embed_boxes(other, [good])


def test_embed_normalized_is_embed_after_preprocessing(torch: Embedder, color: Embedder) -> None:
    (crop,), size = crops((96, 64)), torch.spec.input
    normalized = ((crop / 255 - size.mean) / size.std).transpose(2, 0, 1)[None].astype(np.float32)
    np.testing.assert_allclose(torch.embed_normalized(normalized), torch.embed([crop]), rtol=1e-4, atol=1e-3)
    assert color.embed_normalized(normalized) is None


def test_the_edge_install_needs_neither_torch_nor_onnx(color: Embedder) -> None:
    script = f"""
import sys
for absent in ("torch", "torchvision", "onnx", "onnxscript", "safetensors"):
    sys.modules[absent] = None
import numpy as np, pmm_edge
from pmm_edge.errors import ModelError
print([name for name in ("torch", "onnxruntime") if sys.modules.get(name)])
print(pmm_edge.load({str(color.path)!r}).embed(np.zeros((2, 30, 20, 3), np.uint8)).shape)
try:
    pmm_edge.load("best.pt")
except ModelError as error:
    print(error)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    engines, shape, message = ended.stdout.splitlines()
    assert (engines, shape) == ("[]", "(2, 8)")
    assert "torch" in message
    assert ".[train]" in message


@pytest.mark.parametrize(("batch", "count", "runs"), [(5, 12, [5, 5, 5]), (80, 80, [80])])
def test_chunks_are_whole_batches(
    batch: int, count: int, runs: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder = OnnxEmbedder(open_model(color_network(tmp_path / "model.onnx", batch=batch)), "cpu")
    run, ran = embedder._run, []
    monkeypatch.setattr(embedder, "_run", lambda images: (ran.append(len(images)), run(images))[1])
    small = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    paths = [tmp_path / f"{number}.png" for number in range(count)]
    for path, crop in zip(paths, small, strict=True):
        Image.fromarray(crop).save(path)
    found = embedder.embed(list(small))
    np.testing.assert_allclose(found, np.arange(count)[:, None] * found[1], rtol=1e-5)
    np.testing.assert_array_equal(embed_files(embedder, paths).embeddings, found)
    assert ran == 2 * runs


def test_training_and_runtime_read_the_same_pixels(color: Embedder, tiny_dataset: Path, tmp_path: Path) -> None:
    paths = sorted((tiny_dataset / "query").iterdir())[::-1]
    trained_on = Crops(paths, 96, 64).batch(np.arange(len(paths)))
    decoded = [np.asarray(Image.open(path)) for path in paths]
    assert decoded[0].shape == (128, 64, 3)
    np.testing.assert_array_equal(prepare_crops(decoded, 96, 64), trained_on)
    np.testing.assert_array_equal(read_crops(paths, 96, 64), trained_on)
    np.testing.assert_array_equal(embed_files(color, paths).embeddings, color.embed_prepared(trained_on))
    with pytest.raises(DataError, match=r"cannot read image .*a\.jpg"):
        read_crops([*paths, tmp_path / "a.jpg", tmp_path / "b.jpg"], 24, 12)


def test_a_few_are_spread_over_all() -> None:
    assert evenly(80, 8) == [0, 10, 20, 30, 40, 50, 60, 70]
    assert (evenly(5, 3), evenly(3, 8), evenly(0, 8)) == ([0, 1, 3], [0, 1, 2], [])


def test_sixteen_bits_become_eight(tmp_path: Path) -> None:
    values = np.linspace(2000, 60000, 96 * 64).astype(np.uint16).reshape(96, 64)
    Image.fromarray(values).save(tmp_path / "deep.png")
    crop = read_crop(tmp_path / "deep.png", 96, 64)
    np.testing.assert_array_equal(crop, np.rint(values / 257)[..., None].repeat(3, axis=2))
    for deep in (values.astype(">u2"), values.astype(np.int32)):
        np.testing.assert_array_equal(resize_crop(Image.fromarray(deep), 96, 64), crop)


def test_parse_device() -> None:
    devices = {"cpu": ("cpu", 0), "cuda": ("cuda", 0), "cuda:1": ("cuda", 1), "2": ("cuda", 2), 0: ("cuda", 0)}
    assert {device: parse_device(device) for device in devices} == devices
    for device in ("tpu", "cuda:x", "cuda:", "cpu:1", "-1", "", "tensorrt"):
        with pytest.raises(ModelError):
            parse_device(device)


@pytest.mark.parametrize(("usable", "threads"), [(8.0, None), (6.0, 6), (3.5, 3), (0.5, 1)])
def test_onnx_runtime_uses_only_the_usable_cores(
    usable: float, threads: int | None, color: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr("pmm_edge.machine.usable_cores", lambda: usable)
    assert pmm_edge.load(color.path, "cpu").threads == threads
