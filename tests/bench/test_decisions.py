"""Decisions at the thresholds of a model: exact counts, intervals over people, and gates."""

import shutil
from dataclasses import replace
from pathlib import Path

import broken
import numpy as np
import onnx
import pytest

import pmm_edge
from pmm_edge.bench import bench, parity, pipeline
from pmm_edge.bench.decisions import LISTED, compare_decisions, failed_decisions
from pmm_edge.bench.parity import DEFAULT_GATES
from pmm_edge.bench.report import BenchReport, Change, Decision, Decisions, FailureKind, Gates, WarningKind
from pmm_edge.data.dataset import ReidDataset, Split, scan
from pmm_edge.retrieval import pairwise_distances
from pmm_edge.retrieval.thresholds import People
from pmm_edge.runtime.certificate import check_certificate
from pmm_edge.runtime.embed_files import dataset_thresholds, embed_dataset
from pmm_edge.spec import Calibration


def random_set(seed: int, people: int = 30, images: int = 200) -> tuple[ReidDataset, np.ndarray]:
    """Labels with junk, distractors and a query that shows a distractor, and embeddings."""
    random = np.random.default_rng(seed)
    splits = []
    for name, lowest in (("query", 0), ("gallery", -1)):
        paths = [Path(f"{name}{number}") for number in range(images)]
        splits.append(Split(paths, random.integers(lowest, people, images), random.integers(1, 4, images)))
    pids = np.concatenate([split.pids for split in splits])
    embeddings = random.normal(size=(people + 1, 16))[pids] + 1.2 * random.normal(size=(len(pids), 16))
    return ReidDataset("random", Path(), splits[0], *splits), embeddings.astype(np.float32)


def calibrate(dataset: ReidDataset, embeddings: np.ndarray) -> Calibration:
    return dataset_thresholds(dataset, embeddings, "same").calibration


@pytest.mark.parametrize("seed", range(3))
def test_counts_are_those_of_all_distances(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pmm_edge.retrieval.distances.BLOCK_BYTES", 8 * 200 * 33)
    dataset, reference = random_set(seed)
    calibration, query, gallery = calibrate(dataset, reference), dataset.query, dataset.gallery
    candidate = reference + 0.1 * np.random.default_rng(9).normal(size=reference.shape).astype(np.float32)
    found = compare_decisions(reference, candidate, dataset, calibration, "same")
    pairs = (query.camids[:, None] != gallery.camids) & (query.pids > 0)[:, None] & (gallery.pids != -1)
    same = pairs & (query.pids[:, None] == gallery.pids)
    other = pairs & ~same
    people = People(*dataset.labels)
    rows, columns = people.rows, people.columns
    weights = people.weights.astype(float)  # of people, in each draw of the bootstrap

    def drawn(chosen: np.ndarray, both: bool) -> np.ndarray:
        """Number of chosen pairs in each draw: a pair of two people counts as often as both were drawn together."""
        sums = weights[:, people.row_unit] @ chosen[rows][:, columns]
        return (sums * weights[:, people.column_unit] if both else sums).sum(axis=1)

    assert (found.genuine_pairs, found.impostor_pairs, found.same_images) == (same.sum(), other.sum(), True)
    assert len(found.thresholds) == 2 * len(calibration.cosine.thresholds) >= 4
    for one in found.thresholds:
        threshold = calibration.threshold(one.nominal, one.distance)
        sides = [rows[:200] for rows in (reference, candidate)], [rows[200:] for rows in (reference, candidate)]
        before, now = (pairwise_distances(*pair, one.distance) for pair in zip(*sides, strict=True))
        was, is_now = before <= np.float32(threshold.distance), now <= np.float32(threshold.distance)
        assert one.threshold == threshold.distance
        assert (one.fmr, one.tmr) == ((is_now & other).sum() / other.sum(), (is_now & same).sum() / same.sum())
        assert one.reference_fmr == threshold.false_matches / calibration.impostor_pairs
        assert one.fmr_ratio == ((is_now & other).sum() + 0.5) / (threshold.false_matches + 0.5)
        false = np.stack([drawn(each & other, True) for each in (was, is_now)])
        false = false[:, false.any(axis=0)] + 0.5
        interval = np.quantile(false[1] / false[0], (0.025, 0.975))
        assert (one.fmr_ratio_low, one.fmr_ratio_high) == pytest.approx(interval)
        changes = (drawn(is_now & same, False) - drawn(was & same, False)) / drawn(same, False)
        assert (one.tmr_change.low, one.tmr_change.high) == pytest.approx(np.quantile(changes, (0.025, 0.975)))
        assert one.tmr_change.difference == pytest.approx(one.tmr - threshold.tmr)
        changed = pairs & (was != is_now)
        assert one.changed == changed.sum() > 0
        margin = np.where(changed, np.minimum(np.abs(before - one.threshold), np.abs(now - one.threshold)), -1)
        worst = np.unravel_index(margin.argmax(), margin.shape)
        first, count = one.worst[0], len(one.worst)
        assert (first.query_image, first.gallery_image) == (f"query{worst[0]}", f"gallery{worst[1]}")
        assert (first.reference_distance, first.distance) == pytest.approx((before[worst], now[worst]))
        assert (first.same_person, count) == (same[worst], min(LISTED, one.changed))


def test_equal_models_make_equal_decisions() -> None:
    dataset, embeddings = random_set(0)
    found = compare_decisions(embeddings, embeddings, dataset, calibrate(dataset, embeddings), "other")
    assert not found.same_images
    for one in found.thresholds:
        assert (one.fmr_ratio, one.fmr_ratio_low, one.fmr_ratio_high, one.changed, one.worst) == (1, 1, 1, 0, [])
        assert one.tmr_change == Change(0, 0, 0)
    assert failed_decisions(found, Gates(max_fmr_factor=1, max_tmr_drop=0)) == []
    calibration = calibrate(dataset, embeddings)
    euclidean = replace(calibration, cosine=replace(calibration.cosine, thresholds=()))
    found = compare_decisions(embeddings, embeddings, dataset, euclidean, "")
    assert {one.distance for one in found.thresholds} == {"euclidean"}


def test_a_scaled_model_fails_by_euclidean_distance_alone() -> None:
    dataset, embeddings = random_set(1)
    calibration = calibrate(dataset, embeddings)
    for factor, kinds in (
        (1.1, [FailureKind.FALSE_MATCHES, FailureKind.TRUE_MATCHES]),
        (0.9, [FailureKind.FALSE_MATCHES]),
    ):
        scaled = embeddings * np.float32(factor)
        failures = failed_decisions(
            compare_decisions(embeddings, scaled, dataset, calibration, ""), DEFAULT_GATES["int8"]
        )
        assert [one.kind for one in failures] == kinds
        assert {one.decision.distance for one in failures if one.decision} == {"euclidean"}
        assert (failures[0].value or 1) < 1 if factor > 1 else (failures[0].value or 1) > 1


@pytest.mark.parametrize(
    ("ratio", "change", "expected"),
    [
        ((1.3, 0.9, 1.8), (-0.02, -0.05, 0.01), []),  # a few people explain both changes
        ((1.2, 1.1, 1.3), (-0.009, -0.01, -0.008), []),  # less than the gates allow
        ((1.3, 1.1, 1.8), (0.02, 0.01, 0.03), [(FailureKind.FALSE_MATCHES, 1.3, 1.25)]),
        (
            (0.7, 0.6, 0.9),
            (-0.02, -0.03, -0.01),
            [(FailureKind.FALSE_MATCHES, 0.7, 1.25), (FailureKind.TRUE_MATCHES, 2, 1)],
        ),
    ],
)
def test_gates(ratio: tuple[float, ...], change: tuple[float, ...], expected: list[object]) -> None:
    mild = Decision("cosine", 0.3, 0.01, 0.01, 0.01, 1.0, 1.0, 1.0, 0.7, Change(0, 0, 0), 0, [])
    bad = replace(mild, **dict(zip(("fmr_ratio", "fmr_ratio_low", "fmr_ratio_high"), ratio, strict=True)))
    bad = replace(bad, tmr_change=Change(*change))
    failures = failed_decisions(Decisions("data", True, 10, 1000, [mild, bad]), DEFAULT_GATES["int8"])
    assert [(one.kind, pytest.approx(one.value), one.limit) for one in failures] == expected
    assert all(one.decision is bad for one in failures)


@pytest.fixture(scope="module")
def calibrated(good: Path, crowd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with thresholds."""
    dataset = scan(crowd)
    embeddings = embed_dataset(pmm_edge.load(good, "cpu"), dataset).embeddings
    out = tmp_path_factory.mktemp("calibrated") / "model.onnx"
    return broken.saved(onnx.load(good), good, out, calibration=calibrate(dataset, embeddings))


def judge(models: list[Path], reference: Path, data: Path, **options: object) -> BenchReport:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "write_html", lambda *args: None)
        patch.setattr(parity, "check_batches", lambda *args: [])
        options |= {"batch_sizes": (1,), "device": "cpu", "parity_only": True, "out": models[0].with_suffix(".json")}
        return bench(models, reference=reference, data=data, **options).report


def test_exports_keep_the_decisions_and_a_scaled_one_does_not(calibrated: Path, crowd: Path, tmp_path: Path) -> None:
    crops = broken.crops_of(crowd / "query")  # its training images show few of the colors
    exports = [
        broken.fp16(calibrated, tmp_path / "fp16.onnx"),
        broken.int8(calibrated, tmp_path / "int8.onnx", "cpu", crops),
        broken.altered(calibrated, tmp_path / "scaled.onnx", lambda *graph: broken.is_stretched(*graph, factor=1.1)),
    ]
    report = judge(exports, calibrated, crowd, gates={"max_stretch": 2})
    fp16, int8, scaled = report.models
    for model in (fp16, int8):
        assert model.failures == []
        assert model.decisions is not None and model.decisions.impostor_pairs >= 1000
        certificate = check_certificate(model.path)
        thresholds = certificate.report["decisions"]["thresholds"]
        assert [one["fmr"] for one in thresholds] == [one.fmr for one in model.decisions.thresholds]
        assert not {pair["query_image"] for one in thresholds for pair in one["worst"]} - {""}
    assert [one.kind for one in scaled.failures] == [FailureKind.FALSE_MATCHES, FailureKind.TRUE_MATCHES]
    assert not report.warnings


def test_models_without_thresholds_and_other_images(
    good: Path, calibrated: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    plain = [Path(shutil.copy(good, tmp_path / name)) for name in ("a.onnx", "b.onnx")]
    spec = pmm_edge.load(calibrated, "cpu").spec
    assert spec.calibration is not None
    (threshold,) = spec.calibration.cosine.thresholds
    rarer = replace(spec.calibration.cosine, thresholds=(replace(threshold, fmr_interval=(0.98, 0.99)),))
    calibration = replace(spec.calibration, cosine=rarer)
    elsewhere = broken.saved(onnx.load(good), good, tmp_path / "elsewhere.onnx", calibration=calibration)
    report = judge([*plain, elsewhere], good, tiny_dataset)
    kinds = [one.kind for one in report.warnings]
    assert kinds.count(WarningKind.NO_THRESHOLDS) == 1
    first, second, third = report.models
    assert (first.decisions, second.decisions, report.passed) == (None, None, True)
    assert third.decisions is not None and not third.decisions.same_images
    (warning,) = [one for one in report.warnings if one.kind is WarningKind.OTHER_RATES]
    assert (warning.model, warning.limit) == (str(elsewhere), 0.01)
