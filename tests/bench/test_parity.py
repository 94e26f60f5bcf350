"""Each invariant catches the engine that breaks it, differences are measured, gates applied, intervals cover chance."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import broken
import numpy as np
import pytest

from pmm_edge.bench.parity import (
    check_batches,
    check_embeddings,
    differences,
    failed_gates,
    gates_for,
    paired_changes,
    precision_failure,
    retrieval_change,
)
from pmm_edge.bench.report import Change, FailureKind, Gates, Invariant, InvariantName, RetrievalChange
from pmm_edge.errors import PmmError
from pmm_edge.images import Pixels
from pmm_edge.retrieval import evaluate_distances
from pmm_edge.runtime import Embedder
from pmm_edge.runtime.embedder import Embeddings
from pmm_edge.runtime.manifest import BatchProfile
from pmm_edge.spec import InputSpec, ModelSpec

SPEC = ModelSpec("baseline", "resnet18", 2, InputSpec(4, 4), 4, {"I": (0, 4)})
PROBES = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), dtype=np.uint8)
PATHS = [Path(f"{number}.jpg") for number in range(8)]
WEIGHTS = np.random.default_rng(1).normal(size=(48, 4))
Spoil = Callable[[Embeddings], Embeddings]


class Linear(Embedder):
    """A network of one matrix product, whose output `spoil` changes."""

    def __init__(self, spoil: Spoil = lambda rows: rows, precision: str = "fp32") -> None:
        super().__init__(replace(SPEC, precision=precision), Path("linear.onnx"), "onnxruntime", "cpu")
        self.spoil, self.sizes = spoil, set()

    def embed_prepared(self, images: Pixels) -> Embeddings:
        self.sizes.add(len(images))
        return self.spoil((images.reshape(len(images), -1) / 255 @ WEIGHTS).astype(np.float32))


def broken_invariants(embedder: Embedder) -> dict[str, Invariant]:
    found = check_batches(embedder, PROBES, PATHS, (16,))
    assert [one.name.value for one in found] == ["repeatable", "equal rows", "neighbors", "batch size"]
    return {one.name.value: one for one in found if not one.held}


SPOILED: dict[str, Spoil] = {
    "nothing": lambda rows: rows,
    "rounding": lambda rows: rows * np.float32(1 + 1e-6 * len(rows)),
    "last rows": lambda rows: np.concatenate([rows[:7], 1.01 * rows[7:]]),
    "odd rows": lambda rows: np.where(np.arange(len(rows))[:, None] % 2, 1.01 * rows, rows),
    "batches of 7": lambda rows: 2 * rows if len(rows) == 7 else rows,
    "scaled by batch": lambda rows: rows / np.abs(rows).max(),
    "NaN in large batches": lambda rows: rows * np.float32(np.nan if len(rows) > 8 else 1),
}


@pytest.mark.parametrize(
    ("spoiled", "precision", "expected"),
    [
        ("nothing", "fp32", set()),
        ("rounding", "fp32", set()),
        ("last rows", "fp32", {"equal rows", "batch size"}),
        ("odd rows", "int8", {"equal rows"}),
        ("batches of 7", "fp32", {"batch size"}),
        ("scaled by batch", "fp32", {"neighbors", "batch size"}),
        ("NaN in large batches", "fp32", {"batch size"}),
    ],
)
def test_engines(spoiled: str, precision: str, expected: set[str]) -> None:
    embedder = Linear(SPOILED[spoiled], precision)
    assert broken_invariants(embedder).keys() == expected
    assert embedder.sizes == {1, 2, 3, 4, 7, 8, 16}
    embedder.profile, embedder.sizes = BatchProfile(2, 5, 6), set()
    check_batches(embedder, PROBES[:2], PATHS[:2], (1, 4, 64))
    assert embedder.sizes == {1, 2, 3, 4, 5, 6}  # 1 and 4 for comparison


def test_what_was_found_is_in_the_fields() -> None:
    noise = np.random.default_rng(0)
    assert "repeatable" in broken_invariants(Linear(lambda rows: rows + noise.normal(0, 0.1, rows.shape)))
    found = {name: broken_invariants(Linear(spoil)) for name, spoil in SPOILED.items()}
    rows, size = found["last rows"]["equal rows"], found["batches of 7"]["batch size"]
    assert (rows.row, rows.batch, rows.tolerance) == (7, 16, 1e-4)  # NVIDIA/TensorRT issue 4813
    assert (rows.value, size.value) == (pytest.approx(0.01, rel=0.1), pytest.approx(1))
    assert (size.batch, found["scaled by batch"]["neighbors"].neighbors) == (7, "white images")
    nan = found["NaN in large batches"]["batch size"]
    assert (nan.value, nan.batch) == (None, 16)


def faults(embeddings: Embeddings, crops: Pixels = PROBES, normalized: bool = False) -> list[Invariant]:
    count = len(embeddings)
    found = check_embeddings(embeddings, PATHS[:count], range(count), crops[:count], normalized)
    return [one for one in found if not one.held]


def test_embeddings_that_are_not_finite_or_zero() -> None:
    good = Linear().embed_prepared(PROBES)
    assert faults(good) == faults(good[:1]) == []
    for value, name in ((np.nan, InvariantName.FINITE), (0, InvariantName.DISTINCT)):
        spoiled = good.copy()
        spoiled[1] = value
        assert faults(spoiled) == [Invariant(name, False, image="1.jpg", images=1)]


def test_images_with_the_same_embedding() -> None:
    good = Linear().embed_prepared(PROBES)
    (same,) = faults(np.repeat(good[:1], 8, axis=0))
    assert (same.name, same.images) == (InvariantName.DISTINCT, 8)
    good[5] = good[2]
    (pair,) = faults(good)
    assert (pair.image, pair.other_image, pair.images) == ("2.jpg", "5.jpg", 2)
    for levels in (0, 1):  # the same image twice, in two files
        crops = PROBES[[0, 1, 2, 3, 4, 2, 6, 7]].clip(0, 254)
        crops[5] += np.uint8(levels)
        assert faults(good, crops) == []
    assert faults(np.repeat(good[:1], 8, axis=0), np.zeros_like(PROBES)) == []


def test_unit_length() -> None:
    rows = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert faults(unit, normalized=True) == []
    unit[5] *= 33
    (fault,) = faults(unit, normalized=True)
    assert (fault.name, fault.value, fault.image) == (InvariantName.UNIT_LENGTH, pytest.approx(33), "5.jpg")
    assert faults(unit) == []


def test_the_declared_precision_is_that_of_the_weights(tiny_onnx: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 96, 64, 3), dtype=np.uint8)
    graphs = {
        "fp32": tiny_onnx,
        "fp16": broken.fp16(tiny_onnx, tmp_path / "fp16.onnx"),
        "int8": broken.int8(tiny_onnx, tmp_path / "int8.onnx", "tensorrt", noise),
    }
    for own, path in graphs.items():
        for declared in graphs:
            failure = precision_failure(path, declared)
            assert (failure is None) == (own == declared)
            if failure:
                assert (failure.kind, failure.detail) == (FailureKind.PRECISION, own)
                assert failure.value is not None and failure.value < 0.1  # linear layers of INT8 are FP16
    assert precision_failure(tiny_checkpoint, "int8") is None  # checkpoints are FP32 and are not checked


@pytest.fixture
def reference() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)


def test_the_worst_image_is_named(reference: np.ndarray) -> None:
    candidate = reference.copy()
    equal = differences(reference, candidate, PATHS[:4], {})
    assert equal.whole.cosine_min == pytest.approx(1, abs=1e-12)
    assert (equal.whole.largest_relative, equal.shortest, equal.longest) == (0, 1, 1)
    assert failed_gates(equal, None, Gates()) == []
    candidate[2, 3] += 0.5
    parity = differences(reference, candidate, PATHS[:4], {})
    whole, a, b = parity.whole, reference[2].astype(float), candidate[2].astype(float)
    assert whole.worst_image == "2.jpg"
    assert whole.cosine_min == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert whole.cosine_min < whole.cosine_p1 < whole.cosine_mean == pytest.approx((3 + whole.cosine_min) / 4)
    assert whole.largest_relative == pytest.approx(0.5 / np.abs(a).max())
    assert (len(parity.cosine_quantiles), parity.cosine_quantiles[0]) == (101, whole.cosine_min)
    assert parity.cosine_quantiles == sorted(parity.cosine_quantiles)


def test_stages_are_compared_by_their_slices(reference: np.ndarray) -> None:
    candidate = reference.copy()
    candidate[:, 4:] *= -1
    stages = differences(reference, candidate, PATHS[:4], {"I": (0, 4), "II": (4, 8)}).stages
    assert stages["I"].cosine_min == pytest.approx(1)
    assert stages["II"].cosine_mean == pytest.approx(-1)
    assert differences(reference, candidate, PATHS[:4], {"I": (0, 8)}).stages == {}


@pytest.mark.parametrize("value", [np.nan, np.inf, 0])
def test_broken_rows_have_cosine_0(value: float, reference: np.ndarray) -> None:
    candidate = reference.copy()
    candidate[1] = value
    with np.errstate(all="raise"):
        parity = differences(reference, candidate, PATHS[:4], {})
    assert (parity.whole.cosine_min, parity.whole.worst_image) == (0, "1.jpg")
    assert (parity.whole.largest_relative is None) == (value != 0)
    assert (parity.shortest, parity.longest) == (1, 1)


def test_gates_follow_the_precision_unless_overridden() -> None:
    assert gates_for("fp16", {"min_cosine": None}) == Gates(0.999, 0.1, 0.9999, 1.01)
    assert gates_for("fp16", {"max_stretch": 2}, float16_sums=True) == Gates(0.99, 0.1, 0.999, 2)
    assert gates_for("int8", {"min_cosine": 0.9, "max_stretch": 2}) == Gates(0.9, 0.5, 0.99, 2, 1.25, 1)
    wrong = {"min_cosine": 1.5, "min_mean_cosine": math.nan, "max_map_drop": -1, "max_stretch": 0.9, "no_gate": 1}
    wrong |= {"max_fmr_factor": 0.99, "max_tmr_drop": -0.1}
    for name, value in wrong.items():
        with pytest.raises(PmmError, match=name):
            gates_for("fp32", {name: value})


def test_gates_give_value_limit_and_image(reference: np.ndarray) -> None:
    parity, gates = differences(reference, reference, PATHS[:4], {}), Gates(min_cosine=0.999, min_mean_cosine=0.9999)
    low = replace(parity, whole=replace(parity.whole, cosine_min=0.9, cosine_mean=0.99, worst_image="3.jpg"))
    found = [(one.kind, one.value, one.limit, one.image) for one in failed_gates(low, None, gates)]
    assert found == [(FailureKind.COSINE, 0.9, 0.999, "3.jpg"), (FailureKind.MEAN_COSINE, 0.99, 0.9999, "")]
    undefined = replace(parity, whole=replace(parity.whole, cosine_min=math.nan, cosine_mean=math.nan))
    assert len(failed_gates(undefined, None, gates)) == 2
    for points, limit, failed in ((-0.2, 0.3, False), (0.2, 0.1, False), (-0.2, 0.1, True)):
        own = Change(*(value / 100 for value in (points, points - 0.3, points + 0.3)))
        failures = failed_gates(parity, RetrievalChange(own, own, own, 458), Gates(max_map_drop=limit))
        found = [(one.kind, one.value, one.limit, one.change) for one in failures]
        assert found == ([(FailureKind.MAP_DROP, pytest.approx(0.2), 0.1, own)] if failed else [])


def test_length_gate(reference: np.ndarray) -> None:
    for factors, limit, expected in (
        ([1.0005] * 4, 1.001, []),
        ([1.2] * 4, 1.25, []),
        ([1, 1, 1.2, 1.1], 1.001, [(FailureKind.LENGTH, 1.2, "2.jpg")]),
        ([1, 0.5, 1.2, 1], 1.001, [(FailureKind.LENGTH, 0.5, "1.jpg")]),
    ):
        parity = differences(reference, reference * np.array(factors, np.float32)[:, None], PATHS[:4], {})
        found = failed_gates(parity, None, Gates(max_stretch=limit))
        assert [(one.kind, round(one.value or 0, 3), one.image) for one in found] == expected


def test_the_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(1).normal(0.01, 0.1, (2500, 1))
    (found,) = paired_changes(values)
    error = 1.96 * values.std() / np.sqrt(len(values))
    assert found.difference == pytest.approx(values.mean())
    assert found.low == pytest.approx(found.difference - error, abs=0.1 * error)
    assert found.high == pytest.approx(found.difference + error, abs=0.1 * error)
    assert paired_changes(values) == [found]  # seeded
    assert paired_changes(np.zeros((10, 1))) == [Change(0, 0, 0)]
    random = np.random.default_rng(2)
    covers = [one.low <= 0 <= one.high for one in paired_changes(random.normal(0, 1, (200, 60)))]
    assert 0.85 <= np.mean(covers) <= 1


def test_the_change_is_that_of_the_queries_with_a_match() -> None:
    labels = np.array([1, 2, 3]), np.array([1, 2, 1, 2]), np.array([1, 1, 1]), np.array([2, 2, 2, 2])
    right = np.array([[0.1, 0.9, 0.2, 0.8], [0.9, 0.1, 0.8, 0.2], [0.1, 0.2, 0.3, 0.4]])
    other = np.array([[0.3, 0.9, 0.2, 0.8], [0.0, 0.1, 0.8, 0.2], [0.9, 0.1, 0.3, 0.4]])  # query 2 hits a wrong image
    before, now = evaluate_distances(right, *labels), evaluate_distances(other, *labels)
    found = retrieval_change(before, now)
    assert found.queries == 2
    assert found.rank1.difference == pytest.approx(-0.5)
    assert found.mAP.difference == pytest.approx(now.mAP - before.mAP)
    assert found.mINP.difference == pytest.approx(now.mINP - before.mINP)
