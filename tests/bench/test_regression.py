"""Changes beyond noise are found, and what cannot be compared is noted."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_sample import passing_report, sample_report

from pmm_edge.bench.regression import FIGURES, Comparison, compare_reports, comparison_table
from pmm_edge.bench.report import BenchReport, Decision, ModelReport

Edit = Callable[[ModelReport], ModelReport]

MAP, COSINE_MIN, COSINE_MEAN = "retrieval.mAP", "parity.whole.cosine_min", "parity.whole.cosine_mean"
FALSE, TRUE = "decisions.thresholds.fmr_ratio", "decisions.thresholds.tmr"
MEDIAN, MEMORY, ENERGY = "latency.median_ms", "cold_start.peak_memory_mib", "energy.joules_per_embedding"


@pytest.fixture
def report(tmp_path: Path) -> BenchReport:
    return passing_report(tmp_path / "data")


def compared(old: BenchReport, new: BenchReport, folder: Path) -> Comparison:
    old.save(folder / "old.json")
    new.save(folder / "new.json")
    return compare_reports(folder / "old.json", folder / "new.json")


def changed(comparison: Comparison, outcome: str = "worse") -> set[tuple[str, str]]:
    return {(one.model, one.figure) for one in comparison.findings if one.outcome == outcome}


def noted(comparison: Comparison) -> list[str]:
    return [note.kind for note in comparison.notes]


def with_model(report: BenchReport, number: int, *edits: Edit) -> BenchReport:
    models = list(report.models)
    for edit in edits:
        models[number] = edit(models[number])
    return replace(report, models=models)


def edited(part: str, **changes: Any) -> Edit:
    """Replace entries of a part of a model; functions receive the part."""

    def new(old: Any) -> Any:
        values = {name: change(old) if callable(change) else change for name, change in changes.items()}
        return replace(old, **values)

    def edit(model: ModelReport) -> ModelReport:
        old = getattr(model, part)
        return replace(model, **{part: [new(one) for one in old] if isinstance(old, list) else new(old)})

    return edit


def slower(factor: float) -> Edit:
    names = ("median_ms", "ratio", "ratio_low", "ratio_high")
    return edited("latency", **{name: lambda own, name=name: factor * getattr(own, name) for name in names})


def less_accurate(points: float) -> Edit:
    return edited("retrieval", mAP=lambda own: own.mAP - points / 100)


def departed(cosine_min: float, cosine_mean: float = 1.0) -> Edit:
    return edited("parity", whole=lambda own: replace(own.whole, cosine_min=cosine_min, cosine_mean=cosine_mean))


def decided(fmr_factor: float = 1.0, tmr_points: float = 0.0) -> Edit:
    """Change the rates at all thresholds, with their intervals."""

    def at(one: Decision) -> Decision:
        names = ("fmr_ratio", "fmr_ratio_low", "fmr_ratio_high")
        ratios = {name: fmr_factor * getattr(one, name) for name in names}
        return replace(one, fmr=fmr_factor * one.fmr, tmr=one.tmr + tmr_points / 100, **ratios)

    return edited("decisions", thresholds=lambda own: [at(one) for one in own.thresholds])


def test_equal_reports(report: BenchReport, tmp_path: Path) -> None:
    found = compared(report, report, tmp_path)
    assert (found.regressions, found.notes, comparison_table(found).rows) == ([], [], [])
    assert {finding.outcome for finding in found.findings} == {"same"}
    assert {finding.figure for finding in found.findings} == {path for path, *_ in FIGURES}


def test_the_table_shows_what_changed_and_fits_80_columns(report: BenchReport, tmp_path: Path) -> None:
    found = compared(report, with_model(with_model(report, 0, slower(0.7)), 1, slower(1.3)), tmp_path)
    assert [row[4] for row in comparison_table(found).rows] == ["worse"] * 6 + ["better"] * 6
    table = comparison_table(replace(found, findings=[replace(one, outcome="better") for one in found.findings]))
    widest = [max(len(line) for row in table.rows for line in row[column].split("\n")) for column in range(1, 5)]
    assert sum(widest) <= 44  # leaves 20 of 80 columns for the name, which may break


WIDE = edited("latency", ratio_low=lambda own: 0.8 * own.ratio, ratio_high=lambda own: 1.2 * own.ratio)
LARGER = (
    edited("cold_start", peak_memory_mib=lambda own: 1.2 * own.peak_memory_mib),
    edited("energy", joules_per_embedding=lambda own: 1.2 * own.joules_per_embedding),
    lambda model: replace(model, file_bytes=2 * model.file_bytes),
)
LOOSE = edited("gates", min_cosine=0.1, max_map_drop=3.0, max_stretch=2.0)


@pytest.mark.parametrize(
    ("number", "edits", "worse", "better"),
    [
        pytest.param(0, [slower(1.04)], set(), set(), id="latency below 5 %"),
        pytest.param(0, [slower(1.3)], {MEDIAN}, set(), id="slower"),
        pytest.param(0, [slower(0.7)], set(), {MEDIAN}, id="faster"),
        pytest.param(0, [slower(1.15), WIDE], set(), set(), id="wide intervals"),
        pytest.param(2, [less_accurate(0.25)], set(), set(), id="mAP within both intervals of 0.2 points"),
        pytest.param(2, [less_accurate(0.35)], {MAP}, set(), id="mAP beyond both intervals"),
        # The sample's intervals: ± 2.5 % and ± 0.25 points for Euclidean distance, none for cosine.
        pytest.param(0, [decided(1.04)], set(), set(), id="false matches below 5 %"),
        pytest.param(0, [decided(1.2)], {FALSE}, set(), id="more false matches"),
        pytest.param(0, [decided(0.8)], set(), {FALSE}, id="fewer false matches"),
        pytest.param(0, [decided(tmr_points=-0.5)], {TRUE}, set(), id="fewer true matches"),
        pytest.param(0, [decided(0.8, tmr_points=-0.5)], {TRUE}, {FALSE}, id="a stricter threshold"),
        pytest.param(0, [departed(1 - 9e-6)], set(), set(), id="cosine far from its gate"),
        pytest.param(0, [departed(1 - 5e-5)], {COSINE_MIN}, set(), id="cosine close to its gate"),
        pytest.param(0, [departed(0.95, 0.96), LOOSE], {COSINE_MIN, COSINE_MEAN}, set(), id="a loosened gate"),
        pytest.param(0, LARGER, {MEMORY, ENERGY, "file_bytes"}, set(), id="memory, energy, file"),
    ],
)
def test_figures(
    number: int, edits: list[Edit], worse: set[str], better: set[str], report: BenchReport, tmp_path: Path
) -> None:
    found, name = compared(report, with_model(report, number, *edits), tmp_path), Path(report.models[number].path).name
    assert changed(found) == {(name, figure) for figure in worse}
    assert changed(found, "better") == {(name, figure) for figure in better}
    assert found.notes == []
    assert all(one.new / one.old == pytest.approx(1.3) for one in found.regressions if one.figure == MEDIAN)


def test_decisions_are_compared_at_the_same_distance_and_rate(report: BenchReport, tmp_path: Path) -> None:
    def rows(new: BenchReport) -> dict[tuple[str | None, float | None, str], tuple[str, float]]:
        found = compared(report, with_model(new, 0), tmp_path).findings
        return {
            (one.distance, one.nominal, one.figure): (one.outcome, one.noise)
            for one in found
            if one.model == Path(new.models[0].path).name and one.figure in (FALSE, TRUE)
        }

    found = rows(with_model(report, 0, decided(tmr_points=-0.2)))
    assert {key[:2] for key in found} == {("euclidean", 1e-3), ("cosine", 1e-4)}
    assert found["euclidean", 1e-3, TRUE] == ("same", pytest.approx(2**0.5 * 0.25))
    assert found["cosine", 1e-4, TRUE] == ("worse", 0.01)
    fewer = edited("decisions", thresholds=lambda own: own.thresholds[:1])
    assert {key[:2] for key in rows(with_model(report, 0, fewer))} == {("euclidean", 1e-3)}
    moved = edited("decisions", thresholds=lambda own: [replace(one, threshold=9.0) for one in own.thresholds])
    assert len(rows(with_model(report, 0, moved))) == 4, "another threshold for the same rate"


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ({"gpu": "H100", "driver": "570"}, {"gpu": "H100", "driver": "580"}, True),
        ({"gpu": "H100"}, {"gpu": "H200"}, False),
        ({}, {"gpu": "H100"}, True),  # a bench that used no GPU
        ({"threads": {"torch": 2}}, {"threads": {"onnxruntime": 2}}, True),
        ({"thread_settings": {"OMP_NUM_THREADS": "2"}}, {"thread_settings": {"OMP_NUM_THREADS": "1"}}, False),
        ({"instruction_set": "avx512_vnni"}, {"instruction_set": "avx2"}, False),
        ({"power_mode": "MAXN"}, {"power_mode": "15W"}, False),
    ],
)
def test_times_are_compared_on_the_same_machine(
    old: dict[str, object], new: dict[str, object], same: bool, report: BenchReport, tmp_path: Path
) -> None:
    before, now = (replace(report, environment=replace(report.environment, **entries)) for entries in (old, new))
    found = compared(before, with_model(now, 0, slower(3)), tmp_path)
    assert (noted(found), bool(found.regressions)) == ([] if same else ["other machine"], same)
    measured = {path for path, _, _, needed, *_ in FIGURES if same or "machine" not in needed}
    assert {one.figure for one in found.findings} == measured


def test_with_other_images_or_another_reference(report: BenchReport, tmp_path: Path) -> None:
    worse = with_model(report, 2, less_accurate(5), decided(3))
    for other, kind, compared_still in (
        (replace(worse, reference=replace(worse.reference, sha256="b" * 64)), "other reference", {COSINE_MIN}),
        (replace(worse, data_sha256="e" * 64), "other images", set()),
    ):
        found = compared(report, other, tmp_path)
        assert (found.regressions, noted(found)) == ([], [kind])
        assert {MAP, COSINE_MIN} & {one.figure for one in found.findings} == compared_still


def test_models_that_fail_are_missing_or_were_measured_less(report: BenchReport, tmp_path: Path) -> None:
    failures = sample_report(tmp_path / "data").models[-1].failures
    failing = with_model(report, 1, lambda model: replace(model, failures=failures))
    fewer = replace(report, models=report.models[1:])
    for old, new, kind, regression in (
        (report, failing, "model fails", True),
        (failing, report, "model passes", False),
        (report, fewer, "model missing", True),
        (fewer, report, "model new", False),
        (report, replace(report, complete=False), "interrupted", True),
        (report, with_model(report, 0, lambda model: replace(model, latency=[])), "not measured", False),
        (report, with_model(report, 0, lambda model: replace(model, backend="tensorrt")), "other engine", False),
    ):
        found = compared(old, new, tmp_path)
        assert noted(found) == [kind]
        assert found.regressions == (found.notes if regression else [])
