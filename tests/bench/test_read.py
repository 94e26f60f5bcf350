"""A report is read back as it was; anything else is refused in one line that names what is wrong."""

import json
import math
import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from report_sample import sample_report

from pmm_edge import spec
from pmm_edge.bench import report
from pmm_edge.bench.report import read_report
from pmm_edge.errors import DataError

_SCHEMA_PAGE = Path(__file__).parents[2] / "docs" / "bench-json.md"


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(json.dumps(sample_report(tmp_path / "data").to_json()))
    return content


def refused(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_report(path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
    return str(caught.value)


def test_a_report_comes_back_as_it_was(tmp_path: Path) -> None:
    report = sample_report(tmp_path / "data")
    report.save(tmp_path / "bench.json")
    assert read_report(tmp_path / "bench.json") == report


def test_a_figure_that_was_not_finite_is_nan(tmp_path: Path) -> None:
    report = sample_report(tmp_path / "data")
    parity = report.models[0].parity
    assert parity is not None
    infinite = replace(parity, whole=replace(parity.whole, largest_difference=math.inf))
    replace(report, models=[replace(report.models[0], parity=infinite)]).save(tmp_path / "bench.json")
    read = read_report(tmp_path / "bench.json").models[0].parity
    assert read is not None
    assert math.isnan(read.whole.largest_difference)


def test_entries_of_a_later_version_are_left_out(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["added"] = raw["reference"]["added"] = {"some": ["thing"]}
    (tmp_path / "bench.json").write_text(json.dumps(raw))
    assert read_report(tmp_path / "bench.json") == sample_report(tmp_path / "data")


def test_entries_with_a_default_may_be_missing(raw: dict[str, Any], tmp_path: Path) -> None:
    del raw["warnings"], raw["reference"]["stream"]
    (tmp_path / "bench.json").write_text(json.dumps(raw))
    report = read_report(tmp_path / "bench.json")
    assert (report.warnings, report.reference.stream) == ([], None)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("schema",), 2, "schema 2, this version of pmm-edge reads 1"),
        (("schema",), None, "names no schema"),
        (("images",), "many", "images is 'many', not a whole number"),
        (("images",), True, "images is True, not a whole number"),
        (("complete",), 1, "complete is 1, not true or false"),
        (("reference", "sha256"), None, "reference.sha256 is None, not text"),
        (("models",), {}, "models is {}, not a list"),
        (("models", 0, "latency", 0, "median_ms"), "7", "models[0].latency[0].median_ms is '7', not a number"),
        (("models", 0, "latency", 0, "scope"), "all", "is 'all', not one of model, end to end"),
        (("models", 0, "latency", 0, "batch"), 0, "has no batch"),
        (("models", 0, "latency", 0, "median_ms"), -1, "no time"),
        (("models", 0, "parity", "cosine_quantiles"), [1.0], "are 1, not 101"),
        (("environment",), {"cores": 2}, "environment['cores'] is 2, not text"),
        (("images",), 10**30, "images is larger than"),
    ],
)
def test_a_wrong_entry_is_named(
    where: tuple[str | int, ...], value: object, message: str, raw: dict[str, Any], tmp_path: Path
) -> None:
    place: Any = raw
    for step in where[:-1]:
        place = place[step]
    place[where[-1]] = value
    (tmp_path / "bench.json").write_text(json.dumps(raw))
    assert message in refused(tmp_path / "bench.json")


def test_a_missing_entry_is_named(raw: dict[str, Any], tmp_path: Path) -> None:
    del raw["models"][1]["gates"]["min_cosine"], raw["models"][1]["file_bytes"]
    (tmp_path / "bench.json").write_text(json.dumps(raw))
    assert "models[1].file_bytes is missing" in refused(tmp_path / "bench.json")


@pytest.mark.parametrize(
    "content", [b"", b"[1, 2", b"\xff\xfe", b"[" * 100_000, b'{"schema": NaN}', b"3", b'{"schema": 1}', b'"schema"']
)
def test_what_is_no_report_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_bytes(content)
    refused(tmp_path / "bench.json")


def test_numbers_beyond_all_numbers_are_refused(raw: dict[str, Any], tmp_path: Path) -> None:
    text = json.dumps(raw).replace('"gpu_ms": null', '"gpu_ms": 1e999', 1)
    (tmp_path / "bench.json").write_text(text)
    assert "gpu_ms is larger than any number" in refused(tmp_path / "bench.json")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "bench.json")
    assert "directory" in refused(tmp_path)


def test_every_entry_is_documented_and_nothing_else() -> None:
    sections = dict(re.findall(r"^## `(\w+)`.*?\n(.*?)(?=^## |\Z)", _SCHEMA_PAGE.read_text(), re.M | re.S))
    kinds = [kind for kind in vars(report).values() if isinstance(kind, type) and is_dataclass(kind)]
    assert spec.RetrievalFigures in kinds
    assert sections.keys() == {kind.__name__ for kind in kinds}
    for kind in kinds:
        documented = re.findall(r"^\| `(\w+)` \|", sections[kind.__name__], re.M)
        derived = ["passed"] if kind is report.BenchReport else []
        assert documented == derived + [field.name for field in fields(kind)], kind.__name__
