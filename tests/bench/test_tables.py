"""The tables hold what was measured, fit a terminal, and say so where nothing was measured."""

from dataclasses import replace
from pathlib import Path

import pytest
from report_sample import passing_report, sample_report
from rich.cells import cell_len

from pmm_edge.bench.html.page import html
from pmm_edge.bench.report import Invariant
from pmm_edge.bench.tables import (
    NONE,
    Table,
    cost_table,
    environment_table,
    invariant_table,
    latency_table,
    markdown,
    milliseconds,
    model_table,
    named,
    parity_table,
    retrieval_table,
    stage_table,
    terminal_tables,
    verdict,
)

_LONGEST_NAME = 12
"""Of a model in 80 columns; a longer one is broken."""


def width(table: Table) -> int:
    """Of the table in a terminal, its first column at `_LONGEST_NAME`."""
    texts = [list(column) for column in zip(table.columns, *table.rows, strict=True)]
    widest = [max(cell_len(line) for text in column for line in text.split("\n")) for column in texts]
    return min(widest[0], _LONGEST_NAME) + sum(widest[1:]) + 3 * len(widest) + 1


def test_parity_and_retrieval_are_told_for_each_model(tmp_path: Path) -> None:
    report = sample_report(tmp_path)
    rows = parity_table(report).rows
    assert [row[0] for row in rows] == [
        "best.pt",
        "model.onnx",
        "model-fp16.onnx",
        "model-int8-cpu.onnx",
        "model-bgr.onnx",
    ]
    assert [row[-1] for row in rows] == ["reference", "passes", "passes", "passes", "fails"]
    assert rows[0][1:-1] == (NONE,) * 4
    assert rows[2][1] == "0.999987"
    retrieval = retrieval_table(report)
    assert retrieval is not None
    assert retrieval.rows[0][1] == "46.70"
    assert retrieval.rows[3][1] == "46.41 -0.29\n(-0.49…-0.09)"
    assert retrieval.rows[3][-1] == "40"
    stages = stage_table(report)
    assert stages is not None
    assert stages.columns == ("model", "I", "II", "III")
    assert stages.rows[1][1].startswith("0.999987\n")


def test_a_folder_below_the_users_home_does_not_name_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    report = replace(sample_report(tmp_path), data="/home/alice/data/market1501")
    assert parity_table(report).title == "parity on 2,450 images of ~/data/market1501"
    assert ("data", "~/data/market1501") in environment_table(report).rows
    assert "alice" not in markdown(report) + html(report)
    assert report.to_json()["data"] == "/home/alice/data/market1501"
    elsewhere = replace(report, data="/home/alice-2/data")
    assert parity_table(elsewhere).title.endswith(" of /home/alice-2/data")


def test_a_model_that_nothing_was_compared_of_does_not_pass(tmp_path: Path) -> None:
    report = passing_report(tmp_path)
    report = replace(report, models=[replace(report.models[0], parity=None), *report.models[1:]], complete=False)
    assert [row[-1] for row in parity_table(report).rows] == ["reference", "not judged", "passes", "passes"]
    assert [row[-1] for row in model_table(report).rows] == ["reference", "not judged", "passes", "passes"]


def test_energy_that_could_not_be_measured_is_said(tmp_path: Path) -> None:
    report = passing_report(tmp_path)
    first, *others = (replace(model, energy=None) for model in report.models)
    report = replace(
        report, reference=replace(report.reference, energy=None), models=[replace(first, cold_start=None), *others]
    )
    table = cost_table(report)
    assert table is not None
    assert table.columns[-1] == "J an\nembed."
    assert [row[-1] for row in table.rows] == ["not\nmeasured", NONE, "not\nmeasured", "not\nmeasured"]
    assert width(table) <= 80


def test_latency_is_grouped_by_batch(tmp_path: Path) -> None:
    table = latency_table(sample_report(tmp_path), "model")
    assert table is not None
    assert [row[1] for row in table.rows] == ["1"] * 5 + ["8"] * 5 + ["32"] * 5
    assert table.rows[0][-1] == "1.00"
    assert table.rows[1][-1] == "0.33 0.32–0.34"


def test_every_terminal_table_fits_80_columns(tmp_path: Path) -> None:
    report = sample_report(tmp_path)
    broken = [Invariant("equal rows", False, "rows 0 and 3 differ"), *report.models[0].invariants[:3]]
    report = replace(report, models=[replace(report.models[0], invariants=broken), *report.models[1:]])
    tables = terminal_tables(report)
    assert [table.title for table in tables if width(table) > 80] == []
    assert any(table.title == "invariants" for table in tables)


def test_what_was_not_measured_has_no_table_and_no_column(tmp_path: Path) -> None:
    report = passing_report(tmp_path)
    bare = [
        replace(model, retrieval=None, retrieval_change=None, cold_start=None, compute=None, energy=None, latency=[])
        for model in (report.reference, *report.models)
    ]
    report = replace(report, reference=bare[0], models=bare[1:])
    assert retrieval_table(report) is None
    assert latency_table(report, "model") is None
    assert cost_table(report) is None
    full = cost_table(sample_report(tmp_path))
    assert full is not None
    assert not any("GPU" in column for column in full.columns)


def test_a_broken_invariant_is_in_its_cell(tmp_path: Path) -> None:
    report = passing_report(tmp_path)
    broken = replace(report.models[0], invariants=[Invariant("batch size", False, "batch 8 differs")])
    table = invariant_table(replace(report, models=[broken]))
    assert table is not None
    assert table.rows[1][table.columns.index("batch\nsize")] == "broken"
    assert table.rows[1][table.columns.index("finite")] == NONE


def test_models_of_one_name_are_told_apart(tmp_path: Path) -> None:
    report = passing_report(tmp_path)
    (first, second, third) = report.models
    same = [replace(first, path="a/m.onnx"), replace(second, path="b/m.onnx"), replace(third, path="b/m.onnx")]
    called = [name for name, _ in named(replace(report, models=same))]
    assert called[:2] == ["best.pt", "a/m.onnx"]
    assert len(set(called)) == 4


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123, "0.12"), (7.47, "7.47"), (51.08, "51.1"), (1204.3, "1,204"), (float("nan"), "not finite")],
)
def test_milliseconds_have_the_digits_that_say_something(value: float, text: str) -> None:
    assert milliseconds(value) == text


def test_the_verdict_says_what_was_measured(tmp_path: Path) -> None:
    report = passing_report(tmp_path)
    assert verdict(report).sentence == (
        "All 3 models hold their gates against best.pt: mAP moves by at most 0.29 points, at most 40 of 458 first"
        " hits change."
    )
    one = replace(report, models=report.models[:1])
    assert verdict(one).sentence == (
        "model.onnx holds its gates against best.pt: mAP moves by 0.00 points, 0 of 458 first hits change."
    )
    unjudged = replace(report, models=[replace(model, retrieval_change=None) for model in report.models[:2]])
    assert verdict(unjudged).sentence == "All 2 models hold their gates against best.pt: least cosine 0.999987."
    fails = replace(report, reference=replace(report.reference, failures=["gives NaN for 3 of 9 images"]))
    assert verdict(fails).sentence == "The reference best.pt fails: gives NaN for 3 of 9 images."
    assert verdict(replace(report, complete=False)).state == "partial"
