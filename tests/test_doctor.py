"""The doctor says what is true of this machine, and outlives whatever is broken on it."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from pmm_edge import doctor
from pmm_edge.doctor import (
    Diagnosis,
    Finding,
    Section,
    as_markdown,
    examine,
    gpu_precision,
    jetson,
    machine,
    processor_precision,
    readiness,
    shareable,
)

NO_TENSORRT = {"error": "TensorRT is not installed", "remedy": "pip install 'pmm-edge[trt]'"}


def put(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


@pytest.fixture
def orin(tmp_path: Path) -> Path:
    """The files of a Jetson Orin Nano that the doctor reads."""
    put(
        tmp_path,
        "etc/nv_tegra_release",
        "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC"
        " 2025\n# KERNEL_VARIANT: oot\n",
    )
    put(tmp_path, "proc/device-tree/model", "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0")
    put(tmp_path, "proc/cpuinfo", "processor\t: 0\nFeatures\t: fp asimd fphp asimdhp asimddp\nCPU part\t: 0xd42\n")
    put(tmp_path, "proc/meminfo", "MemTotal:        7802460 kB\nMemFree:  1 kB\nMemAvailable:    3901230 kB\n")
    put(tmp_path, "proc/self/cgroup", "0::/\n")
    put(tmp_path, "sys/fs/cgroup/cpu.max", "150000 100000\n")
    return tmp_path


def test_a_jetson(orin: Path) -> None:
    found = {finding.name: finding for finding in machine(orin).findings}
    assert found["Jetson"].value == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    assert found["JetPack"].value == "6.2 (Jetson Linux 36.4.3)"
    assert not found["JetPack"].remedy
    assert found["memory"].value == "7.4 GiB, 3.7 GiB free"
    assert found["cores"].value.endswith("1.5 of them usable")
    assert processor_precision(orin).value == "made for INT8 (dot products), FP16 (half precision); not for BF16"


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
    board, found = jetson(tmp_path)
    assert board.value == "unknown board"
    assert found.value.startswith(f"{jetpack} (Jetson Linux ")
    assert (found.good is False) is old
    assert ("JetPack 6.1 or later" in found.remedy) is old


def test_the_package_knows_jetpack_better_than_the_release(orin: Path) -> None:
    put(orin, "var/lib/dpkg/status", "Package: nvidia-jetpack\nStatus: install ok\nVersion: 6.2.1+b38\n\nPackage: x\n")
    assert jetson(orin)[1].value == "6.2.1 (Jetson Linux 36.4.3)"


def test_an_empty_machine_has_lines_all_the_same(tmp_path: Path) -> None:
    found = {finding.name: finding.value for finding in machine(tmp_path).findings}
    assert found["memory"] == "unknown"
    assert found["processor"]
    assert processor_precision(tmp_path).value == "unknown: it names no flags"


def test_precision(tmp_path: Path) -> None:
    put(tmp_path, "proc/cpuinfo", "flags\t\t: avx2 avx512f avx512_vnni avx512_bf16\n")
    said = processor_precision(tmp_path).value
    assert said == "made for FP32 (AVX-512), INT8 (AVX-512 VNNI), BF16 (AVX-512); not for FP16"
    put(tmp_path, "proc/cpuinfo", "flags\t\t: sse2 sse4_2\n")
    assert processor_precision(tmp_path).value == "made for FP32 (SSE2); not for INT8, BF16, FP16"
    assert gpu_precision((6, 1)) == "no tensor cores"
    assert gpu_precision((7, 0)) == "tensor cores for FP16"
    assert gpu_precision((8, 7)) == "tensor cores for FP16, INT8, BF16"
    assert gpu_precision((9, 0)) == "tensor cores for FP16, INT8, BF16, FP8"


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PMM_HOME", str(tmp_path / "file" / "below"))
    (found,) = [finding for finding in machine(tmp_path).findings if finding.name == "cache folder"]
    assert found.good is False
    assert "Set PMM_HOME" in found.remedy
    assert str(tmp_path) not in found.value
    monkeypatch.setenv("PMM_HOME", str(tmp_path / "not" / "yet"))
    (found,) = [finding for finding in machine(tmp_path).findings if finding.name == "cache folder"]
    assert "GiB free" in found.value


def test_a_user_without_a_home_folder(homeless: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def cache() -> Finding:
        (found,) = [finding for finding in machine(tmp_path).findings if finding.name == "cache folder"]
        return found

    assert cache().value == "~/.cache/pmm-edge is nowhere: this user has no home folder"
    assert cache().good is False
    assert cache().remedy == "Set PMM_HOME to the whole path of a folder"
    monkeypatch.setenv("PMM_HOME", str(tmp_path))
    assert cache().value.startswith("the folder that is set, ")


def test_the_model_made_by_hand_is_one() -> None:
    onnx.checker.check_model(onnx.load_from_string(doctor.addition()), full_check=True)
    session = onnxruntime.InferenceSession(doctor.addition(), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.float32([1.5])})[0].tolist() == [3.0]


def test_providers_are_asked_and_not_believed() -> None:
    found = doctor.probe("onnxruntime")["providers"]
    assert list(found) == onnxruntime.get_available_providers()
    assert found["CPUExecutionProvider"] is None
    if "CUDAExecutionProvider" in found and "error" in doctor.probe("gpus"):
        assert found["CUDAExecutionProvider"]


@pytest.mark.skipif(
    not shutil.which("cc") or "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="needs a C compiler and onnxruntime-gpu",
)
def test_a_driver_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "cuda.c"
    source.write_text("int cuInit(unsigned flags) { return 999; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", source], check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    assert "does not start (cuInit gives 999)" in doctor.probe("gpus")["error"]
    found = doctor.probe("onnxruntime")["providers"]
    assert ".so" in found["CUDAExecutionProvider"]  # which library is missing, or misses what
    assert found["CPUExecutionProvider"] is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("import os; os.abort()", "crashed with signal 6"),
        ("import os; os._exit(3)", "ended with code 3"),
        ("raise OSError('libfoo.so.1: no such file')", "OSError: libfoo.so.1"),
        ("import time; time.sleep(60)", "did not answer within 1 s"),
    ],
)
def test_libraries_that_break_as_they_load(
    content: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put(tmp_path, "onnxruntime/__init__.py", content)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path) + os.pathsep + os.environ.get("PYTHONPATH", ""))
    if "sleep" in content:
        monkeypatch.setattr(doctor, "_SECONDS", 1.0)
    found = doctor.probe("onnxruntime")
    assert message in found["error"]
    assert "\n" not in found["error"]
    ready = {item.command: item for item in readiness(found, NO_TENSORRT)}
    assert any(message in limit for limit in ready["embed"].limits)  # PyTorch is there
    assert not ready["export"].usable


def test_readiness_here() -> None:
    ready = {item.command: item for item in readiness(doctor.probe("onnxruntime"), NO_TENSORRT)}
    assert all(item.usable for name, item in ready.items() if name != "trt")
    assert ready["trt"].missing == ["TensorRT is not installed"]
    assert ready["trt"].remedies == ["pip install 'pmm-edge[trt]'"]
    assert ready["verify"].words == "ready"


def test_no_engine_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from pmm_edge import doctor as commands

    monkeypatch.setattr(commands, "importable", lambda module: module in ("numpy", "PIL"))
    ready = {item.command: item for item in readiness({"error": "ModuleNotFoundError"}, NO_TENSORRT)}
    assert not ready["embed"].usable
    assert not ready["visualize"].usable
    assert not ready["export"].usable
    assert ready["train"].missing[0].startswith("torch, torchvision, ")
    assert ready["train"].remedies == ["pip install 'pmm-edge[train]'"]
    assert ready["data"].usable
    with_onnx = {"providers": {"CPUExecutionProvider": None}}
    ready = {item.command: item for item in readiness(with_onnx, NO_TENSORRT)}
    assert ready["embed"].usable
    assert "no .pt and .safetensors files (torch is not installed)" in ready["embed"].limits
    assert any("--reference MODEL.onnx" in limit for limit in ready["bench"].limits)
    assert "no --explain" in ready["bench"].limits
    assert "no cams and no mixing, which are of checkpoints" in ready["visualize"].limits
    assert ready["export"].words == (
        "ready, but only --triton and --deepstream of a .onnx file (torch, torchvision, onnx, onnxscript, safetensors"
        " not installed)"
    )
    assert ready["export"].remedies == ["pip install 'pmm-edge[train]'"]


def test_bench_draws_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    from pmm_edge import doctor as commands

    monkeypatch.setattr(commands, "importable", lambda module: module != "matplotlib")
    ready = {item.command: item for item in readiness({"providers": {"CPUExecutionProvider": None}}, NO_TENSORRT)}
    assert not any("plot" in limit or "--explain" in limit for limit in ready["bench"].limits)
    assert "no --cmc plot" in ready["eval"].limits


def test_nothing_that_is_shown_names_a_folder_of_somebody() -> None:
    home = Path.home()
    assert shareable(f"cannot open {home}/.venv/lib/x.so: no") == "cannot open ~/.venv/lib/x.so: no"
    assert shareable(f"nothing in {home}.") == "nothing in ~."
    assert shareable("/opt/alice/venv/lib/x.so: undefined\n symbol") == "…/x.so: undefined symbol"
    assert shareable("see https://example.com/a/b and ~/a/b") == "see https://example.com/a/b and ~/a/b"
    diagnosis = examine()
    for text in (as_markdown(diagnosis), json.dumps(diagnosis.to_json())):
        assert f"{home}/" not in text
        assert str(Path(__file__).parents[1]) not in text


def test_markdown_is_not_broken_by_what_it_shows() -> None:
    findings = [Finding("GPU | 1", "a `b` <img> @somebody", False, "Do this")]
    said = as_markdown(Diagnosis([Section("GPU", findings)], []))
    assert r"| GPU \| 1 | **wrong**: a 'b' &lt;img> @" in said
    assert "@somebody" not in said
    assert "Do this" in said
