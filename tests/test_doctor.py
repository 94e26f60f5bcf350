"""The doctor reports what is true of this machine, and survives whatever is broken on it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest

from pmm_edge import doctor, errors
from pmm_edge.doctor import COMMANDS, Finding, Status, isolated, readiness, shareable
from pmm_edge.errors import install

NO_TENSORRT = Finding(Status.INFO, "TensorRT is not installed", install("trt"))
WORKING = Finding(Status.OK, "works")
TRAIN = ["torch", "torchvision", "onnx", "onnxscript", "safetensors", "tensorboard", "tomli_w", "matplotlib"]


def states(onnxruntime_found: Finding, tensorrt: Finding = NO_TENSORRT) -> dict[str, Finding]:
    return {command: readiness(command, onnxruntime_found, tensorrt, NO_TENSORRT) for command in COMMANDS}


def test_the_cache_folder(homeless: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = doctor.check_cache_folder()
    assert found.status is Status.PROBLEM  # there is no home folder
    assert "PMM_HOME" in found.remedy
    (tmp_path / "file").touch()
    for folder, status in (("file/below", Status.PROBLEM), ("not/yet", Status.OK)):
        monkeypatch.setenv("PMM_HOME", str(tmp_path / folder))
        assert doctor.check_cache_folder().status is status
        assert str(tmp_path) not in isolated("cache folder").detail


@pytest.mark.skipif(
    not shutil.which("cc") or "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="needs a C compiler and onnxruntime-gpu",
)
def test_a_driver_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "cuda.c"
    source.write_text("int cuInit(unsigned flags) { return 999; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", source], check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    found = isolated("ONNX Runtime")
    assert found.status is Status.LIMITED
    cpu, cuda = found.detail.split("; ", 1)
    assert cpu == "cpu works"
    assert ".so" in cuda  # the library that is missing


@pytest.mark.parametrize("versions", [{"onnxruntime": "1", "onnxruntime_gpu": "1"}, {"torch": "2.9.0+cpu"}])
def test_packages_that_do_not_fit(versions: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    installed = [SimpleNamespace(metadata={"Name": name}, version=version) for name, version in versions.items()]
    monkeypatch.setattr(doctor, "distributions", lambda: installed)
    monkeypatch.setattr(Path, "exists", lambda path: True)  # the files of a driver
    assert doctor.check_packages().status is Status.PROBLEM


@pytest.mark.torch
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("import os; os.abort()", "exit code -6"),
        ("raise OSError('libfoo.so.1: no such file')", "OSError: libfoo.so.1"),
        ("import time; time.sleep(60)", "did not answer"),
    ],
)
def test_libraries_that_break_when_loaded(
    content: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "onnxruntime.py").write_text(content)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path) + os.pathsep + os.environ.get("PYTHONPATH", ""))
    if "sleep" in content:
        monkeypatch.setattr(doctor, "TIMEOUT", 1.0)
    found = isolated("ONNX Runtime")
    assert found.status is Status.PROBLEM
    assert message in found.detail
    assert "\n" not in found.detail
    ready = states(found)
    assert ready["embed"].status is Status.LIMITED  # PyTorch can run checkpoints
    assert ready["export"].status is Status.PROBLEM


@pytest.mark.torch
def test_commands_by_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = states(WORKING)
    assert ready["trt"] == Finding(Status.PROBLEM, "cannot work: TensorRT is not installed", NO_TENSORRT.remedy)
    assert all(ready[name].status is Status.OK for name in ("train", "export", "verify", "data", "synth"))
    assert states(WORKING, WORKING)["trt"].status is Status.OK
    monkeypatch.setattr(errors, "find_spec", lambda module: None if module in TRAIN else module)
    ready = states(WORKING)
    assert ready["train"].status is ready["visualize"].status is Status.PROBLEM
    assert ready["train"].remedy == install("train")
    for name in ("bench", "embed", "eval", "calibrate", "match", "export"):
        assert ready[name].status is Status.LIMITED
    for text in ("--deepstream", "raw", "--triton", "uint8"):  # not both of one file
        assert text in ready["export"].detail
    assert states(Finding(Status.PROBLEM, "broken"))["embed"].status is Status.PROBLEM  # nothing runs models
    for missing, status in ((["faiss"], Status.LIMITED), (["faiss", "qdrant_client"], Status.PROBLEM)):
        monkeypatch.setattr(errors, "find_spec", lambda module, missing=missing: module not in missing or None)
        assert states(WORKING)["gallery"].status is status


def test_nothing_that_is_shown_names_a_folder() -> None:
    home = Path.home()
    assert shareable(f"cannot open {home}/.venv/lib/x.so: no") == "cannot open ~/.venv/lib/x.so: no"
    assert shareable("/opt/alice/venv/lib/x.so: undefined\n symbol") == "…/x.so: undefined symbol"
    assert shareable("see https://example.com/a/b and ~/a/b") == "see https://example.com/a/b and ~/a/b"


@pytest.mark.torch
def test_the_command(pmm: Callable) -> None:
    ended = pmm("doctor", "train", "export", "bench", "embed")
    assert ended.exit_code == 0, ended.stderr
    for shown in ("ONNX Runtime", "cpu works", "visualize"):
        assert shown in ended.stdout
    assert f"{Path.home()}/" not in ended.stdout
    assert str(Path(__file__).parents[1]) not in ended.stdout


def test_a_bare_install(tmp_path: Path) -> None:
    def run(hidden: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules.update(dict.fromkeys({hidden}))")
        path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "pmm_edge", "doctor", *arguments]
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    ended = run(TRAIN, "embed", "train", "--json")
    assert ended.returncode == 1, ended.stderr
    commands = json.loads(ended.stdout)["commands"]
    assert [commands[name]["status"] for name in ("train", "embed")] == ["problem", "limited"]
    assert "error: train cannot work" in ended.stderr
    assert install("train") in ended.stderr
    assert run([*TRAIN, "onnxruntime", "cuda", "tensorrt"], "embed").returncode == 1
