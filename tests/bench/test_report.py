"""Reports are read back as they were written; anything else is refused with one line."""

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
    content: dict[str, Any] = json.loads(sample_report(tmp_path / "data").to_json())
    return content


def write(raw: object, folder: Path) -> Path:
    path = folder / "bench.json"
    path.write_text(json.dumps(raw))
    return path


def test_round_trip(tmp_path: Path) -> None:
    sample = sample_report(tmp_path / "data")
    sample.save(tmp_path / "bench.json")
    assert read_report(tmp_path / "bench.json") == sample
    parity = sample.models[0].parity
    assert parity is not None
    sample.models[0].parity = replace(parity, whole=replace(parity.whole, largest_relative=math.inf))
    sample.save(tmp_path / "bench.json")
    read = read_report(tmp_path / "bench.json").models[0].parity
    assert read is not None
    assert read.whole.largest_relative is None  # what is not finite is null


def test_unknown_entries_are_ignored_and_optional_ones_may_be_missing(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["added"] = raw["reference"]["added"] = {"some": ["thing"]}
    del raw["warnings"], raw["reference"]["energy"]
    read = read_report(write(raw, tmp_path))
    assert (read.warnings, read.reference.energy) == ([], None)
    del raw["models"][1]["file_bytes"]
    with pytest.raises(DataError, match="file_bytes"):
        read_report(write(raw, tmp_path))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("schema",), 2),
        (("images",), "many"),
        (("images",), True),
        (("complete",), 1),
        (("reference", "sha256"), None),
        (("models",), {}),
        (("models", 0, "latency", 0, "median_ms"), "7"),
        (("models", 0, "latency", 0, "scope"), "all"),
        (("models", 0, "latency", 0, "batch"), 0),
        (("models", 0, "latency", 0, "median_ms"), -1),
        (("models", 0, "parity", "cosine_quantiles"), [1.0]),
        (("models", 3, "failures", 0, "kind"), "bad luck"),
        (("environment", "cores"), "2"),
    ],
)
def test_wrong_entries_are_named(
    where: tuple[str | int, ...], value: object, raw: dict[str, Any], tmp_path: Path
) -> None:
    place: Any = raw
    for step in where[:-1]:
        place = place[step]
    place[where[-1]] = value
    with pytest.raises(DataError) as caught:
        read_report(write(raw, tmp_path))
    assert "bench.json" in str(caught.value)
    assert str(where[-1] if isinstance(where[-1], str) else where[-2]) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[1, 2", b"\xff\xfe", b"[" * 100_000, b'{"schema": NaN}', b"3", b"{}"])
def test_files_that_are_not_reports_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_bytes(content)
    with pytest.raises(DataError, match=r"bench\.json") as caught:
        read_report(tmp_path / "bench.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError):
        read_report(tmp_path)


def test_the_schema_page_documents_every_entry() -> None:
    sections = dict(re.findall(r"^## `(\w+)`.*?\n(.*?)(?=^## |\Z)", _SCHEMA_PAGE.read_text(), re.M | re.S))
    kinds = [kind for kind in vars(report).values() if isinstance(kind, type) and is_dataclass(kind)]
    assert spec.RetrievalFigures in kinds
    assert sections.keys() == {kind.__name__ for kind in kinds}
    for kind in kinds:
        documented = re.findall(r"^\| `(\w+)` \|", sections[kind.__name__], re.M)
        derived = ["passed"] if kind is report.BenchReport else []
        assert documented == derived + [field.name for field in fields(kind)], kind.__name__
