from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from pmm_edge.cli import app, main

SMALL = ["--train-identities", "2", "--test-identities", "1", "--cameras", "2", "--images", "2", "--workers", "1"]


def test_json_says_what_was_written(tmp_path: Path) -> None:
    out = tmp_path / "set"
    result = CliRunner().invoke(app, ["synth", str(out), *SMALL, "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["folder"] == str(out)
    assert printed["config"]["train_identities"] == 2
    assert printed["images"]["bounding_box_train"] == len(list((out / "bounding_box_train").iterdir())) == 8


def test_table_and_contact_sheet(tmp_path: Path) -> None:
    sheet = tmp_path / "pictures" / "sheet.jpg"
    result = CliRunner().invoke(app, ["synth", str(tmp_path / "set"), *SMALL, "--sheet", str(sheet)])
    assert result.exit_code == 0, result.output
    assert "bounding_box_test" in result.stdout
    with Image.open(sheet) as image:
        assert image.format == "JPEG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cameras", "1"], "cameras is 1. Choose 2 to 9"),
        (["--images", "99"], "images is 99. Choose 2 to 32"),
        (["--sheet", "sheet.docx"], "cannot write sheet.docx: its name must end in .jpg or .jpeg or .png"),
        (["--sheet", "/proc/none/sheet.jpg"], "cannot write /proc/none/sheet.jpg"),
    ],
)
def test_a_bad_value_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pmm", "synth", "set", *SMALL, *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_full_folder_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["pmm", "synth", str(tmp_path), *SMALL])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "not an empty folder" in capsys.readouterr().err


def test_help_says_what_the_set_is_for() -> None:
    result = CliRunner().invoke(app, ["synth", "--help"])
    assert result.exit_code == 0
    assert "Market-1501" in result.stdout
    assert "--group-size" in result.stdout
