"""`pmm verify` by its exit codes, and what a script reads from it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from certify import certify

from pmm_edge.runtime.certificate import certificate_path, read_certificate


@pytest.fixture
def model(tiny_onnx: Path, tmp_path: Path) -> Path:
    """A model with a certificate."""
    path = Path(shutil.copy(tiny_onnx, tmp_path / "model [a].onnx"))
    certify(path)
    return path


def test_a_certified_model(pmm: Callable, model: Path) -> None:
    ended = pmm("verify", model)
    assert ended.exit_code == 0, ended.stderr
    for shown in ("model [a].onnx", "2026-11-22", "0.999950", "46.2 -0.04", "7.9, 1", "≥ 0.9999", "AMD EPYC"):
        assert shown in ended.stdout
    assert f"digest {read_certificate(model).digest}" in ended.stdout
    assert "1 of 1 models" in ended.stderr


def test_json(pmm: Callable, model: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copy(model, tmp_path / "bare.onnx"))
    ended = pmm("verify", model, bare, "--json")
    assert ended.exit_code == 1
    printed = json.loads(ended.stdout)
    assert printed["passed"] is False
    assert [item["passed"] for item in printed["models"]] == [True, False]
    assert printed["models"][0]["certificate"]["digest"] == read_certificate(model).digest
    assert printed["models"][1]["certificate"] is None
    assert "has no certificate" in printed["models"][1]["failures"][0]


def test_exit_codes(pmm: Callable, model: Path, tmp_path: Path) -> None:
    assert pmm("verify", model, "--digest", read_certificate(model).digest).exit_code == 0
    ended = pmm("verify", model, "--digest", "0" * 64)
    assert ended.exit_code == 1
    assert "error: not certified: " in ended.stderr
    assert pmm("verify", model, "--reference", model).exit_code == 1
    assert pmm("verify", tmp_path / "none.onnx").exit_code == 2
    assert pmm("verify", model, "--data", tmp_path / "none").exit_code == 2
    assert pmm("verify").exit_code == 2
    replace(read_certificate(model), sha256="2" * 64).save(certificate_path(model))
    assert pmm("verify", model).exit_code == 1


def test_an_edge_box_verifies_without_torch_or_an_engine(model: Path) -> None:
    script = """
import sys
for absent in ("torch", "torchvision", "onnx", "onnxruntime", "tensorrt"):
    sys.modules[absent] = None
from pmm_edge.cli import main
main()
"""
    command = [sys.executable, "-c", script, "verify", model]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
