"""Better and worse are told from noise, and what cannot be compared is said."""

from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path

import pytest
from report_sample import passing_report

from pmm_edge.bench.regression import Comparison, compare_reports, comparison_table
from pmm_edge.bench.report import BenchReport, Latency, ModelReport
from pmm_edge.bench.report import Change as Interval
from pmm_edge.errors import DataError

Change = Callable[[ModelReport], ModelReport]


@pytest.fixture
def report(tmp_path: Path) -> BenchReport:
    return passing_report(tmp_path / "data")


def compared(old: BenchReport, new: BenchReport, folder: Path) -> Comparison:
    old.save(folder / "old.json")
    new.save(folder / "new.json")
    return compare_reports(folder / "old.json", folder / "new.json")


def with_model(report: BenchReport, number: int, change: Change) -> BenchReport:
    models = list(report.models)
    models[number] = change(models[number])
    return replace(report, models=models)


def slower(factor: float) -> Change:
    def change(model: ModelReport) -> ModelReport:
        return replace(model, latency=[scaled(latency, factor) for latency in model.latency])

    return change


def scaled(latency: Latency, factor: float) -> Latency:
    names = ("median_ms", "p90_ms", "p99_ms", "ratio", "ratio_low", "ratio_high")
    return replace(latency, **{name: factor * getattr(latency, name) for name in names})


def less_accurate(points: float) -> Change:
    def change(model: ModelReport) -> ModelReport:
        assert model.retrieval is not None
        return replace(model, retrieval=replace(model.retrieval, mAP=model.retrieval.mAP - points / 100))

    return change


def test_a_report_beside_itself_has_neither_better_nor_worse(report: BenchReport, tmp_path: Path) -> None:
    found = compared(report, report, tmp_path)
    assert (found.regressions, found.improvements, found.notes) == ([], [], [])
    assert {finding.way for finding in found.findings} == {"same"}
    figures = {finding.figure for finding in found.findings if finding.model == "model.onnx"}
    assert {"mAP", "least cosine", "batch 8, ms", "batch 8, end to end, ms", "file, MiB", "peak memory, MiB"} <= figures
    assert comparison_table(found).rows == []


def test_the_table_shows_what_changed_and_fits_80_columns(report: BenchReport, tmp_path: Path) -> None:
    faster = with_model(with_model(report, 0, slower(0.7)), 1, slower(1.3))
    found = compared(report, faster, tmp_path)
    shown = [row[4] for row in comparison_table(found).rows]
    assert shown == ["worse"] * len(found.regressions) + ["better"] * len(found.improvements)
    assert found.regressions and found.improvements
    everything = [replace(finding, way="better") for finding in found.findings]
    table = comparison_table(replace(found, findings=everything))
    assert len(table.rows) == len(everything)
    widest = [max(len(line) for row in table.rows for line in row[column].split("\n")) for column in range(1, 5)]
    assert sum(widest) <= 44  # leaves 20 of 80 columns for the name, which may break


def test_a_slower_model_is_a_regression_beyond_5_percent(report: BenchReport, tmp_path: Path) -> None:
    assert compared(report, with_model(report, 0, slower(1.04)), tmp_path).regressions == []
    worse = compared(report, with_model(report, 0, slower(1.3)), tmp_path)
    assert len(worse.regressions) == 2 * len(report.models[0].latency)  # the median and p90
    assert "model.onnx: batch 1, ms became worse: 7.49 -> 9.74 (x1.30, noise ± 5 %)" in worse.regressions
    better = compared(report, with_model(report, 0, slower(0.7)), tmp_path)
    assert better.regressions == []
    assert len(better.improvements) == 2 * len(report.models[0].latency)


def test_a_restless_measurement_allows_more(report: BenchReport, tmp_path: Path) -> None:
    def restless(model: ModelReport) -> ModelReport:
        wide = [replace(own, ratio_low=0.8 * own.ratio, ratio_high=1.2 * own.ratio) for own in model.latency]
        return replace(model, latency=wide)

    assert compared(report, with_model(with_model(report, 0, slower(1.15)), 0, restless), tmp_path).regressions == []


def test_on_another_machine_times_are_compared_through_the_reference(report: BenchReport, tmp_path: Path) -> None:
    everything = [slower(3)(model) for model in (report.reference, *report.models)]
    same_ratios = [
        replace(
            model,
            latency=[
                replace(own, ratio=own.ratio / 3, ratio_low=own.ratio_low / 3, ratio_high=own.ratio_high / 3)
                for own in model.latency
            ],
        )
        for model in everything
    ]
    elsewhere = replace(
        report, reference=same_ratios[0], models=same_ratios[1:], environment={"processor": "ARM", "cores": "6"}
    )
    found = compared(report, elsewhere, tmp_path)
    assert found.regressions == []
    assert any("through the ratio to the reference" in note and "processor ARM" in note for note in found.notes)
    assert not any("memory" in finding.figure for finding in found.findings)
    worse = compared(report, with_model(elsewhere, 2, slower(1.5)), tmp_path)
    assert worse.regressions
    assert all("ratio to the reference" in sentence for sentence in worse.regressions)


def test_another_driver_is_the_same_machine_and_another_gpu_is_not(report: BenchReport, tmp_path: Path) -> None:
    def on(gpu: str) -> BenchReport:
        return replace(report, environment={**report.environment, "gpu": gpu})

    assert compared(on("H100, driver 570"), on("H100, driver 580"), tmp_path).notes == []
    assert compared(on("H100, driver 570"), on("H200, driver 570"), tmp_path).notes != []


def test_the_same_machine_whatever_engines_were_loaded(report: BenchReport, tmp_path: Path) -> None:
    def threads(told: str) -> BenchReport:
        return replace(report, environment={**report.environment, "threads": told})

    with_torch = threads("OMP_NUM_THREADS=2, torch 2, onnxruntime: one for each core")
    without = threads("OMP_NUM_THREADS=2, onnxruntime 2")
    assert compared(with_torch, without, tmp_path).notes == []
    told = compared(with_torch, threads("OMP_NUM_THREADS=1, torch 1"), tmp_path).notes
    assert "threads OMP_NUM_THREADS=2; " in told[0]


def test_a_bench_that_used_no_gpu_is_of_no_other_machine(report: BenchReport, tmp_path: Path) -> None:
    on_gpu = replace(report, environment={**report.environment, "gpu": "H100, driver 570"})
    assert compared(report, on_gpu, tmp_path).notes == []


def elsewhere(report: BenchReport) -> BenchReport:
    return replace(report, environment={"processor": "ARM", "cores": "6"})


@pytest.mark.parametrize("entry", [{"sha256": "b" * 64}, {"backend": "onnxruntime"}, {"device": "cuda:0"}])
def test_ratios_to_different_references_are_not_compared(
    entry: dict[str, str], report: BenchReport, tmp_path: Path
) -> None:
    other = with_model(elsewhere(report), 0, slower(2.5))
    assert compared(report, other, tmp_path).regressions
    found = compared(report, replace(other, reference=replace(other.reference, **entry)), tmp_path)
    assert found.regressions == []
    assert not any("ratio" in finding.figure for finding in found.findings)
    (note,) = [note for note in found.notes if "not compared" in note and "machines differ" in note]
    assert "no ratio to the same reference (best.pt with torch on cpu; best.pt with " in note


def test_a_model_on_another_device_has_no_ratio_that_carries_over(report: BenchReport, tmp_path: Path) -> None:
    def on_gpu(model: ModelReport) -> ModelReport:
        return replace(model, device="cuda:0")

    slow = with_model(elsewhere(report), 0, slower(2.5))
    for old, new in ((report, with_model(slow, 0, on_gpu)), [with_model(one, 0, on_gpu) for one in (report, slow)]):
        found = compared(old, new, tmp_path)
        assert found.regressions == []
        assert any(note.startswith("model.onnx: its times are not compared") for note in found.notes)
        assert any(finding.model == "model-fp16.onnx" and "ratio" in finding.figure for finding in found.findings)


def with_tail(report: BenchReport, p90: float, p99: float, variation: float = 0.06) -> BenchReport:
    """The first model's tails, as factors of its medians."""

    def change(model: ModelReport) -> ModelReport:
        tails = [
            replace(own, p90_ms=p90 * own.median_ms, p99_ms=p99 * own.median_ms, variation=variation)
            for own in model.latency
        ]
        return replace(model, latency=tails)

    return with_model(report, 0, change)


def test_a_tail_that_grew_is_a_regression_though_the_median_stayed(report: BenchReport, tmp_path: Path) -> None:
    quiet = with_tail(report, 1.05, 1.1)
    assert compared(quiet, with_tail(report, 1.12, 1.2), tmp_path).regressions == []  # below 10 %
    sentences = compared(quiet, with_tail(report, 1.3, 1.4), tmp_path).regressions
    assert len(sentences) == len(report.models[0].latency)
    assert sentences[0] == "model.onnx: batch 1, p90 ms became worse: 7.87 -> 9.74 (x1.24, noise ± 10 %)"


def test_a_slow_turn_more_or_less_is_noise(report: BenchReport, tmp_path: Path) -> None:
    # Less than a tenth of the runs are slow in one bench, and p99 shows them; more than a tenth in the other.
    assert compared(with_tail(report, 1.02, 1.4), with_tail(report, 1.38, 1.4), tmp_path).regressions == []
    # Both vary by 14 %: together ± 20 %.
    old, new = with_tail(report, 1.05, 1.1, 0.14), with_tail(report, 1.25, 1.3, 0.14)
    assert compared(old, new, tmp_path).regressions == []


def test_the_tails_of_noisy_timings_are_named_and_not_judged(report: BenchReport, tmp_path: Path) -> None:
    found = compared(with_tail(report, 1.05, 1.1), with_tail(report, 2.2, 2.4, 0.35), tmp_path)
    assert found.regressions == []
    (note,) = found.notes
    assert note.startswith("model.onnx: moved, in timings too noisy to judge it: batch 1, p90 ms 7.87 -> 16.5; batch 8")
    assert {finding.way for finding in found.findings if "p90" in finding.figure} == {"same", "unknown"}
    noisy = with_tail(report, 2.2, 2.4, 0.35)
    assert compared(noisy, noisy, tmp_path).notes == []


def test_a_slower_reference_is_said_beside_the_times(report: BenchReport, tmp_path: Path) -> None:
    found = compared(report, replace(report, reference=slower(1.4)(report.reference)), tmp_path)
    assert any("the unchanged reference takes x1.40 at batch 1" in note for note in found.notes)


def test_accuracy_is_compared_beyond_both_intervals(report: BenchReport, tmp_path: Path) -> None:
    # Each interval is ± 0.2 points: together ± 0.28.
    assert compared(report, with_model(report, 2, less_accurate(0.25)), tmp_path).regressions == []
    (sentence,) = compared(report, with_model(report, 2, less_accurate(0.35)), tmp_path).regressions
    assert sentence.startswith("model-int8-cpu.onnx: mAP became worse: 46.41 -> 46.06 (-0.35 points, noise ± 0.28")


def test_after_a_new_training_only_the_change_to_the_own_reference_is_compared(
    report: BenchReport, tmp_path: Path
) -> None:
    def moved(model: ModelReport, change: float) -> ModelReport:
        """All mAP three points lower; the change to the reference moved by as many points as asked."""
        assert model.retrieval is not None
        own = model.retrieval_change
        if own:
            own = replace(own, mAP=Interval(*(value + change / 100 for value in astuple(own.mAP))))
        return replace(less_accurate(3)(model), retrieval_change=own)

    def retrained(change: float) -> BenchReport:
        reference = replace(moved(report.reference, 0), sha256="b" * 64)
        return replace(report, reference=reference, models=[moved(model, change) for model in report.models])

    found = compared(report, retrained(0.25), tmp_path)
    assert (found.regressions, found.improvements) == ([], [])
    assert any("less its own reference's" in note for note in found.notes)
    assert not any("mAP" in finding.figure for finding in found.findings if finding.model == "best.pt")
    int8 = [sentence for sentence in compared(report, retrained(-0.35), tmp_path).regressions if "int8" in sentence]
    assert int8 == [
        "model-int8-cpu.onnx: mAP less the reference's became worse: -0.29 -> -0.64 (-0.35 points, noise ± 0.28 points)"
    ]


def test_figures_far_below_1_keep_their_digits(report: BenchReport, tmp_path: Path) -> None:
    def drawing(joules: float) -> BenchReport:
        energy = report.models[0].energy
        assert energy is not None
        return with_model(report, 0, lambda model: replace(model, energy=replace(energy, joules_per_embedding=joules)))

    (sentence,) = compared(drawing(0.0042), drawing(0.00631), tmp_path).regressions
    assert "0.0042 -> 0.00631" in sentence


def test_other_images_are_no_comparison_of_accuracy(report: BenchReport, tmp_path: Path) -> None:
    other = replace(with_model(report, 2, less_accurate(5)), data_sha256="e" * 64)
    found = compared(report, other, tmp_path)
    assert found.regressions == []
    assert any("accuracy is not compared" in note for note in found.notes)
    assert not any(finding.figure in ("mAP", "least cosine") for finding in found.findings)


def test_cosine_is_worse_where_it_comes_near_its_gate(report: BenchReport, tmp_path: Path) -> None:
    def departed(share: float) -> Change:
        def change(model: ModelReport) -> ModelReport:
            assert model.parity is not None
            whole = replace(model.parity.whole, cosine_min=1 - share)
            return replace(model, parity=replace(model.parity, whole=whole))

        return change

    assert compared(report, with_model(report, 0, departed(9e-6)), tmp_path).regressions == []  # of 1e-4 allowed
    (sentence,) = compared(report, with_model(report, 0, departed(5e-5)), tmp_path).regressions
    assert "least cosine became worse" in sentence


def test_a_loosened_gate_hides_nothing(report: BenchReport, tmp_path: Path) -> None:
    def loose(model: ModelReport) -> ModelReport:
        assert model.parity is not None
        whole = replace(model.parity.whole, cosine_min=0.95, cosine_mean=0.96)
        gates = replace(model.gates, min_cosine=0.1, max_map_drop=3.0, max_stretch=2.0)
        return replace(model, gates=gates, parity=replace(model.parity, whole=whole))

    found = compared(report, with_model(report, 0, loose), tmp_path)
    assert [sentence.split(" became")[0] for sentence in found.regressions] == [
        "model.onnx: least cosine",
        "model.onnx: mean cosine",
    ]
    assert found.notes == [
        "model.onnx: its gates were loosened (least cosine 0.9999 -> 0.1, loss of mAP 0.1 -> 3, ratio of lengths"
        " 1.001 -> 2); cosines are compared by the stricter ones"
    ]
    tightened = compared(with_model(report, 0, loose), report, tmp_path)
    assert (tightened.regressions, tightened.notes) == ([], [])


def test_a_gate_that_fails_now_and_a_model_that_is_gone(report: BenchReport, tmp_path: Path) -> None:
    failing = with_model(report, 1, lambda model: replace(model, failures=["gives NaN for 1 of 9 images"]))
    assert compared(report, failing, tmp_path).regressions == [
        "model-fp16.onnx passed and fails now: gives NaN for 1 of 9 images"
    ]
    back = compared(failing, report, tmp_path)
    assert back.regressions == []
    assert "model-fp16.onnx failed and passes now" in back.notes
    gone = compared(report, replace(report, models=report.models[1:]), tmp_path)
    assert gone.regressions == ["model.onnx (fp32) is not in the new report"]
    assert "model.onnx (fp32) is new" in compared(replace(report, models=report.models[1:]), report, tmp_path).notes


def test_memory_and_file_size(report: BenchReport, tmp_path: Path) -> None:
    def larger(model: ModelReport) -> ModelReport:
        assert model.cold_start is not None
        cold = replace(model.cold_start, peak_memory_mib=1.2 * model.cold_start.peak_memory_mib)
        return replace(model, file_bytes=2 * model.file_bytes, cold_start=cold)

    sentences = compared(report, with_model(report, 0, larger), tmp_path).regressions
    assert [sentence.split(" became")[0] for sentence in sentences] == [
        "model.onnx: file, MiB",
        "model.onnx: peak memory, MiB",
    ]


def test_an_interrupted_bench_and_lost_figures(report: BenchReport, tmp_path: Path) -> None:
    lost = with_model(replace(report, complete=False), 0, lambda model: replace(model, latency=[], energy=None))
    found = compared(report, lost, tmp_path)
    assert any("interrupted" in sentence for sentence in found.regressions)
    (note,) = found.notes
    assert note.startswith("model.onnx: measured before and not now: energy, batch 1 (end to end)")
    assert "batch 8 (model)" in note


def test_a_report_that_cannot_be_read_is_named(report: BenchReport, tmp_path: Path) -> None:
    report.save(tmp_path / "old.json")
    (tmp_path / "new.json").write_text("{}")
    with pytest.raises(DataError, match=r"new\.json"):
        compare_reports(tmp_path / "old.json", tmp_path / "new.json")
