"""What every command has in common, and the public Python functions."""

import inspect
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

import pmm_edge
from pmm_edge import cli, console
from pmm_edge.console import note, print_json, print_table, progress
from pmm_edge.data.synthetic import SyntheticConfig
from pmm_edge.errors import PmmError, PmmWarning
from pmm_edge.trainer.config import TrainConfig

COMMANDS = (
    "train", "export", "bench", "verify", "eval", "calibrate", "match", "embed", "visualize", "synth", "data", "doctor",
)  # fmt: skip
PATH = "/data/" + "a long name " * 15 + "/:smile:/[bold]x"


def parameters(command: str) -> dict[str, Any]:
    """The arguments and options of a command by the name of their parameter."""
    return {parameter.name: parameter for parameter in typer.main.get_command(cli.app).commands[command].params}


def flags(command: str) -> set[str]:
    return {flag for parameter in parameters(command).values() for flag in parameter.opts}


def test_help(pmm: Callable) -> None:
    shown = pmm("-h").ok
    assert all(f"{command} " in shown.stdout for command in COMMANDS)
    assert "--install-completion" in shown.stdout
    for command in COMMANDS:
        short, long = pmm(command, "-h"), pmm(command, "--help")
        assert (short.exit_code, short.stdout) == (0, long.stdout)


def test_help_and_settings_need_no_torch(pmm_without: Callable) -> None:
    for arguments in (["export", "-h"], ["train", "--preset", "edge", "--epochs", "3", "--print-config"]):
        assert pmm_without("torch onnxruntime", *arguments).ok


@pytest.mark.parametrize(("command", "config"), [("train", TrainConfig), ("synth", SyntheticConfig)])
def test_settings_are_declared_once(command: str, config: type) -> None:
    options = parameters(command)
    for setting in fields(config):
        if "help" in setting.metadata:
            assert options[setting.name].help.startswith(setting.metadata["help"])
            assert options[setting.name].rich_help_panel == setting.metadata.get("panel")


def test_options_have_the_same_name_everywhere() -> None:
    for command in COMMANDS:
        assert "--json" in flags(command)
    for command, own in {
        "train": {"--batch", "--lr", "--schedule", "--device"},
        "export": {"--input-form", "--batch-profile"},
        "bench": {"--batch-sizes"},
        "embed": {"--batch"},
        "visualize": {"--what"},
    }.items():
        assert {"--out", "-o", *own} <= flags(command)


def test_debug_before_or_after_the_command(pmm: Callable) -> None:
    for arguments in (["--debug", "data", "nowhere"], ["data", "nowhere", "--debug"]):
        with pytest.raises(PmmError, match="nowhere"):
            pmm(*arguments)


def test_shell_completion() -> None:
    environment = {**os.environ, "_PMM_COMPLETE": "complete_bash", "COMP_WORDS": "pmm vis", "COMP_CWORD": "1"}
    command = [sys.executable, "-c", "import sys; sys.argv = ['pmm']; from pmm_edge.cli import main; main()"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ended.stdout.split() == ["visualize"], ended.stderr


def test_a_run_folder_is_accepted_like_its_checkpoint(pmm: Callable, run: Path, tiny_dataset: Path) -> None:
    by_file, by_folder = (
        pmm("eval", model, tiny_dataset, "--device", "cpu", "--json").json for model in (run / "best.pt", run)
    )
    assert by_folder["figures"] == by_file["figures"]


def test_warnings_and_errors_are_one_line(pmm: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        warnings.warn("something [odd]", PmmWarning, stacklevel=1)
        raise OSError(28, "No space left", "/disk")

    monkeypatch.setattr("pmm_edge.data.dataset.read", read)
    ended = pmm("data", "x")
    assert ended.stderr.splitlines() == ["warning: something [odd]", "error: /disk: No space left"]
    monkeypatch.setitem(sys.modules, "pmm_edge.export.exporter", None)
    monkeypatch.setattr("pmm_edge.data.dataset.read", lambda *_: __import__("not_installed"))
    assert ".[train]" in pmm("data", "x").error


@pytest.mark.torch
def test_every_public_name_can_be_used() -> None:
    for name in pmm_edge.__all__:
        assert callable(getattr(pmm_edge, name))
        assert name in dir(pmm_edge)
    for name in ("train", "evaluate", "load", "embed_files", "build_model"):
        assert "\n    " in inspect.getdoc(getattr(pmm_edge, name))  # an example
    with pytest.raises(AttributeError):
        pmm_edge.nothing  # noqa: B018


@pytest.mark.parametrize("first", ["sys", "pmm_edge.bench.tables, pmm_edge.export.bundles, pmm_edge.cli"])
def test_packages_can_be_called_whatever_was_imported_before(first: str, tmp_path: Path) -> None:
    script = f"""
import sys, {first}
import pmm_edge as pmm
assert "torch" not in sys.modules
for call in (lambda: pmm.export("none.pt"), lambda: pmm.bench("none.onnx", reference="none.pt", data=".")):
    try:
        call()
    except pmm.PmmError as error:
        print(error)
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ended.stdout.count("none.pt") == 2


def test_a_narrow_terminal_loses_no_figure_and_no_name(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    name, figures = "model-int8-tensorrt-raw.onnx", ["0.996687", "2.4e-06", "(+0.00…+0.00)"]
    monkeypatch.setattr(console, "out", lambda: Console(width=60))
    print_table("", ("model", "cosine", "largest", "change"), [(name, *figures)])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60
    cells = [line.strip("│").split("│") for line in lines if line.startswith("│")]
    assert "".join(row[0].strip() for row in cells) == name
    assert [cell.strip() for cell in cells[0][1:]] == figures
    print_table("no rows", ("model", "cosine"), [])
    assert capsys.readouterr().out.split() == ["no", "rows"]


def test_output_arrives_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    """No path is wrapped, and nothing in it is markup or an emoji."""
    print_json({"folder": PATH})
    assert json.loads(capsys.readouterr().out) == {"folder": PATH}
    note("in /:smile:/x")
    print_table(PATH, ("x", "y"), [("[bold]:bug:", ":car:")])
    printed = capsys.readouterr()
    assert ":smile:" in printed.err
    assert printed.out.splitlines()[0] == PATH
    assert [printed.out.count(code) for code in ("[bold]:bug:", ":car:")] == [1, 1]
    with progress() as report:
        report("exporting :smile:[bold].onnx", 1, 1, "[red]:bug:")
    shown = capsys.readouterr().err
    assert "exporting :smile:[bold].onnx" in shown
    assert "[red]:bug:" in shown
