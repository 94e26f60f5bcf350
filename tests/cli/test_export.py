"""`pmm export`: the files of a run, and one clear line when it cannot write them."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from color_network import color_network

import pmm_edge
from pmm_edge.errors import OutputError
from pmm_edge.runs import AboutRun, new_run_folder


def test_the_newest_run_is_exported_into_its_folder(
    pmm: Callable, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("new", "old")):
        run = new_run_folder(AboutRun(name, "data", "0"), Path("runs") / name)
        shutil.copy(tiny_checkpoint, run / "best.pt")
        os.utime(run / "best.pt", (1e9 - age, 1e9 - age))
    ended = pmm("export", "--input-form", "raw", "--safetensors", "--deepstream", "tracker", "--json")
    assert ended.exit_code == 0, ended.stderr
    printed = json.loads(ended.stdout)
    assert printed["checkpoint"] == "runs/new/best.pt"
    paths = [item["path"] for item in printed["files"]]
    assert paths == ["runs/new/export/model-raw.onnx", "runs/new/export/model-raw.safetensors"]
    assert [pmm_edge.load(path, "cpu").spec.input.form for path in paths] == ["raw", "normalized"]
    assert printed["bundles"] == {"deepstream": "tracker"}
    assert "arning" not in ended.stderr
    shown = pmm("export", paths[0], "--deepstream", "other")
    assert shown.exit_code == 0, shown.stderr
    assert "other" in shown.stderr


def test_an_engine_that_cannot_be_built_does_not_hide_the_file(
    pmm: Callable, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OutputError("cannot write tracker: No space left on device")

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    out = tmp_path / "model.onnx"
    ended = pmm("export", tiny_checkpoint, "-o", out, "--trt", "--batch-profile", "1,4,8")
    assert ended.exit_code == 1
    assert out.is_file()
    for shown in (str(tmp_path), "model.onnx", "fp32", "uint8", "1.000000"):
        assert shown in ended.stdout
    last = ended.stderr.strip().splitlines()[-1]
    assert str(out) in last
    assert "pmm export model.onnx --trt --batch-profile 1,4,8" in last
    monkeypatch.setattr("pmm_edge.export.bundles.deepstream_bundle", full)
    raw = color_network(tmp_path / "raw.onnx", form="raw")
    ended = pmm("export", raw, "--trt", "--deepstream", tmp_path / "tracker", "--json")
    assert ended.exit_code == 2
    assert len(json.loads(ended.stdout)["failures"]) == 2
    first, last = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert "TensorRT" in first
    assert last == "error: cannot write tracker: No space left on device"
