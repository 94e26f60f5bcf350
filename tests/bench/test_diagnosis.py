"""Deliberately broken models fail with their cause; good ones pass."""

from pathlib import Path

import broken
import numpy as np
import pytest

from pmm_edge.bench import ModelReport, bench, pipeline
from pmm_edge.bench.report import Cause, FailureKind, InvariantName, LikelyCause
from pmm_edge.spec import FLOAT16_MAX

Judged = dict[str, ModelReport]


def kinds(model: ModelReport) -> list[FailureKind]:
    return [failure.kind for failure in model.failures]


@pytest.fixture(scope="module")
def judged(checkpoint: Path, good: Path, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Judged:
    """All models in one bench, by name."""
    folder = tmp_path_factory.mktemp("models")
    test_crops = np.concatenate([broken.crops_of(tiny_dataset / split) for split in ("query", "bounding_box_test")])
    darkest, next_to_it = np.sort(test_crops.mean(axis=(1, 2, 3)))[:2]
    crops = broken.crops_of(tiny_dataset / "bounding_box_train")
    alterations = (
        *(broken.sees_bgr, broken.normalizes_twice, broken.does_not_normalize, broken.swaps_stages),
        *(broken.sees_its_batch, broken.gives_one_embedding, broken.is_stretched),
    )
    surgery = {alter.__name__: alter for alter in alterations}
    surgery["gives_nan"] = broken.gives_nan_for((darkest + next_to_it) / 2)
    models = [broken.altered(good, folder / f"{name}.onnx", alter) for name, alter in surgery.items()]
    models += [
        good,
        broken.fp16(good, folder / "fp16.onnx"),
        broken.int8(good, folder / "int8_cpu.onnx", "cpu", crops),
        broken.int8(good, folder / "int8_tensorrt.onnx", "tensorrt", crops),
    ]
    return judge(models, checkpoint, tiny_dataset)


def judge(models: list[Path], reference: Path, data: Path, **options: object) -> Judged:
    """Run a bench on few images, without pages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "write_html", lambda *args: None)
        patch.setattr("pmm_edge.bench.parity.PROBES", 4)
        patch.setattr("pmm_edge.bench.parity._ODD_SIZES", (2,))
        options |= {"batch_sizes": (1,), "device": "cpu", "parity_only": True, "out": models[0].with_suffix(".json")}
        report = bench(models, reference=reference, data=data, **options).report
    assert report.complete
    return {Path(model.path).stem: model for model in report.models}


@pytest.mark.parametrize("name", ["model", "fp16", "int8_cpu", "int8_tensorrt"])
def test_good_models_pass(name: str, judged: Judged) -> None:
    model = judged[name]
    assert (model.failures, model.likely_cause) == ([], None)
    assert all(invariant.held for invariant in model.invariants)
    assert model.precision == name.split("_")[0].replace("model", "fp32")


@pytest.mark.parametrize(
    ("name", "cause", "stages"),
    [
        ("sees_bgr", Cause.BGR, ()),
        ("normalizes_twice", Cause.NORMALIZED_TWICE, ()),
        ("does_not_normalize", Cause.NOT_NORMALIZED_UNIT, ()),
        ("swaps_stages", Cause.STAGES_SWAPPED, ("I", "III", "II")),
    ],
)
def test_the_mistake_is_named(name: str, cause: Cause, stages: tuple[str, ...], judged: Judged) -> None:
    model = judged[name]
    assert FailureKind.COSINE in kinds(model)
    assert (model.likely_cause.cause, model.likely_cause.stages) == (cause, stages)
    assert model.likely_cause.cosine > 0.999
    closest = {stage: figures.cosine_mean > 0.9999 for stage, figures in model.parity.stages.items()}
    assert closest == dict.fromkeys(("I", "II", "III"), False) | ({"I": True} if stages else {})


@pytest.mark.parametrize(
    ("name", "expected", "images"),
    [
        ("gives_nan", {InvariantName.FINITE}, 1),
        ("gives_one_embedding", {InvariantName.DISTINCT}, 24),
        ("sees_its_batch", {InvariantName.NEIGHBORS, InvariantName.BATCH_SIZE}, 0),
    ],
)
def test_broken_invariants(name: str, expected: set[InvariantName], images: int, judged: Judged) -> None:
    model = judged[name]
    faults = [one for one in model.invariants if not one.held]
    assert {one.name for one in faults} == expected
    assert {one.images for one in faults} == {images}
    assert [one.invariant for one in model.failures if one.invariant] == faults
    assert model.likely_cause is None
    assert (model.retrieval is None) == (name == "gives_nan")


def test_a_length_that_cosine_does_not_see(judged: Judged) -> None:
    (failure,) = judged["is_stretched"].failures
    assert (failure.kind, failure.value) == (FailureKind.LENGTH, pytest.approx(0.1, rel=1e-4))


# --explain


def test_an_overflow_of_fp16(good: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    large = broken.with_large_values(good, tmp_path / "large.onnx")
    half = broken.overflowing_fp16(good, large, tmp_path / "half.onnx")
    model = explained(half, large, tiny_dataset)
    assert kinds(model)[0] is FailureKind.INVARIANT
    assert model.likely_cause == LikelyCause(Cause.FLOAT16_OVERFLOW)
    departure = model.departure
    assert (departure.layer, departure.dtype, departure.value_range) == ("backbone.layer3.0.conv1", "float16", None)
    assert max(map(abs, departure.reference_range)) > FLOAT16_MAX


def test_the_layer_that_departs_is_found(good: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    wrong = broken.altered(good, tmp_path / "wrong.onnx", broken.changes_a_layer)
    departure = explained(wrong, good, tiny_dataset).departure
    assert (departure.operator, departure.layer, departure.gradual) == ("Conv", "backbone.layer2.1.conv1", False)
    assert departure.cosine < 0.99 < 0.9999 < departure.before
    assert departure.weights_cosine < 0.99


def test_a_wrong_calibration_range_is_found(good: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    gray_noise = np.random.default_rng(0).normal(128, 4, (8, 96, 64, 3)).clip(0, 255).astype(np.uint8)
    path = broken.int8(good, tmp_path / "int8.onnx", "tensorrt", gray_noise)
    model = explained(path, good, tiny_dataset)
    assert {FailureKind.COSINE, FailureKind.MEAN_COSINE} & set(kinds(model))
    departure = model.departure
    assert departure.operator == "DequantizeLinear"
    assert departure.value_range[1] < departure.reference_range[1]


def explained(model: Path, reference: Path, data: Path) -> ModelReport:
    return judge([model], reference, data, limit=4, explain=True)[model.stem]
