"""The machine is described from files as the kernel lays them out."""

import os
from pathlib import Path

import pytest

from pmm_edge.bench import environment as module
from pmm_edge.bench.environment import environment, machine_state
from pmm_edge.bench.report import Clocks, Latency
from pmm_edge.machine import clocks_are_locked, usable_cores
from pmm_edge.runtime import Embedder
from pmm_edge.spec import InputSpec, ModelSpec


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{content}\n")


def cpufreq(root: Path, core: int, governor: str, now: int, least: int, most: int) -> None:
    folder = root / f"sys/devices/system/cpu/cpu{core}/cpufreq"
    write(folder / "scaling_governor", governor)
    for name, value in (("cur", now), ("min", least), ("max", most)):
        write(folder / f"scaling_{name}_freq", value)


class Engine(Embedder):
    """What runs where, with how many threads; no network."""

    def __init__(self, device: str, backend: str = "onnxruntime", threads: int | None = None) -> None:
        super().__init__(ModelSpec("pmm", "resnet18", 4, InputSpec(4, 2), 3, {}, 1), Path("model"), backend, device)
        self.threads = threads

    embed_prepared = None


def timed(cpu: Clocks | None = None, gpu: Clocks | None = None) -> Latency:
    return Latency(1, "model", False, 50, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, cpu_clocks=cpu, gpu_clocks=gpu)


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)


def test_this_machine() -> None:
    found = environment([Engine("cpu")], machine_state())
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
    found = environment([Engine("cuda:0")], None, [timed(Clocks(1728, 1984), Clocks(612, 918))], tmp_path)
    assert found["board"] == "NVIDIA Jetson Orin NX Engineering Reference Developer Kit"
    assert found["jetson"] == "R36 (release), REVISION: 4.3"
    assert found["cores"] == "8, 6 of them usable"
    assert found["cpu clocks"] == "1728 to 1984 MHz, governor schedutil, locked"
    assert found["gpu clocks"] == "612 to 918 of 918 MHz, locked"
    assert found["power mode"] == "MAXN_SUPER (0)"


def test_clocks_are_those_of_the_timings_and_not_of_a_machine_at_rest(tmp_path: Path) -> None:
    cpufreq(tmp_path, 0, "performance", 800000, 800000, 3500000)
    cpufreq(tmp_path, 1, "powersave", 800000, 800000, 3500000)
    latencies = [timed(Clocks(3100, 3400)), timed(Clocks(2900, 3300)), timed()]
    told = environment(latencies=latencies, root=tmp_path)["cpu clocks"]
    assert told == "2900 to 3400 MHz, governor performance, powersave"
    assert environment(latencies=[timed()], root=tmp_path)["cpu clocks"] == "governor performance, powersave"
    assert not clocks_are_locked(tmp_path)


def test_a_processor_by_name(tmp_path: Path) -> None:
    write(tmp_path / "proc/cpuinfo", "processor\t: 0\nmodel name\t: AMD EPYC\nprocessor\t: 1\nmodel name\t: AMD EPYC")
    assert environment(root=tmp_path)["processor"] == "AMD EPYC"


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


def test_threads_are_those_that_were_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in module._THREAD_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    engines = [Engine("cpu", "torch", 3), Engine("cpu", threads=2), Engine("cuda:0", "tensorrt")]
    engines.append(Engine("cuda:0", "onnxruntime-tensorrt"))
    assert environment(engines)["threads"] == "OMP_NUM_THREADS=3, torch 3, onnxruntime 2"
    assert environment([Engine("cpu")])["threads"] == "OMP_NUM_THREADS=3, onnxruntime by default"


def test_the_gpu_is_that_of_any_model_with_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        name, driver, most_mhz = "NVIDIA H100", "580.65.06", 1980

    monkeypatch.setattr(module, "open_gpu", lambda device: Gpu() if device == "cuda:1" else None)
    engines = [Engine("cpu", "torch"), Engine("cuda:1"), Engine("cuda:0")]
    found = environment(engines, latencies=[timed(), timed(gpu=Clocks(1410, 1755))])
    assert (found["gpu"], found["gpu clocks"]) == ("NVIDIA H100, driver 580.65.06", "1410 to 1755 of 1980 MHz")
    assert environment(engines)["gpu clocks"] == "at most 1980 MHz"
    assert "gpu" not in environment(engines[:1])
