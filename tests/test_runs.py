"""A model's run says which data set it belongs to, and in which layout that is read."""

import os
from pathlib import Path

import pytest

from pmm_edge.errors import DataError, ModelError, OutputError
from pmm_edge.runs import AboutRun, about_run, data_of, new_run_folder, resolve_checkpoint


def test_the_data_set_of_a_model(tmp_path: Path) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    run = new_run_folder(AboutRun("quick", str(data), "0.1.0", "cuhk03-np-labeled"), tmp_path / "run")
    for model in (run / "best.pt", run / "export" / "model.onnx"):
        assert data_of(model) == (data, "cuhk03-np-labeled")
        assert data_of(model, layout="market-layout") == (data, "market-layout")
        assert data_of(model, data) == (data, "cuhk03-np-labeled")
        assert data_of(model, other) == (other, None)  # another data set's layout is its own
        assert data_of(model, other, "msmt17") == (other, "msmt17")


def test_a_model_without_a_run(tmp_path: Path) -> None:
    assert data_of(tmp_path / "model.onnx", tmp_path, "msmt17") == (tmp_path, "msmt17")
    with pytest.raises(ModelError, match=r"model\.onnx does not exist"):
        data_of(tmp_path / "model.onnx")
    (tmp_path / "model.onnx").touch()
    with pytest.raises(DataError, match="--data"):
        data_of(tmp_path / "model.onnx")


def test_a_run_folder_is_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    about = AboutRun("quick", "data", "0")
    runs = [new_run_folder(about, Path("runs", name)) for name in ("old", "new", "unfinished")]
    for missing in (None, runs[2], Path("missing.pt")):
        with pytest.raises(ModelError):
            resolve_checkpoint(missing)
    for age, run in enumerate(runs[:2]):
        (run / "best.pt").touch()
        os.utime(run / "best.pt", (age, age))
    assert resolve_checkpoint(None) == runs[1] / "best.pt"
    assert resolve_checkpoint(runs[0]) == resolve_checkpoint(runs[0] / "best.pt") == runs[0] / "best.pt"


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    first, second = AboutRun("quick", "data", "0"), AboutRun("quick", "other", "0")
    new_run_folder(first, tmp_path)
    assert about_run(new_run_folder(second, tmp_path)) == second  # the first one never started
    (tmp_path / "config.toml").touch()
    for folder in (tmp_path, tmp_path / "config.toml", tmp_path / "config.toml" / "deep"):
        with pytest.raises(OutputError):
            new_run_folder(first, folder)
    assert about_run(tmp_path) == second
    (tmp_path / "run.json").write_text("{}")
    assert about_run(tmp_path) is None
