"""The machine is described from files as the kernel lays them out."""

import os
from pathlib import Path

import pytest

from pmm_edge.bench import environment as module
from pmm_edge.bench.environment import environment
from pmm_edge.bench.quiet import machine_state
from pmm_edge.machine import clocks_are_locked, usable_cores


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{content}\n")


def cpufreq(root: Path, core: int, governor: str, now: int, least: int, most: int) -> None:
    folder = root / f"sys/devices/system/cpu/cpu{core}/cpufreq"
    write(folder / "scaling_governor", governor)
    for name, value in (("cur", now), ("min", least), ("max", most)):
        write(folder / f"scaling_{name}_freq", value)


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)


def test_this_machine() -> None:
    found = environment(before=machine_state())
    assert {"processor", "cores", "threads", "load", "system", "python", "numpy", "pillow"} <= found.keys()
    assert all(found.values())
    assert all("\n" not in value for value in found.values())


def test_an_orin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eight_cores: None) -> None:
    write(tmp_path / "proc/device-tree/model", "NVIDIA Jetson Orin NX Engineering Reference Developer Kit\0")
    write(tmp_path / "proc/cpuinfo", "processor\t: 0\nBogoMIPS\t: 62.50")
    write(tmp_path / "etc/nv_tegra_release", "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic")
    for core in range(6):
        cpufreq(tmp_path, core, "schedutil", 1984000, 1984000, 1984000)
    gpu = tmp_path / "sys/class/devfreq/17000000.gpu"
    for name, value in (("cur_freq", 918000000), ("min_freq", 918000000), ("max_freq", 918000000)):
        write(gpu / name, value)
    tool = tmp_path / "bin/nvpmodel"
    write(tool, "#!/bin/sh\necho 'NV Power Mode: MAXN_SUPER'\necho 0")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    found = environment(tmp_path)
    assert found["board"] == "NVIDIA Jetson Orin NX Engineering Reference Developer Kit"
    assert found["jetson"] == "R36 (release), REVISION: 4.3"
    assert found["cores"] == "8, 6 of them usable"
    assert found["cpu clocks"] == "1984 to 1984 MHz, governor schedutil, locked"
    assert found["gpu clocks"] == "918 of 918 MHz, locked"
    assert found["power mode"] == "MAXN_SUPER (0)"


def test_clocks_that_move(tmp_path: Path) -> None:
    cpufreq(tmp_path, 0, "performance", 3400000, 800000, 3500000)
    cpufreq(tmp_path, 1, "powersave", 1200000, 800000, 3500000)
    assert environment(tmp_path)["cpu clocks"] == "1200 to 3400 MHz, governor performance, powersave"
    assert not clocks_are_locked(tmp_path)


def test_a_processor_by_name(tmp_path: Path) -> None:
    write(tmp_path / "proc/cpuinfo", "processor\t: 0\nmodel name\t: AMD EPYC\nprocessor\t: 1\nmodel name\t: AMD EPYC")
    assert environment(tmp_path)["processor"] == "AMD EPYC"


@pytest.mark.parametrize(
    ("cgroup", "files", "cores"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/user/job", {"user/cpu.max": "200000 100000", "user/job/cpu.max": "max 100000"}, 2),
        ("0::/host/name", {"cpu.max": "400000 100000"}, 4),
        ("4:cpu,cpuacct:/a", {"cpu,cpuacct/a/cpu.cfs_quota_us": 50000, "cpu,cpuacct/a/cpu.cfs_period_us": 100000}, 0.5),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100000}, 6),
        ("", {}, 6),
    ],
)
def test_cores_that_may_be_used(
    cgroup: str, files: dict[str, object], cores: float, tmp_path: Path, eight_cores: None
) -> None:
    write(tmp_path / "proc/self/cgroup", cgroup)
    for name, content in files.items():
        write(tmp_path / "sys/fs/cgroup" / name, content)
    assert usable_cores(tmp_path) == cores


def test_settings_of_threads_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS=3" in environment()["threads"]


def test_a_gpu_is_named_with_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        name, driver, clocks_mhz = "NVIDIA H100", "580.65.06", (1410, 1980)

    monkeypatch.setattr(module, "open_gpu", lambda device: Gpu())
    found = environment()
    assert (found["gpu"], found["gpu clocks"]) == ("NVIDIA H100, driver 580.65.06", "1410 of 1980 MHz")
