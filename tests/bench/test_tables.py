"""The tables and the Markdown hold what was measured and fit where they are shown."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from report_sample import passing_report, sample_report
from rich.cells import cell_len

from pmm_edge.bench.html import render
from pmm_edge.bench.report import Invariant, InvariantName
from pmm_edge.bench.tables import (
    NOT_MEASURED,
    Table,
    cost_table,
    environment_rows,
    escaped,
    latency_table,
    markdown,
    milliseconds,
    named,
    parity_table,
    points,
    retrieval_table,
    stage_table,
    terminal_tables,
    verdict,
)

_NAME_WIDTH = 12
"""Longer model names are wrapped in 80 columns."""


def width(table: Table) -> int:
    """Width of a table in a terminal."""
    texts = [list(column) for column in zip(table.columns, *table.rows, strict=True)]
    widest = [max(cell_len(line) for text in column for line in text.split("\n")) for column in texts]
    return min(widest[0], _NAME_WIDTH) + sum(widest[1:]) + 3 * len(widest) + 1


def test_parity_retrieval_and_latency_of_each_model(tmp_path: Path) -> None:
    report = sample_report(tmp_path)
    rows = parity_table(report).rows
    assert [row[0] for row in rows] == [name for name, _ in named(report)]
    assert [row[-1] for row in rows] == ["reference", "passes", "passes", "passes", "fails"]
    assert rows[0][1:-1] == (NOT_MEASURED,) * 4
    assert rows[2][1] == "0.999987"
    retrieval, stages = retrieval_table(report), stage_table(report)
    assert retrieval
    assert stages
    assert (retrieval.rows[0][1], retrieval.rows[3][1]) == ("46.70", "46.41 -0.29\n(-0.49…-0.09)")
    assert stages.columns == ("model", "I", "II", "III")
    latency = latency_table(report, "model")
    assert latency
    assert [row[1] for row in latency.rows] == ["1"] * 5 + ["8"] * 5 + ["32"] * 5
    assert [row[-1] for row in latency.rows[:2]] == ["1.00", "0.33 0.32–0.34"]


def test_paths_in_the_home_folder_do_not_show_the_user_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    report = replace(passing_report(tmp_path), data="/home/alice/data/market1501")
    assert parity_table(report).title.endswith(" of ~/data/market1501")
    assert "alice" not in markdown(report) + render(report)


def test_tables_fit_80_columns(tmp_path: Path) -> None:
    report = sample_report(tmp_path)
    broken = [Invariant(InvariantName.EQUAL_ROWS, False, 0.1, 1e-4), *report.models[0].invariants[:3]]
    tables = terminal_tables(replace(report, models=[replace(report.models[0], invariants=broken), *report.models[1:]]))
    assert len(tables) == 6
    assert [table.title for table in tables if width(table) > 80] == []
    assert "broken" in tables[1].rows[1]


def test_tables_that_were_measured(tmp_path: Path) -> None:
    report = passing_report(tmp_path)
    for model in report.models:
        model.energy = None
    cost = cost_table(report)
    assert cost
    assert [row[-1] for row in cost.rows] == ["0.21", *[NOT_MEASURED] * 3]
    assert {row[-2] for row in cost.rows} == {NOT_MEASURED}  # no GPU
    for model in (report.reference, *report.models):
        model.energy, model.cold_start, model.retrieval, model.latency = None, None, None, []
    assert cost_table(report) is None
    assert retrieval_table(report) is None
    assert latency_table(report, "model") is None


def test_models_with_equal_names_get_distinct_ones(tmp_path: Path) -> None:
    report = passing_report(tmp_path)
    for model, path in zip(report.models, ("a/m.onnx", "b/m.onnx", "b/m.onnx"), strict=True):
        model.path = path
    names = [name for name, _ in named(report)]
    assert names[:2] == ["best.pt", "a/m.onnx"]
    assert len(set(names)) == 4


def test_the_verdict(tmp_path: Path) -> None:
    report, failing = passing_report(tmp_path), sample_report(tmp_path)
    assert verdict(report).state == "passes"
    assert verdict(failing).state == "fails"
    assert "model-bgr.onnx" in verdict(failing).sentence
    assert verdict(replace(failing, complete=False)).state == "partial"
    report.models[0].parity = None
    assert [row[-1] for row in parity_table(report).rows] == ["reference", "not judged", "passes", "passes"]


def test_unknown_parts_of_the_environment_are_left_out(tmp_path: Path) -> None:
    rows = dict(environment_rows(sample_report(tmp_path).environment))
    assert rows["processor"] == "AMD EPYC"
    assert rows["instruction set"] == "avx512_vnni"
    assert all(rows.values())
    assert not {"GPU", "board", "load before"} & rows.keys()


def test_markdown_has_all_tables_with_complete_rows(tmp_path: Path) -> None:
    report = sample_report(tmp_path)
    for number, model in enumerate(report.models):
        model.path = f"a|b{number}\n.onnx"
    text = markdown(report)
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert len(blocks) == 6
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_numbers_and_names() -> None:
    assert [milliseconds(value) for value in (0.123, 7.47, 51.08, 1204.3)] == ["0.12", "7.47", "51.1", "1,204"]
    assert [points(value) for value in (0.0012, -0.0012, -1e-9, 0.0)] == ["+0.12", "-0.12", "+0.00", "+0.00"]
    assert escaped("<img src=x>`a`|b*c_d") == r"\<img src=x\>\`a\`\|b\*c\_d"
    assert "@octocat" not in escaped("by @octocat")
    assert "#12" not in escaped("see #12")
    assert "\n" not in escaped("a\n# b")
