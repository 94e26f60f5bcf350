"""`pmm doctor` by its exit code and its three forms, in a full and in a bare install."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HIDE = """
import importlib.metadata, sys
HIDDEN = {hidden!r}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
real = importlib.metadata.Distribution.from_name.__func__
def from_name(cls, name):
    if name.replace("-", "_").removesuffix("_gpu") in HIDDEN:
        raise importlib.metadata.PackageNotFoundError(name)
    return real(cls, name)
importlib.metadata.Distribution.from_name = classmethod(from_name)
"""
TRAIN = ["torch", "torchvision", "onnx", "onnxscript", "safetensors", "tensorboard", "tomli_w", "matplotlib"]


@pytest.fixture
def without(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `pmm` where some packages are not installed."""

    def run(hidden: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "sitecustomize.py").write_text(HIDE.format(hidden=hidden))
        path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "pmm_edge.cli", "doctor", *arguments]
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    return run


def test_a_full_install(pmm: Callable) -> None:
    ended = pmm("doctor", "train", "export", "bench", "embed")
    assert ended.exit_code == 0, ended.stderr
    assert "| Machine | |" in ended.stdout  # not a terminal: text for an issue
    assert "| ONNX Runtime, CPU | ok: works |" in ended.stdout
    assert "| pmm train | ready |" in ended.stdout


def test_a_bare_install(without: Callable) -> None:
    ended = without(TRAIN, "--json")
    assert ended.returncode == 0, ended.stderr
    printed = json.loads(ended.stdout)
    assert printed["sections"]["Engines"]["PyTorch"]["value"] == "not installed"
    assert "torch" in printed["sections"]["Packages"]["not installed"]["value"]
    assert printed["commands"]["train"]["usable"] is False
    assert printed["commands"]["train"]["remedies"] == ["pip install 'pmm-edge[train]'"]
    assert printed["commands"]["embed"]["usable"] is True


def test_a_command_that_must_work(without: Callable) -> None:
    ended = without(TRAIN, "embed", "train")
    assert ended.returncode == 1
    assert "error: train cannot work here: torch, torchvision, tensorboard, tomli_w not installed" in ended.stderr
    assert "pip install 'pmm-edge[train]'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_nothing_installed_that_runs_models(without: Callable) -> None:
    ended = without([*TRAIN, "onnxruntime", "cuda", "tensorrt"], "embed")
    assert ended.returncode == 1, ended.stderr
    assert "| ONNX Runtime | **wrong**: not installed" in ended.stdout
    assert "embed cannot work here: no engine that runs models" in ended.stderr


def test_a_command_that_is_none(pmm: Callable) -> None:
    ended = pmm("doctor", "fly")
    assert ended.exit_code == 2
    assert "there is no command 'fly' to examine. Choose of train, export, trt" in ended.stderr
    assert ended.stdout == ""
