"""`pmm data` and `pmm synth`."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

SMALL = ["--train-identities", 2, "--test-identities", 1, "--cameras", 2, "--images", 2, "--workers", 1]


@pytest.fixture
def data(tiny_dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dataset, tmp_path / "tiny"))


def test_counts(pmm: Callable, data: Path) -> None:
    ended = pmm("data", data)
    assert ended.exit_code == 0, ended.stderr
    row = next(line for line in ended.stdout.splitlines() if "gallery" in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == ["gallery", "4", "3", "12", "0", "0"]
    facts = json.loads(pmm("data", data, "--json").stdout)
    assert (facts["layout"], facts["expected"], facts["unreadable"]) == ("market-layout", None, None)
    assert facts["splits"]["query"] == {"identities": 4, "cameras": 3, "images": 12, "distractors": 0, "junk": 0}


def test_a_known_set_is_compared_with_its_published_size(pmm: Callable, data: Path) -> None:
    ended = pmm("data", data, "--layout", "market1501")
    assert ended.exit_code == 0  # a warning is not a failure
    assert ended.stdout.count("warning: ") == 3
    facts = json.loads(pmm("data", data, "--layout", "market1501", "--json").stdout)
    assert [warning["kind"] for warning in facts["warnings"]] == ["unexpected-size"] * 3
    assert facts["expected"]["gallery"]["images"] == 15_913


def test_decode_names_unreadable_files(pmm: Callable, data: Path) -> None:
    assert pmm("data", data, "--decode").exit_code == 0
    broken = sorted((data / "query").iterdir()) + sorted((data / "bounding_box_test").iterdir())
    for path in broken:
        path.write_bytes(path.read_bytes()[:300])
    ended = pmm("data", data, "--decode")
    assert ended.exit_code == 1
    assert ended.stderr.count("unreadable: ") == 21
    assert f"{broken[0]}: " in ended.stderr
    assert "24 of 36" in ended.stderr.splitlines()[-1]
    ended = pmm("data", data, "--decode", "--json")
    assert ended.exit_code == 1
    assert [item["path"] for item in json.loads(ended.stdout)["unreadable"]] == [str(path) for path in broken]


def test_synth(pmm: Callable, tmp_path: Path) -> None:
    folder, sheet = tmp_path / "set", tmp_path / "pictures" / "sheet.jpg"
    ended = pmm("synth", folder, *SMALL, "--sheet", sheet, "--json")
    assert ended.exit_code == 0, ended.stderr
    printed = json.loads(ended.stdout)
    assert (printed["folder"], printed["config"]["train_identities"]) == (str(folder), 2)
    assert printed["images"]["bounding_box_train"] == len(list((folder / "bounding_box_train").iterdir())) == 8
    with Image.open(sheet) as image:
        assert image.format == "JPEG"
    assert "bounding_box_test" in pmm("synth", tmp_path / "other", *SMALL).stdout
