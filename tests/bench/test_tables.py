"""The tables and the Markdown hold what was measured and fit where they are shown."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from report_sample import passing_report, sample_report
from rich.cells import cell_len

from pmm_edge.bench import tables
from pmm_edge.bench.html import render
from pmm_edge.bench.report import BenchWarning, Failure, FailureKind, Invariant, InvariantName, WarningKind
from pmm_edge.bench.tables import NOT_MEASURED, Table

_NAME_WIDTH = 12
"""Longer model names are wrapped in 80 columns."""


def width(table: Table) -> int:
    """Width of a table in a terminal."""
    texts = [list(column) for column in zip(table.columns, *table.rows, strict=True)]
    widest = [max(cell_len(line) for text in column for line in text.split("\n")) for column in texts]
    return min(widest[0], _NAME_WIDTH) + sum(widest[1:]) + 3 * len(widest) + 1


def test_parity_retrieval_and_latency_of_each_model() -> None:
    report = sample_report(Path())
    parity, retrieval, decisions, latency, end_to_end, cost = found = tables.all_tables(report)
    assert [table.title for table in found if width(table) > 80] == []
    assert [row[0] for row in parity.rows] == [name for name, _ in tables.named(report)]
    assert [row[-1] for row in parity.rows] == ["reference", "passes", "passes", "passes", "fails"]
    assert parity.rows[0][1:-1] == (NOT_MEASURED,) * 4
    assert parity.rows[2][1:3] == ("0.999987", "0.999987")
    assert (retrieval.rows[0][1], retrieval.rows[3][1]) == ("46.70", "46.41 -0.29\n(-0.49…-0.09)")
    cells = ("euclidean 0.001", "1.0e-03 ×1.00\n(0.97…1.02)", "26.90 -0.11\n(-0.37…+0.13)", "74")
    assert decisions.rows[4][1:] == cells
    assert decisions.rows[5][1:] == ("cosine 0.0001", "1.0e-04 ×1.00", "23.60 +0.00", "0")
    assert [row[1] for row in latency.rows] == ["1"] * 5 + ["8"] * 5 + ["32"] * 5
    assert [row[-1] for row in latency.rows[:2]] == ["1.00", "0.33 0.32–0.34"]
    assert len(end_to_end.rows) == 15
    assert cost.rows[0][-1] == "0.21"


def test_tables_that_were_measured() -> None:
    report = passing_report(Path())
    for model in report.models:
        model.energy = None
    assert [row[-1] for row in tables.all_tables(report)[-1].rows] == ["0.21", *[NOT_MEASURED] * 3]
    for model in (report.reference, *report.models):
        model.energy, model.cold_start, model.retrieval, model.decisions, model.latency = None, None, None, None, []
    assert tables.all_tables(report) == [tables.parity_table(report)]


def test_paths_in_the_home_folder_do_not_show_the_user_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    report = passing_report(Path("/home/alice/data/market1501"))
    assert tables.parity_table(report).title.endswith(" of ~/data/market1501")
    assert "alice" not in tables.markdown(report) + render(report)


def test_models_with_equal_names_get_distinct_ones() -> None:
    report = passing_report(Path())
    for model, path in zip(report.models, ("a/m.onnx", "b/m.onnx", "b/m.onnx"), strict=True):
        model.path = path
    names = [name for name, _ in tables.named(report)]
    assert names[:2] == ["best.pt", "a/m.onnx"]
    assert len(set(names)) == 4


def test_the_verdict() -> None:
    report, failing = passing_report(Path()), sample_report(Path())
    assert tables.verdict(report)[0] == "passes"
    state, sentence = tables.verdict(failing)
    assert state == "fails"
    assert "model-bgr.onnx" in sentence
    assert tables.verdict(replace(failing, complete=False))[0] == "partial"
    report.models[0].parity = None
    assert [row[-1] for row in tables.parity_table(report).rows] == ["reference", "not judged", "passes", "passes"]


def test_every_kind_has_a_sentence() -> None:
    decisions = sample_report(Path()).models[0].decisions
    assert decisions is not None
    values = {"value": 0.5, "limit": 1.0, "image": "a.jpg", "decision": decisions.thresholds[0]}
    for kind in set(FailureKind) - {FailureKind.INVARIANT}:
        assert tables.describe_failure(Failure(kind, **values))
    for name in InvariantName:
        for value in (0.5, None) if name is not InvariantName.UNIT_LENGTH else (0.5,):
            broken = Invariant(name, False, value, 1e-4, "a.jpg", batch=8, row=1, neighbors="noise")
            assert "a.jpg" in tables.describe_failure(Failure(FailureKind.INVARIANT, invariant=broken))
    for kind in WarningKind:
        assert tables.describe_warning(BenchWarning(kind, "a/m.onnx", 0.5, 1.0, 1, 2, detail="why"))


def test_unknown_parts_of_the_environment_are_left_out() -> None:
    rows = dict(tables.environment_rows(sample_report(Path())))
    assert rows["processor"] == "AMD EPYC"
    assert rows["instruction set"] == "avx512_vnni"
    assert all(rows.values())
    assert not {"GPU", "board", "load before"} & rows.keys()


def test_markdown_has_all_tables_with_complete_rows() -> None:
    report = sample_report(Path())
    for number, model in enumerate(report.models):
        model.path = f"a|b{number}\n.onnx"
    blocks = re.findall(r"(?:^\|.*\n)+", tables.markdown(report), re.M)
    assert len(blocks) == 6
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_numbers_and_names() -> None:
    assert [tables.milliseconds(value) for value in (0.123, 7.47, 51.08, 1204.3)] == ["0.12", "7.47", "51.1", "1,204"]
    assert [tables.points(value) for value in (0.0012, -0.0012, -1e-9, 0.0)] == ["+0.12", "-0.12", "+0.00", "+0.00"]
    assert tables.escaped("<img src=x>`a`|b*c_d") == r"\<img src=x\>\`a\`\|b\*c\_d"
    assert "@octocat" not in tables.escaped("by @octocat")
    assert "#12" not in tables.escaped("see #12")
    assert "\n" not in tables.escaped("a\n# b")
