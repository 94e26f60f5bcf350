"""`pmm bench` finds what was exported, gates it by its exit code, and leaves its report behind either way."""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx
import pytest

from pmm_edge.bench import pipeline
from pmm_edge.runs import AboutRun, new_run_folder


@pytest.fixture(autouse=True)
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("measure_latency", "measure_end_to_end"):
        monkeypatch.setattr(pipeline, name, partial(getattr(pipeline, name), min_runs=2, min_seconds=0))


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


def test_without_arguments_the_newest_run_is_judged_and_reported(pmm: Callable, run: Path) -> None:
    ended = pmm("bench", "--device", "cpu")
    assert ended.exit_code == 0, ended.stderr
    assert "model.onnx" in ended.stdout
    assert not re.search(r"\D…|…[^+-]", ended.stdout)  # nothing is cut; intervals have an ellipsis of their own
    assert "parity holds" in ended.stderr
    saved = json.loads((run / "bench.json").read_text())
    assert saved["passed"] is True
    model = saved["models"][0]
    assert [(one["scope"], one["batch"]) for one in model["latency"]] == [
        ("model", 1),
        ("model", 8),
        ("end to end", 1),
        ("end to end", 8),
    ]
    assert model["cold_start"]["first_embedding_ms"] > 0
    assert "model.onnx" in (run / "bench.md").read_text()
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    verified = pmm("verify", run / "export" / "model.onnx", "--reference", run / "best.pt", "--data", saved["data"])
    assert verified.exit_code == 0, verified.stderr


def test_a_model_of_a_run_is_compared_with_its_best(pmm: Callable, run: Path, tmp_path: Path) -> None:
    ended = pmm("bench", run / "export/model.onnx", "--limit", 4, "--parity-only", "--out", "own.json", "--json")
    assert ended.exit_code == 0, ended.stderr
    printed = json.loads(ended.stdout)
    assert printed == json.loads(Path("own.json").read_text())
    assert printed["reference"]["path"] == str(tmp_path / "runs/one/best.pt")
    assert (printed["images"], printed["models"][0]["latency"]) == (4, [])
    assert Path("own.md").is_file()
    assert Path("own.html").is_file()
    assert "no certificate for" in ended.stderr
    again = pmm("bench", "--compare", "own.json", "own.json")
    assert again.exit_code == 0, again.stderr
    assert "no regression" in again.stderr


def test_a_batch_size_that_is_named_twice_is_timed_once(pmm: Callable, run: Path) -> None:
    ended = pmm("bench", "--device", "cpu", "--batch", "2,1,2,1,1", "--limit", 4)
    assert ended.exit_code == 0, ended.stderr
    timed = json.loads((run / "bench.json").read_text())["models"][0]["latency"]
    assert [(one["scope"], one["batch"]) for one in timed] == [
        ("model", 1),
        ("model", 2),
        ("end to end", 1),
        ("end to end", 2),
    ]


def test_a_failed_gate_is_exit_code_1_and_written_down(pmm: Callable, run: Path, tiny_onnx: Path) -> None:
    model = onnx.load(tiny_onnx)
    scale = next(node for node in model.graph.node if node.op_type == "Mul").input[1]
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == scale)
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 255, scale))
    onnx.save(model, run / "export" / "broken.onnx")
    (run / "export" / "broken.onnx.certificate.json").write_text("of another day")
    ended = pmm("bench", "--parity-only")
    assert ended.exit_code == 1
    assert "parity failed: runs/one/export/broken.onnx has cosine" in ended.stderr
    assert "likely cause" in ended.stderr
    saved = json.loads((run / "bench.json").read_text())
    assert saved["passed"] is False
    assert [bool(model["failures"]) for model in saved["models"]] == [True, False]
    assert "fails" in (run / "bench.md").read_text()
    good = shutil.copy(run / "bench.json", "before.json")
    kept = json.loads(Path(good).read_text())
    for entry in kept["models"]:
        entry["failures"] = []
    Path(good).write_text(json.dumps(kept))
    compared = pmm("bench", "--compare", good, run / "bench.json")
    assert compared.exit_code == 1
    assert "worse than before" in compared.stderr


def test_interrupted_it_leaves_what_it_has(pmm: Callable, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pmm_edge.bench.pipeline.check_batches", interrupted)
    ended = pmm("bench", "--parity-only")
    assert ended.exit_code == 130
    assert "bench.json" in ended.stderr
    saved = json.loads((run / "bench.json").read_text())
    assert (saved["complete"], saved["passed"]) == (False, False)
    assert saved["models"][0]["retrieval"]["mAP"] > 0
    assert not list((run / "export").glob("*certificate*"))
    monkeypatch.setattr("pmm_edge.bench.pipeline.bench_images", interrupted)
    assert pmm("bench", "--parity-only").exit_code == 130


def refused(pmm: Callable, *arguments: object) -> str:
    ended = pmm("bench", *arguments)
    assert ended.exit_code == 2
    assert ended.stdout == ""
    return ended.stderr.strip().splitlines()[-1]


def test_what_cannot_be_compared(pmm: Callable, run: Path, tiny_checkpoint: Path, tiny_onnx: Path) -> None:
    assert "1;8" in refused(pmm, "--batch", "1;8")
    assert "--data" in refused(pmm, tiny_onnx, "--reference", tiny_checkpoint)
    assert "none does not exist" in refused(pmm, "--data", "none")
    assert "min_cosine" in refused(pmm, "--min-cosine", 2)
    bare = onnx.load(tiny_onnx)
    del bare.metadata_props[:]
    onnx.save(bare, "bare.onnx")
    assert "bare.onnx" in refused(pmm, "bare.onnx")
    shutil.rmtree(run / "export")
    assert "Run pmm export first" in refused(pmm)
    assert not (run / "bench.json").exists()


def test_a_report_that_could_not_be_written_is_refused_before_the_work(pmm: Callable, run: Path) -> None:
    Path("file").touch()
    assert "cannot write file/bench.json" in refused(pmm, "--out", "file/bench.json")
    assert "its name must end in .json" in refused(pmm, "--out", "bench.html")
