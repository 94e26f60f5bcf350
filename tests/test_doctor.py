"""The doctor reports what is true of this machine, and survives whatever is broken on it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from pmm_edge import doctor
from pmm_edge.doctor import COMMANDS, Finding, Probe, as_markdown, jetson, machine, readiness, shareable
from pmm_edge.errors import install

NO_TENSORRT = Probe(error="TensorRT is not installed", remedy=install("trt"))
WORKING = Probe(providers={"CPUExecutionProvider": None})
TRAIN = ["torch", "torchvision", "onnx", "onnxscript", "safetensors", "tensorboard", "tomli_w", "matplotlib"]
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


def put(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def states(onnxruntime_probe: Probe, tensorrt: Probe = NO_TENSORRT) -> dict[str, Finding]:
    return by_name([readiness(command, onnxruntime_probe, tensorrt) for command in COMMANDS])


def test_a_jetson(tmp_path: Path) -> None:
    put(
        tmp_path,
        "etc/nv_tegra_release",
        "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64",
    )
    put(tmp_path, "proc/device-tree/model", "NVIDIA Jetson Orin Nano Developer Kit\0")
    put(tmp_path, "proc/cpuinfo", "processor\t: 0\nFeatures\t: fp asimd asimdhp asimddp\nCPU part\t: 0xd42\n")
    put(tmp_path, "proc/meminfo", "MemTotal:        7802460 kB\nMemFree:  1 kB\nMemAvailable:    3901230 kB\n")
    put(tmp_path, "proc/self/cgroup", "0::/\n")
    put(tmp_path, "sys/fs/cgroup/cpu.max", "150000 100000\n")
    found = by_name(machine(tmp_path))
    assert found["Jetson"].value == "NVIDIA Jetson Orin Nano Developer Kit"
    assert found["JetPack"] == Finding("JetPack", "6.2 (Jetson Linux 36.4.3)")
    assert found["memory"].value == "7.4 GiB, 3.7 GiB free"
    assert "1.5" in found["cores"].value
    assert found["processor"].value.endswith("asimddp")


@pytest.mark.parametrize(
    ("release", "jetpack", "old"),
    [
        ("R36 (release), REVISION: 4.0", "6.1", False),
        ("R36 (release), REVISION: 3.0", "6.0", True),
        ("R35 (release), REVISION: 4.1", "5", True),
        ("R38 (release), REVISION: 2.0", "7", False),
        ("R99 (release), REVISION: 1.0", "unknown", False),
    ],
)
def test_jetpacks(release: str, jetpack: str, old: bool, tmp_path: Path) -> None:
    put(tmp_path, "etc/nv_tegra_release", f"# {release}, GCID: 1, BOARD: generic\n")
    _, found = jetson(tmp_path)
    assert found.value.startswith(f"{jetpack} (Jetson Linux ")
    assert (found.good, bool(found.remedy)) == ((False, True) if old else (None, False))


def test_the_cache_folder(homeless: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def cache() -> Finding:
        return by_name(machine(tmp_path))["cache folder"]

    assert by_name(machine(tmp_path))["memory"].value == "unknown"
    assert cache().good is False  # there is no home folder
    assert "PMM_HOME" in cache().remedy
    (tmp_path / "file").touch()
    for folder, good in (("file/below", False), ("not/yet", None)):
        monkeypatch.setenv("PMM_HOME", str(tmp_path / folder))
        assert cache().good is good
        assert str(tmp_path) not in cache().value


def test_the_probe_model_is_valid() -> None:
    onnx.checker.check_model(onnx.load_from_string(doctor.ADDITION), full_check=True)
    session = onnxruntime.InferenceSession(doctor.ADDITION, providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.float32([1.5])})[0].tolist() == [3.0]


@pytest.mark.skipif(
    not shutil.which("cc") or "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="needs a C compiler and onnxruntime-gpu",
)
def test_a_driver_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "cuda.c"
    source.write_text("int cuInit(unsigned flags) { return 999; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", source], check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    driver = doctor.probe("driver")
    assert (driver.no_driver, driver.gpus) == (False, [])
    assert "999" in driver.error
    found = doctor.probe("onnxruntime")
    assert found.no_driver is False
    assert ".so" in found.providers["CUDAExecutionProvider"]  # the library that is missing
    assert found.providers["CPUExecutionProvider"] is None
    shown = by_name(doctor.engines(found, NO_TENSORRT, driver))
    assert (shown["ONNX Runtime, CPU"].good, shown["ONNX Runtime, CUDA"].good) == (True, False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("import os; os.abort()", "signal 6"),
        ("import os; os._exit(3)", "code 3"),
        ("raise OSError('libfoo.so.1: no such file')", "OSError: libfoo.so.1"),
        ("import time; time.sleep(60)", "1 s"),
    ],
)
def test_libraries_that_break_when_loaded(
    content: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put(tmp_path, "onnxruntime/__init__.py", content)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path) + os.pathsep + os.environ.get("PYTHONPATH", ""))
    if "sleep" in content:
        monkeypatch.setattr(doctor, "TIMEOUT", 1.0)
    found = doctor.probe("onnxruntime")
    assert message in found.error
    assert "\n" not in found.error
    ready = states(found)
    assert message in ready["embed"].value
    assert ready["embed"].good is None  # PyTorch can run checkpoints
    assert ready["export"].good is False


def test_commands_by_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = states(WORKING)
    assert ready["trt"] == Finding("trt", "cannot work: TensorRT is not installed", False, NO_TENSORRT.remedy)
    assert {name for name, found in ready.items() if found.good} >= {"train", "export", "verify", "data", "synth"}
    assert states(WORKING, Probe("10.3.0", ["Orin"]))["trt"].good is True
    monkeypatch.setattr(doctor, "importable", lambda module: module in ("numpy", "PIL"))
    ready = states(Probe(error="ModuleNotFoundError"))
    assert {name for name, found in ready.items() if found.good} == {"verify", "data", "synth"}
    assert all(ready[name].good is False for name in ("train", "export", "bench", "embed", "eval", "visualize"))
    assert ready["train"].remedy == install("train")
    monkeypatch.setattr(doctor, "importable", lambda module: module in ("numpy", "PIL", "onnxruntime"))
    ready = states(WORKING)
    assert all(ready[name].good is None for name in ("export", "bench", "embed", "eval"))
    assert ready["visualize"].good is False  # it needs matplotlib
    assert "--reference" in ready["bench"].value


def test_nothing_that_is_shown_names_a_folder() -> None:
    home = Path.home()
    assert shareable(f"cannot open {home}/.venv/lib/x.so: no") == "cannot open ~/.venv/lib/x.so: no"
    assert shareable("/opt/alice/venv/lib/x.so: undefined\n symbol") == "…/x.so: undefined symbol"
    assert shareable("see https://example.com/a/b and ~/a/b") == "see https://example.com/a/b and ~/a/b"


def test_markdown_escapes_what_it_shows() -> None:
    text = as_markdown({"GPU": [Finding("GPU | 1", "a `b` <img> @somebody", False, "Do this")]})
    assert r"| GPU \| 1 | **problem**: a 'b' &lt;img> @" in text
    assert "@somebody" not in text
    assert "Do this" in text


def test_the_command(pmm: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = pmm("doctor", "train", "export", "bench", "embed")
    assert ended.exit_code == 0, ended.stderr
    assert "| Machine | |" in ended.stdout  # not a terminal: Markdown
    assert "| train | ok: " in ended.stdout
    assert f"{Path.home()}/" not in ended.stdout
    assert str(Path(__file__).parents[1]) not in ended.stdout
    assert "Did you mean 'embed'?" in pmm("doctor", "embd").error
    monkeypatch.setattr("pmm_edge.doctor.probe", lambda name: WORKING)
    monkeypatch.setattr("pmm_edge.cli.is_terminal", lambda: True)
    assert "CPU" in pmm("doctor").stdout


def test_a_bare_install(tmp_path: Path) -> None:
    def run(hidden: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "sitecustomize.py").write_text(HIDE.format(hidden=hidden))
        path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "pmm_edge", "doctor", *arguments]
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    ended = run(TRAIN, "embed", "train", "--json")
    assert ended.returncode == 1, ended.stderr
    printed = {title: {one["name"]: one for one in found} for title, found in json.loads(ended.stdout).items()}
    assert printed["Engines"]["PyTorch"]["value"] == "not installed"
    assert "torch" in printed["Packages"]["not installed"]["value"]
    assert printed["Commands"]["train"]["good"] is False
    assert printed["Commands"]["embed"]["good"] is None
    assert "error: train cannot work" in ended.stderr
    assert "pip install '.[train]'" in ended.stderr
    ended = run([*TRAIN, "onnxruntime", "cuda", "tensorrt"], "embed")
    assert ended.returncode == 1
    assert "error: embed cannot work" in ended.stderr
