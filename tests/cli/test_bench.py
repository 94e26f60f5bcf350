"""`pmm bench` finds what was exported, gates it by its exit code, and keeps the figures either way."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx
import pytest

from pmm_edge.bench import comparison, measure_latency
from pmm_edge.runs import AboutRun, new_run_folder


@pytest.fixture(autouse=True)
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "measure_latency", partial(measure_latency, min_runs=2, min_seconds=0))


@pytest.fixture
def run(
    tiny_checkpoint: Path, tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A run with an export, in runs/ of the current folder."""
    monkeypatch.chdir(tmp_path)
    folder = new_run_folder(AboutRun("one", str(tiny_dataset), "0"), Path("runs/one"))
    (folder / "export").mkdir()
    shutil.copy(tiny_checkpoint, folder / "best.pt")
    shutil.copy(tiny_onnx, folder / "export" / "model.onnx")
    return folder


def test_without_arguments_the_newest_run_is_compared(pmm: Callable, run: Path) -> None:
    ended = pmm("bench", "--device", "cpu")
    assert ended.exit_code == 0, ended.stderr
    assert "model.onnx" in ended.stdout
    assert "…" not in ended.stdout  # the tables fit a terminal of 80 columns
    assert "parity holds" in ended.stderr
    saved = json.loads((run / "bench.json").read_text())
    assert saved["passed"] is True
    assert [latency["batch"] for latency in saved["models"][0]["latency"]] == [1, 8]


def test_a_model_of_a_run_is_compared_with_its_best(pmm: Callable, run: Path, tmp_path: Path) -> None:
    ended = pmm("bench", run / "export/model.onnx", "--limit", 4, "--batch", 2, "--out", "own.json", "--json")
    assert ended.exit_code == 0, ended.stderr
    printed = json.loads(ended.stdout)
    assert printed == json.loads(Path("own.json").read_text())
    assert printed["reference"]["path"] == str(tmp_path / "runs/one/best.pt")
    assert printed["images"] == 4


def test_a_failed_gate_is_exit_code_1_and_written_down(pmm: Callable, run: Path, tiny_onnx: Path) -> None:
    model = onnx.load(tiny_onnx)
    scale = next(node for node in model.graph.node if node.op_type == "Mul").input[1]
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == scale)
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 3, scale))
    onnx.save(model, run / "export" / "broken.onnx")
    ended = pmm("bench", "--batch", 1)
    assert ended.exit_code == 1
    assert "parity failed: runs/one/export/broken.onnx cosine" in ended.stderr
    assert "below the least allowed 0.9999, on " in ended.stderr
    saved = json.loads((run / "bench.json").read_text())
    assert saved["passed"] is False
    assert [bool(model["failures"]) for model in saved["models"]] == [True, False]


def refused(pmm: Callable, *arguments: object) -> str:
    ended = pmm("bench", *arguments)
    assert ended.exit_code == 2
    assert ended.stdout == ""
    return ended.stderr.strip().splitlines()[-1]


def test_what_cannot_be_compared(pmm: Callable, run: Path, tiny_checkpoint: Path, tiny_onnx: Path) -> None:
    assert "'1;8' is no list of batch sizes" in refused(pmm, "--batch", "1;8")
    assert "does not say which data set" in refused(pmm, tiny_onnx, "--reference", tiny_checkpoint)
    assert "none is no folder" in refused(pmm, "--data", "none")
    bare = onnx.load(tiny_onnx)
    del bare.metadata_props[:]
    onnx.save(bare, "bare.onnx")
    assert "bare.onnx carries no pmm-edge spec" in refused(pmm, "bare.onnx")
    shutil.rmtree(run / "export")
    assert "holds no exported model. Run pmm export first" in refused(pmm)
    assert not (run / "bench.json").exists()


def test_a_report_that_cannot_be_written_is_still_shown(pmm: Callable, run: Path) -> None:
    Path("file").touch()
    ended = pmm("bench", "--limit", 2, "--batch", 1, "--out", "file/bench.json")
    assert ended.exit_code == 2
    assert "cannot write file/bench.json" in ended.stderr
    assert "model.onnx" in ended.stdout
