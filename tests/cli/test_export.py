"""`pmm export` writes what it says, quietly, or says in one line why it does not."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import pmm_edge
from pmm_edge.runs import AboutRun, new_run_folder


def test_the_newest_run_is_exported_into_its_folder(
    pmm: Callable, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("new", "old")):
        run = new_run_folder(AboutRun(name, "data", "0"), Path("runs") / name)
        shutil.copy(tiny_checkpoint, run / "best.pt")
        os.utime(run / "best.pt", (1e9 - age, 1e9 - age))
    ended = pmm("export", "--input-form", "raw", "--safetensors", "--json")
    assert ended.exit_code == 0, ended.stderr
    printed = json.loads(ended.stdout)
    assert printed["checkpoint"] == "runs/new/best.pt"
    paths = [item["path"] for item in printed["exported"]]
    assert paths == ["runs/new/export/model-raw.onnx", "runs/new/export/model-raw.safetensors"]
    assert [pmm_edge.load(path, "cpu").spec.input.form for path in paths] == ["raw", "normalized"]
    assert "arning" not in ended.stderr
    assert "torch" not in ended.stderr


def refused(pmm: Callable, *arguments: object) -> str:
    ended = pmm("export", *arguments)
    assert ended.exit_code == 2
    assert ended.stdout == ""
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


def test_bad_checkpoints(pmm: Callable, tiny_checkpoint: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.pt"
    short.write_bytes(tiny_checkpoint.read_bytes()[:5000])
    foreign = tmp_path / "foreign.pt"
    foreign.write_text("weights")
    missing = tmp_path / "missing.pt"
    for path in (short, foreign, tiny_onnx, missing):
        assert str(path) in refused(pmm, path, "--out", tmp_path / "out" / "model.onnx")
    assert not (tmp_path / "out").exists()


def test_no_run_to_export(pmm: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "Run pmm train first, or name a checkpoint" in refused(pmm)


def test_places_that_cannot_be_written(pmm: Callable, tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert "does not end in .onnx" in refused(pmm, tiny_checkpoint, "--out", tmp_path / "model")
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "model.onnx"
    assert f"cannot write {out}" in refused(pmm, tiny_checkpoint, "--out", out)


@pytest.mark.parametrize("suffix", [".onnx", ".safetensors", ".engine"])
def test_places_are_tried_before_minutes_of_work(
    suffix: str, pmm: Callable, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def minutes(*_: object) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr("pmm_edge.export.exporter._write_onnx", minutes)
    (tmp_path / f"model{suffix}").mkdir()
    said = refused(pmm, tiny_checkpoint, "--out", tmp_path / "model.onnx", "--safetensors", "--trt")
    assert f"cannot write {tmp_path}/model{suffix}: {tmp_path}/model{suffix} is a folder" in said
    assert "cannot write /proc/model.onnx" in refused(pmm, tiny_checkpoint, "--out", "/proc/model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == [f"model{suffix}"]
