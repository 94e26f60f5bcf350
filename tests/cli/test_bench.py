"""`pmm bench` and `pmm verify`: exit codes, the report, and what they cannot compare."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import onnx
import pytest
from certify import certify

from pmm_edge.bench import pipeline
from pmm_edge.runtime.certificate import certificate_path, read_certificate
from pmm_edge.runtime.model_file import DIGEST_KEY


@pytest.fixture(autouse=True)
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "measure_latency", partial(pipeline.measure_latency, min_runs=2, min_seconds=0))
    monkeypatch.setattr("pmm_edge.bench.timing.MAX_WARM_UP_SECONDS", 0.1)
    monkeypatch.setattr(pipeline, "measure_cold_start", lambda *_: None)  # it starts processes that import torch
    monkeypatch.setattr("pmm_edge.bench.html.charts", lambda *_: {})


def test_without_arguments_the_exports_of_the_newest_run(pmm: Callable, run: Path) -> None:
    ended = pmm("bench", "--batch-sizes", "2,1,2").ok
    assert "model.onnx" in ended.stdout
    assert not re.search(r"\D…|…[^+-]", ended.stdout)  # nothing is cut; intervals have an ellipsis of their own
    saved = json.loads((run / "bench.json").read_text())
    assert saved["passed"] is True
    timed = saved["models"][0]["latency"]
    assert [(one["scope"], one["batch"]) for one in timed] == [
        ("model", 1), ("model", 2), ("end to end", 1), ("end to end", 2),
    ]  # fmt: skip
    assert (run / "bench.md").is_file()
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    model = run / "export" / "model.onnx"
    assert pmm("verify", model, "--reference", run / "best.pt", "--data", saved["data"]).ok
    assert pmm("bench", "--compare", run / "bench.json", run / "bench.json").ok


def test_json_and_out(pmm: Callable, run: Path) -> None:
    options = ("--reference", run, "--limit", 4, "--parity-only", "-o", "own.json", "--json")
    printed = pmm("bench", run / "export/model.onnx", *options).json
    assert printed == json.loads(Path("own.json").read_text())
    assert printed["reference"]["path"] == "runs/one/best.pt"
    assert (printed["images"], printed["models"][0]["latency"]) == (4, [])
    assert Path("own.md").is_file()
    assert Path("own.html").is_file()
    assert not list((run / "export").glob("*certificate*"))


def test_a_failed_gate_is_exit_code_1(pmm: Callable, run: Path, tiny_onnx: Path) -> None:
    model = onnx.load(tiny_onnx)
    scale = next(node for node in model.graph.node if node.op_type == "Mul").input[1]
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == scale)
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 255, scale))
    onnx.helper.set_model_props(model, {one.key: one.value for one in model.metadata_props if one.key != DIGEST_KEY})
    broken = run / "export" / "broken.onnx"
    onnx.save(model, broken)
    ended = pmm("bench", broken, "--parity-only", "--limit", 6)
    assert ended.exit_code == 1
    assert "error: broken.onnx " in ended.stderr
    assert str(run / "bench.json") in ended.stderr.strip().splitlines()[-1]
    saved = json.loads((run / "bench.json").read_text())
    assert saved["passed"] is False
    assert saved["models"][0]["likely_cause"]["cause"]
    before = {**saved, "models": [{**model, "failures": []} for model in saved["models"]]}
    Path("before.json").write_text(json.dumps(before))
    compared = pmm("bench", "--compare", "before.json", run / "bench.json", "--json")
    assert (compared.exit_code, json.loads(compared.stdout)["passed"]) == (1, False)


def test_an_interrupt_keeps_the_results(pmm: Callable, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pmm_edge.bench.parity.check_batches", Mock(side_effect=KeyboardInterrupt))
    ended = pmm("bench", "--parity-only")
    assert ended.exit_code == 130
    assert str(run / "bench.json") in ended.stderr
    saved = json.loads((run / "bench.json").read_text())
    assert (saved["complete"], saved["passed"]) == (False, False)
    assert saved["reference"]["retrieval"]["mAP"] > 0


@pytest.fixture
def certified(tiny_onnx: Path, tmp_path: Path) -> Path:
    path = Path(shutil.copy(tiny_onnx, tmp_path / "model [a].onnx"))
    certify(path)
    return path


def test_verify(pmm: Callable, certified: Path, tmp_path: Path) -> None:
    ended = pmm("verify", certified).ok
    digest = read_certificate(certified).digest
    for shown in ("model [a].onnx", "2026-11-22", "0.999950", "46.2 -0.04", "0.9999", digest):
        assert shown in ended.stdout
    bare = Path(shutil.copy(certified, tmp_path / "bare.onnx"))
    ended = pmm("verify", certified, bare, "--json")
    assert ended.exit_code == 1
    printed = json.loads(ended.stdout)
    assert printed["passed"] is False
    assert [item["passed"] for item in printed["models"]] == [True, False]
    assert printed["models"][0]["digest"] == digest
    assert printed["models"][1]["certificate"] is None
    assert str(bare) in ended.stderr
    assert "pmm bench" in ended.stderr
    assert pmm("verify", certified, "--digest", digest).ok
    for option, value in (("--digest", "0" * 64), ("--reference", certified)):
        assert pmm("verify", certified, option, value).exit_code == 1
    replace(read_certificate(certified), sha256="2" * 64).save(certificate_path(certified))
    assert pmm("verify", certified).exit_code == 1


def test_an_edge_box_verifies_without_torch_or_an_engine(pmm_without: Callable, certified: Path) -> None:
    assert pmm_without("torch torchvision onnx onnxruntime tensorrt matplotlib", "verify", certified).ok
