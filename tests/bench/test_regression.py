"""Changes beyond noise are found, and what cannot be compared is noted."""

from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path

import pytest
from report_sample import passing_report, sample_report

from pmm_edge.bench.regression import Comparison, Metric, NoteKind, Outcome, compare_reports, comparison_table
from pmm_edge.bench.report import BenchReport, Change, Latency, ModelReport
from pmm_edge.errors import DataError

Edit = Callable[[ModelReport], ModelReport]


@pytest.fixture
def report(tmp_path: Path) -> BenchReport:
    return passing_report(tmp_path / "data")


def compared(old: BenchReport, new: BenchReport, folder: Path) -> Comparison:
    old.save(folder / "old.json")
    new.save(folder / "new.json")
    return compare_reports(folder / "old.json", folder / "new.json")


def worse(comparison: Comparison) -> set[tuple[str, Metric]]:
    return {(one.model, one.metric) for one in comparison.findings if one.outcome is Outcome.WORSE}


def noted(comparison: Comparison) -> list[NoteKind]:
    return [note.kind for note in comparison.notes]


def with_model(report: BenchReport, number: int, edit: Edit) -> BenchReport:
    models = list(report.models)
    models[number] = edit(models[number])
    return replace(report, models=models)


def slower(factor: float) -> Edit:
    def edit(model: ModelReport) -> ModelReport:
        return replace(model, latency=[scaled(latency, factor) for latency in model.latency])

    return edit


def scaled(latency: Latency, factor: float) -> Latency:
    names = ("median_ms", "p90_ms", "p99_ms", "ratio", "ratio_low", "ratio_high")
    return replace(latency, **{name: factor * getattr(latency, name) for name in names})


def less_accurate(points: float) -> Edit:
    def edit(model: ModelReport) -> ModelReport:
        assert model.retrieval is not None
        return replace(model, retrieval=replace(model.retrieval, mAP=model.retrieval.mAP - points / 100))

    return edit


def test_equal_reports(report: BenchReport, tmp_path: Path) -> None:
    found = compared(report, report, tmp_path)
    assert (found.regressions, found.improvements, found.notes) == ([], [], [])
    assert {finding.outcome for finding in found.findings} == {Outcome.SAME}
    assert {finding.metric for finding in found.findings} == set(Metric) - {Metric.RATIO, Metric.GPU_MEMORY}
    assert comparison_table(found).rows == []


def test_the_table_shows_what_changed_and_fits_80_columns(report: BenchReport, tmp_path: Path) -> None:
    found = compared(report, with_model(with_model(report, 0, slower(0.7)), 1, slower(1.3)), tmp_path)
    assert found.regressions
    assert found.improvements
    shown = [row[4] for row in comparison_table(found).rows]
    assert shown == ["worse"] * len(found.regressions) + ["better"] * len(found.improvements)
    everything = [replace(finding, outcome=Outcome.BETTER) for finding in found.findings]
    table = comparison_table(replace(found, findings=everything))
    widest = [max(len(line) for row in table.rows for line in row[column].split("\n")) for column in range(1, 5)]
    assert sum(widest) <= 44  # leaves 20 of 80 columns for the name, which may break


# Latency


@pytest.mark.parametrize(("factor", "outcome"), [(1.04, None), (1.3, Outcome.WORSE), (0.7, Outcome.BETTER)])
def test_a_change_of_latency_beyond_5_percent(
    factor: float, outcome: Outcome | None, report: BenchReport, tmp_path: Path
) -> None:
    found = compared(report, with_model(report, 0, slower(factor)), tmp_path)
    changed = [finding for finding in found.findings if finding.outcome is not Outcome.SAME]
    assert len(changed) == (2 * len(report.models[0].latency) if outcome else 0)  # median and p90
    assert {finding.outcome for finding in changed} == ({outcome} if outcome else set())
    assert all(finding.new / finding.old == pytest.approx(factor) for finding in changed)


def test_wide_intervals_allow_more(report: BenchReport, tmp_path: Path) -> None:
    def wide(model: ModelReport) -> ModelReport:
        latency = [replace(own, ratio_low=0.8 * own.ratio, ratio_high=1.2 * own.ratio) for own in model.latency]
        return replace(model, latency=latency)

    found = compared(report, with_model(with_model(report, 0, slower(1.15)), 0, wide), tmp_path)
    assert ("model.onnx", Metric.MEDIAN) not in worse(found)


def with_tail(report: BenchReport, p90: float, p99: float, variation: float = 0.06) -> BenchReport:
    """Set the tails of the first model, as factors of its medians."""

    def edit(model: ModelReport) -> ModelReport:
        rows = [
            replace(own, p90_ms=p90 * own.median_ms, p99_ms=p99 * own.median_ms, variation=variation)
            for own in model.latency
        ]
        return replace(model, latency=rows)

    return with_model(report, 0, edit)


@pytest.mark.parametrize(
    ("old", "new", "regression"),
    [
        ((1.05, 1.1), (1.12, 1.2), False),  # below 10 %
        ((1.05, 1.1), (1.3, 1.4), True),
        ((1.02, 1.4), (1.38, 1.4), False),  # one slow turn more or less
        ((1.05, 1.1, 0.14), (1.25, 1.3, 0.14), False),  # both vary by 14 %, together by 20 %
    ],
)
def test_tails(
    old: tuple[float, ...], new: tuple[float, ...], regression: bool, report: BenchReport, tmp_path: Path
) -> None:
    found = compared(with_tail(report, *old), with_tail(report, *new), tmp_path)
    assert worse(found) == ({("model.onnx", Metric.P90)} if regression else set())


def test_tails_of_noisy_timings_are_not_compared(report: BenchReport, tmp_path: Path) -> None:
    found = compared(with_tail(report, 1.05, 1.1), with_tail(report, 2.2, 2.4, 0.35), tmp_path)
    assert found.regressions == []


def test_a_slower_reference_is_noted(report: BenchReport, tmp_path: Path) -> None:
    found = compared(report, replace(report, reference=slower(1.4)(report.reference)), tmp_path)
    assert NoteKind.REFERENCE_MOVED in noted(found)


# Machines


def elsewhere(report: BenchReport) -> BenchReport:
    return replace(report, environment=replace(report.environment, cpu="ARM", cores=6))


def test_on_another_machine_only_ratios_are_compared(report: BenchReport, tmp_path: Path) -> None:
    def three_times_slower(model: ModelReport) -> ModelReport:
        rows = [replace(own, median_ms=3 * own.median_ms, p90_ms=3 * own.p90_ms) for own in model.latency]
        return replace(model, latency=rows)

    models = [three_times_slower(model) for model in report.models]
    other = replace(elsewhere(report), reference=three_times_slower(report.reference), models=models)
    found = compared(report, other, tmp_path)
    assert (found.regressions, noted(found)) == ([], [NoteKind.OTHER_MACHINE])
    metrics = {finding.metric for finding in found.findings}
    assert Metric.RATIO in metrics
    assert not metrics & {Metric.MEDIAN, Metric.P90, Metric.MEMORY, Metric.ENERGY, Metric.FIRST_EMBEDDING}
    assert worse(compared(report, with_model(other, 2, slower(1.5)), tmp_path)) == {
        ("model-int8-cpu.onnx", Metric.RATIO)
    }


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
def test_what_makes_another_machine(
    old: dict[str, object], new: dict[str, object], same: bool, report: BenchReport, tmp_path: Path
) -> None:
    before, now = (replace(report, environment=replace(report.environment, **entries)) for entries in (old, new))
    assert noted(compared(before, now, tmp_path)) == ([] if same else [NoteKind.OTHER_MACHINE])


@pytest.mark.parametrize("entry", [{"sha256": "b" * 64}, {"backend": "onnxruntime"}, {"device": "cuda:0"}])
def test_ratios_to_different_references_are_not_compared(
    entry: dict[str, str], report: BenchReport, tmp_path: Path
) -> None:
    other = with_model(elsewhere(report), 0, slower(2.5))
    assert compared(report, other, tmp_path).regressions
    found = compared(report, replace(other, reference=replace(other.reference, **entry)), tmp_path)
    assert found.regressions == []
    assert Metric.RATIO not in {finding.metric for finding in found.findings}


def test_the_ratio_of_a_model_on_another_device_is_not_compared(report: BenchReport, tmp_path: Path) -> None:
    def on_gpu(model: ModelReport) -> ModelReport:
        return replace(model, device="cuda:0")

    slow = with_model(elsewhere(report), 0, slower(2.5))
    for old, new in ((report, with_model(slow, 0, on_gpu)), [with_model(one, 0, on_gpu) for one in (report, slow)]):
        found = compared(old, new, tmp_path)
        assert found.regressions == []
        compared_models = {one.model for one in found.findings if one.metric is Metric.RATIO}
        assert compared_models == {"model-fp16.onnx", "model-int8-cpu.onnx"}


# Accuracy


def test_accuracy_is_compared_beyond_both_intervals(report: BenchReport, tmp_path: Path) -> None:
    # Each interval is ± 0.2 points: together ± 0.28.
    assert compared(report, with_model(report, 2, less_accurate(0.25)), tmp_path).regressions == []
    found = compared(report, with_model(report, 2, less_accurate(0.35)), tmp_path)
    assert worse(found) == {("model-int8-cpu.onnx", Metric.MAP)}


def test_with_another_reference_only_changes_are_compared(report: BenchReport, tmp_path: Path) -> None:
    def moved(model: ModelReport, points: float) -> ModelReport:
        """All mAP three points lower; the change from the reference differs by `points`."""
        change = model.retrieval_change
        if change:
            change = replace(change, mAP=Change(*(value + points / 100 for value in astuple(change.mAP))))
        return replace(less_accurate(3)(model), retrieval_change=change)

    def retrained(points: float) -> BenchReport:
        reference = replace(moved(report.reference, 0), sha256="b" * 64)
        return replace(report, reference=reference, models=[moved(model, points) for model in report.models])

    found = compared(report, retrained(0.25), tmp_path)
    assert (found.regressions, found.improvements, noted(found)) == ([], [], [NoteKind.OTHER_REFERENCE])
    assert not any(one.metric is Metric.MAP for one in found.findings if one.model == "best.pt")
    (int8,) = [
        one
        for one in compared(report, retrained(-0.35), tmp_path).findings
        if one.outcome is Outcome.WORSE and one.model == "model-int8-cpu.onnx"
    ]
    assert int8.less_reference
    assert (int8.old, int8.new, int8.noise) == pytest.approx((-0.29, -0.64, 0.283), abs=1e-3)


def test_other_images_are_not_compared(report: BenchReport, tmp_path: Path) -> None:
    other = replace(with_model(report, 2, less_accurate(5)), data_sha256="e" * 64)
    found = compared(report, other, tmp_path)
    assert (found.regressions, noted(found)) == ([], [NoteKind.OTHER_IMAGES])
    assert not {finding.metric for finding in found.findings} & {Metric.MAP, Metric.COSINE_MIN}


def departed(cosine_min: float, cosine_mean: float | None = None) -> Edit:
    def edit(model: ModelReport) -> ModelReport:
        assert model.parity is not None
        whole = model.parity.whole
        whole = replace(whole, cosine_min=cosine_min, cosine_mean=cosine_mean or whole.cosine_mean)
        return replace(model, parity=replace(model.parity, whole=whole))

    return edit


def test_cosine_is_worse_only_close_to_its_gate(report: BenchReport, tmp_path: Path) -> None:
    assert compared(report, with_model(report, 0, departed(1 - 9e-6)), tmp_path).regressions == []  # of 1e-4 allowed
    found = compared(report, with_model(report, 0, departed(1 - 5e-5)), tmp_path)
    assert worse(found) == {("model.onnx", Metric.COSINE_MIN)}


def test_a_loosened_gate_hides_nothing(report: BenchReport, tmp_path: Path) -> None:
    def loose(model: ModelReport) -> ModelReport:
        gates = replace(model.gates, min_cosine=0.1, max_map_drop=3.0, max_stretch=2.0)
        return replace(departed(0.95, 0.96)(model), gates=gates)

    found = compared(report, with_model(report, 0, loose), tmp_path)
    assert worse(found) == {("model.onnx", Metric.COSINE_MIN), ("model.onnx", Metric.COSINE_MEAN)}
    assert noted(found) == [NoteKind.GATES_LOOSENED]
    tightened = compared(with_model(report, 0, loose), report, tmp_path)
    assert (tightened.regressions, tightened.notes) == ([], [])


# Models and what was measured


def test_models_that_fail_or_are_missing_are_regressions(report: BenchReport, tmp_path: Path) -> None:
    failures = sample_report(tmp_path / "data").models[-1].failures
    failing = with_model(report, 1, lambda model: replace(model, failures=failures))
    fewer = replace(report, models=report.models[1:])
    for old, new, kind, regression in (
        (report, failing, NoteKind.MODEL_FAILS, True),
        (failing, report, NoteKind.MODEL_PASSES, False),
        (report, fewer, NoteKind.MODEL_MISSING, True),
        (fewer, report, NoteKind.MODEL_NEW, False),
        (report, replace(report, complete=False), NoteKind.INTERRUPTED, True),
    ):
        found = compared(old, new, tmp_path)
        assert noted(found) == [kind]
        assert found.regressions == (found.notes if regression else [])


def test_memory_energy_and_file_size(report: BenchReport, tmp_path: Path) -> None:
    def larger(model: ModelReport) -> ModelReport:
        assert model.cold_start is not None
        assert model.energy is not None
        cold = replace(model.cold_start, peak_memory_mib=1.2 * model.cold_start.peak_memory_mib)
        energy = replace(model.energy, joules_per_embedding=1.2 * model.energy.joules_per_embedding)
        return replace(model, file_bytes=2 * model.file_bytes, cold_start=cold, energy=energy)

    found = compared(report, with_model(report, 0, larger), tmp_path)
    assert worse(found) == {("model.onnx", one) for one in (Metric.MEMORY, Metric.ENERGY, Metric.FILE_SIZE)}


def test_figures_that_are_no_longer_measured_are_noted(report: BenchReport, tmp_path: Path) -> None:
    lost = with_model(report, 0, lambda model: replace(model, latency=[], energy=None))
    found = compared(report, lost, tmp_path)
    assert (found.regressions, noted(found)) == ([], [NoteKind.NOT_MEASURED])


def test_a_report_that_cannot_be_read_is_named(report: BenchReport, tmp_path: Path) -> None:
    report.save(tmp_path / "old.json")
    (tmp_path / "new.json").write_text("{}")
    with pytest.raises(DataError, match=r"new\.json"):
        compare_reports(tmp_path / "old.json", tmp_path / "new.json")
