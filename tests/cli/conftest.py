"""A run folder, as commands without arguments expect it, and a machine without some packages."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pmm_edge.runs import AboutRun, new_run_folder


@pytest.fixture
def run(
    tiny_checkpoint: Path, tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """`runs/one` in the current folder, with a checkpoint and an export."""
    monkeypatch.chdir(tmp_path)
    folder = new_run_folder(AboutRun("one", str(tiny_dataset), "0"), Path("runs/one"))
    (folder / "export").mkdir()
    shutil.copy(tiny_checkpoint, folder / "best.pt")
    shutil.copy(tiny_onnx, folder / "export" / "model.onnx")
    return folder


@pytest.fixture
def pmm_without() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `pmm` in a new process in which some modules cannot be imported."""

    def run(absent: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        script = f"import sys; sys.modules.update(dict.fromkeys({absent.split()}))\n"
        script += "from pmm_edge.cli import main; main()"
        command = [sys.executable, "-c", script, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run
