import json
import shutil

import pytest


@pytest.fixture
def data(tiny_dataset, tmp_path):
    return shutil.copytree(tiny_dataset, tmp_path / "tiny")


def test_the_table_tells_what_is_there(pmm, data):
    result = pmm("data", data)
    assert result.exit_code == 0, result.stderr
    assert "market-layout" in result.stdout and "nothing looks wrong" in result.stdout
    row = next(line for line in result.stdout.splitlines() if "gallery" in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == ["gallery", "4", "3", "12", "0", "0"]


def test_json(pmm, data):
    facts = json.loads(pmm("data", data, "--json").stdout)
    assert facts["layout"] == "market-layout" and facts["expected"] is None and facts["unreadable"] is None
    assert facts["splits"]["query"] == {"identities": 4, "cameras": 3, "images": 12, "distractors": 0, "junk": 0}


def test_a_named_set_is_compared_with_what_it_should_hold(pmm, data):
    result = pmm("data", data, "--layout", "market1501")
    assert result.exit_code == 0, "a warning is no failure"
    assert "train has 4 identities in 12 images, Market-1501 has 751 in 12,936" in result.stdout
    facts = json.loads(pmm("data", data, "--layout", "market1501", "--json").stdout)
    assert [warning["kind"] for warning in facts["warnings"]] == ["unexpected-size"] * 3
    assert facts["expected"]["gallery"]["images"] == 15_913


def test_splits_that_cannot_judge_are_still_shown(pmm, data):
    for path in (data / "query").iterdir():
        path.rename(path.with_name("9" + path.name))
    result = pmm("data", data)
    assert result.exit_code == 0
    assert "has a match in the gallery" in result.stdout and "12 of 12 queries" in result.stdout


def test_verify_names_unreadable_files(pmm, data):
    assert pmm("data", data, "--verify").exit_code == 0
    for path in sorted((data / "query").iterdir()) + sorted((data / "bounding_box_test").iterdir()):
        path.write_bytes(path.read_bytes()[:300])
    result = pmm("data", data, "--verify")
    assert result.exit_code == 1
    assert result.stdout.count("unreadable: ") == 21 and "and 4 more; --json names them all" in result.stdout
    assert str(sorted((data / "query").iterdir())[0]) in result.stdout
    assert "24 of 36 images cannot be read" in result.stderr and "Traceback" not in result.stderr
    result = pmm("data", data, "--verify", "--json")
    assert result.exit_code == 1 and len(json.loads(result.stdout)["unreadable"]) == 24


def test_bad_input_is_one_line(pmm, data, tmp_path):
    result = pmm("data", tmp_path / "nowhere")
    assert result.exit_code == 2 and "nowhere is not a folder" in result.stderr
    result = pmm("data", data, "--layout", "market1502")
    assert result.exit_code == 2 and "Did you mean 'market1501'?" in result.stderr
