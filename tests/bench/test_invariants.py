"""Each invariant catches the engine that breaks it, on a small stand-in whose every number is known."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pmm_edge.bench.invariants import batch_sizes, breaches, fault_of, held_in_batches
from pmm_edge.bench.report import Invariant
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
    """A network that is one matrix product, and then whatever `spoil` makes of its rows."""

    def __init__(self, spoil: Callable[[Embeddings], Embeddings] = lambda rows: rows, precision: str = "fp32") -> None:
        super().__init__(replace(SPEC, precision=precision), Path("linear.onnx"), "onnxruntime", "cpu")
        self.spoil, self.sizes = spoil, []

    def embed_prepared(self, images: Pixels) -> Embeddings:
        self.sizes.append(len(images))
        return self.spoil((images.reshape(len(images), -1) / 255 @ WEIGHTS).astype(np.float32))


def broken(embedder: Embedder) -> dict[str, str]:
    found = held_in_batches(embedder, PROBES, PATHS, (16,))
    assert [one.name for one in found] == ["repeatable", "equal rows", "neighbours", "batch size"]
    return {one.name: one.detail for one in found if not one.held}


def test_a_sound_engine_holds_all() -> None:
    embedder = Linear()
    assert broken(embedder) == {}
    assert {1, 2, 3, 7, 8, 16} <= set(embedder.sizes)


def test_a_difference_in_the_last_bits_is_no_breach() -> None:
    assert broken(Linear(lambda rows: rows * np.float32(1 + 1e-6 * len(rows)))) == {}


def test_rows_that_differ_within_a_batch() -> None:
    """What NVIDIA/TensorRT issue 4813 is about."""

    def last_row_is_off(rows: Embeddings) -> Embeddings:
        rows[7:] *= 1.01
        return rows

    found = broken(Linear(last_row_is_off))
    assert "row 7" in found["equal rows"]
    assert "0.0001 is allowed" in found["equal rows"]
    assert "batch 8" in found["batch size"]


def test_rounding_to_8_bits_is_no_excuse_for_rows_of_one_batch() -> None:
    """Other batch sizes may take other kernels; the rows of one batch and the same batch again take the same."""

    def odd_rows_are_off(rows: Embeddings) -> Embeddings:
        rows[1::2] *= 1.01
        return rows

    assert list(broken(Linear(odd_rows_are_off, "int8"))) == ["equal rows"]


def test_a_length_that_is_not_what_the_spec_says() -> None:
    rows = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert all(one.held for one in fault_of(unit, PATHS, normalized=True))
    unit[5] *= 33
    found = [one for one in fault_of(unit, PATHS, normalized=True) if not one.held]
    assert [one.name for one in found] == ["unit length"]
    assert "that of 5.jpg is 33" in found[0].detail
    assert all(one.held for one in fault_of(unit, PATHS))  # of a network that promises no length


def test_a_batch_size_that_is_wrong_is_named() -> None:
    found = broken(Linear(lambda rows: rows * 2 if len(rows) == 7 else rows))
    assert list(found) == ["batch size"]
    assert found["batch size"].startswith("batch 7: differs by ")


def test_a_scale_that_is_taken_from_the_whole_batch() -> None:
    found = broken(Linear(lambda rows: rows / np.abs(rows).max()))
    assert set(found) == {"neighbours", "batch size"}
    assert "white neighbours" in found["neighbours"]


def test_an_engine_that_answers_otherwise_the_next_time() -> None:
    random = np.random.default_rng(0)
    assert "repeatable" in broken(Linear(lambda rows: rows + random.normal(0, 0.1, rows.shape).astype(np.float32)))


def test_nan_that_comes_with_the_batch_alone() -> None:
    found = broken(Linear(lambda rows: rows * np.float32(np.nan if len(rows) > 8 else 1)))
    assert found["batch size"].startswith("batch 16: differs by NaN or infinity")


def test_sizes_are_those_of_the_profile() -> None:
    embedder = Linear()
    assert batch_sizes(embedder, (4,)) == [2, 3, 4, 7, 8]
    embedder.profile = BatchProfile(2, 4, 6)
    assert batch_sizes(embedder, (1, 4, 64)) == [2, 3, 4, 6]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.png" for number in range(8)]
    for path, probe in zip(paths, PROBES, strict=True):
        Image.fromarray(probe).save(path)
    return paths


def faults(embeddings: Embeddings, paths: list[Path]) -> list[str]:
    found: list[Invariant] = fault_of(embeddings, paths)
    assert [one.name for one in found] == ["finite", "distinct"]
    return breaches(found)


def test_embeddings_that_are_useless_by_themselves(files: list[Path]) -> None:
    good = Linear().embed_prepared(PROBES)
    assert faults(good, files) == []
    assert faults(good[:1], files[:1]) == []
    for value, words in ((np.nan, "NaN or infinity for 1 of 8 images"), (0, "all zeros for 1 of 8 images")):
        spoiled = good.copy()
        spoiled[1] = value
        (fault,) = faults(spoiled, files)
        assert fault.endswith(f"{words}, first for {files[1]}")
    assert faults(np.repeat(good[:1], 8, axis=0), files)[0].endswith("one and the same embedding for all 8 images")


def test_two_images_with_one_embedding(files: list[Path]) -> None:
    spoiled = Linear().embed_prepared(PROBES)
    spoiled[5] = spoiled[2]
    assert faults(spoiled, files)[0].endswith(f"one and the same embedding for {files[2]} and {files[5]}")
    files[5].write_bytes(files[2].read_bytes())  # the same image twice may have one embedding
    assert faults(spoiled, files) == []
