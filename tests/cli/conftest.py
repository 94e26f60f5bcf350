"""A run folder, as commands without arguments expect it."""

import shutil
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
