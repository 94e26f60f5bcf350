"""Each invariant catches the engine that breaks it, on a small stand-in whose every number is known."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import broken
import numpy as np
import pytest
from PIL import Image

from pmm_edge.bench.invariants import check_batches, check_embeddings, precision_failure, sizes_to_check
from pmm_edge.bench.report import FailureKind, Invariant, InvariantName
from pmm_edge.images import Pixels
from pmm_edge.runtime import Embedder
from pmm_edge.runtime.embedder import Embeddings
from pmm_edge.runtime.manifest import BatchProfile
from pmm_edge.spec import InputSpec, ModelSpec

SPEC = ModelSpec("baseline", "resnet18", 2, InputSpec(4, 4), 4, {"I": (0, 4)})
PROBES = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), dtype=np.uint8)
PATHS = [Path(f"{number}.jpg") for number in range(8)]
WEIGHTS = np.random.default_rng(1).normal(size=(48, 4))


class Linear(Embedder):
    """A network of one matrix product, whose output `spoil` changes."""

    def __init__(self, spoil: Callable[[Embeddings], Embeddings] = lambda rows: rows, precision: str = "fp32") -> None:
        super().__init__(replace(SPEC, precision=precision), Path("linear.onnx"), "onnxruntime", "cpu")
        self.spoil, self.sizes = spoil, []

    def embed_prepared(self, images: Pixels) -> Embeddings:
        self.sizes.append(len(images))
        return self.spoil((images.reshape(len(images), -1) / 255 @ WEIGHTS).astype(np.float32))


def broken_invariants(embedder: Embedder) -> dict[InvariantName, Invariant]:
    found = check_batches(embedder, PROBES, PATHS, (16,))
    assert [one.name.value for one in found] == ["repeatable", "equal rows", "neighbors", "batch size"]
    return {one.name: one for one in found if not one.held}


def last_rows_are_off(rows: Embeddings) -> Embeddings:
    rows[7:] *= 1.01
    return rows


def odd_rows_are_off(rows: Embeddings) -> Embeddings:
    rows[1::2] *= 1.01
    return rows


@pytest.mark.parametrize(
    ("spoil", "precision", "expected"),
    [
        pytest.param(lambda rows: rows, "fp32", set(), id="correct"),
        pytest.param(lambda rows: rows * np.float32(1 + 1e-6 * len(rows)), "fp32", set(), id="rounding"),
        pytest.param(last_rows_are_off, "fp32", {"equal rows", "batch size"}, id="rows"),
        pytest.param(odd_rows_are_off, "int8", {"equal rows"}, id="rows of one batch in INT8"),
        pytest.param(lambda rows: rows * 2 if len(rows) == 7 else rows, "fp32", {"batch size"}, id="one size"),
        pytest.param(lambda rows: rows / np.abs(rows).max(), "fp32", {"neighbors", "batch size"}, id="batch scale"),
        pytest.param(
            lambda rows: rows * np.float32(np.nan if len(rows) > 8 else 1), "fp32", {"batch size"}, id="NaN in batches"
        ),
    ],
)
def test_engines(spoil: Callable[[Embeddings], Embeddings], precision: str, expected: set[str]) -> None:
    embedder = Linear(spoil, precision)
    assert {name.value for name in broken_invariants(embedder)} == expected
    assert {1, 2, 3, 7, 8, 16} <= set(embedder.sizes)


def test_what_was_found_is_in_the_fields() -> None:
    noise = np.random.default_rng(0)
    found = broken_invariants(Linear(lambda rows: rows + noise.normal(0, 0.1, rows.shape).astype(np.float32)))
    assert InvariantName.REPEATABLE in found
    rows = broken_invariants(Linear(last_rows_are_off))[InvariantName.EQUAL_ROWS]
    assert (rows.row, rows.batch, rows.tolerance) == (7, 16, 1e-4)  # NVIDIA/TensorRT issue 4813
    assert rows.value == pytest.approx(0.01, rel=0.1)
    size = broken_invariants(Linear(lambda rows: rows * 2 if len(rows) == 7 else rows))[InvariantName.BATCH_SIZE]
    assert (size.batch, size.value) == (7, pytest.approx(1))
    near = broken_invariants(Linear(lambda rows: rows / np.abs(rows).max()))[InvariantName.NEIGHBORS]
    assert near.neighbors == "white images"
    nan = broken_invariants(Linear(lambda rows: rows * np.float32(np.nan if len(rows) > 8 else 1)))
    assert nan[InvariantName.BATCH_SIZE].value is None
    assert nan[InvariantName.BATCH_SIZE].batch == 16


def test_sizes_are_those_of_the_profile() -> None:
    embedder = Linear()
    assert sizes_to_check(embedder, (4,)) == [2, 3, 4, 7, 8]
    embedder.profile = BatchProfile(2, 4, 6)
    assert sizes_to_check(embedder, (1, 4, 64)) == [2, 3, 4, 6]


# Embeddings of all images


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.png" for number in range(8)]
    for path, probe in zip(paths, PROBES, strict=True):
        Image.fromarray(probe).save(path)
    return paths


def faults(embeddings: Embeddings, paths: list[Path], normalized: bool = False) -> list[Invariant]:
    return [one for one in check_embeddings(embeddings, paths, normalized) if not one.held]


def test_embeddings_that_are_not_finite_or_zero(files: list[Path]) -> None:
    good = Linear().embed_prepared(PROBES)
    assert faults(good, files) == []
    assert faults(good[:1], files[:1]) == []
    for value, name in ((np.nan, InvariantName.FINITE), (0, InvariantName.DISTINCT)):
        spoiled = good.copy()
        spoiled[1] = value
        assert faults(spoiled, files) == [Invariant(name, False, image=str(files[1]), images=1)]


def test_images_with_the_same_embedding(files: list[Path]) -> None:
    good = Linear().embed_prepared(PROBES)
    (same,) = faults(np.repeat(good[:1], 8, axis=0), files)
    assert (same.name, same.images) == (InvariantName.DISTINCT, 8)
    good[5] = good[2]
    (pair,) = faults(good, files)
    assert (pair.image, pair.other_image, pair.images) == (str(files[2]), str(files[5]), 2)
    files[5].write_bytes(files[2].read_bytes())  # the same image twice
    assert faults(good, files) == []


def test_unit_length() -> None:
    rows = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert faults(unit, PATHS, normalized=True) == []
    unit[5] *= 33
    (fault,) = faults(unit, PATHS, normalized=True)
    assert (fault.name, fault.value, fault.image) == (InvariantName.UNIT_LENGTH, pytest.approx(33), "5.jpg")
    assert faults(unit, PATHS) == []


# Declared precision


@pytest.fixture(scope="module")
def graphs(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same network in each precision."""
    folder = tmp_path_factory.mktemp("precisions")
    noise = np.random.default_rng(0).integers(0, 256, (4, 96, 64, 3), dtype=np.uint8)
    return {
        "fp32": tiny_onnx,
        "fp16": broken.fp16(tiny_onnx, folder / "fp16.onnx"),
        "int8": broken.int8(tiny_onnx, folder / "int8.onnx", "tensorrt", noise),
    }


def test_the_declared_precision_is_that_of_the_weights(graphs: dict[str, Path], tiny_checkpoint: Path) -> None:
    for own, path in graphs.items():
        for declared in graphs:
            failure = precision_failure(path, declared)
            assert (failure is None) == (own == declared)
            if failure:
                assert (failure.kind, failure.value, failure.detail) == (FailureKind.PRECISION, 0, own)
    assert precision_failure(tiny_checkpoint, "int8") is None  # checkpoints are FP32 and are not checked
