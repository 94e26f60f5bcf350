"""The machine and its noise, from files as the kernel lays them out."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from pmm_edge.bench import environment as module
from pmm_edge.bench.environment import MachineState, environment, machine_state, noise_warnings
from pmm_edge.bench.report import Clocks, Latency, Throttle, WarningKind
from pmm_edge.machine import instruction_set, usable_cores
from pmm_edge.runtime import Embedder
from pmm_edge.spec import InputSpec, ModelSpec

QUIET = MachineState(load=0.1, cores=2, throttle_events=0)


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{content}\n")


class Engine(Embedder):
    """A device and a number of threads; there is no network."""

    def __init__(self, device: str, backend: str = "onnxruntime", threads: int | None = None) -> None:
        super().__init__(ModelSpec("pmm", "resnet18", 4, InputSpec(4, 2), 3, {}, 1), Path("model"), backend, device)
        self.threads = threads

    embed_prepared = None


def timed(variation: float = 0.0, gpu: Clocks | None = None, slowed_by: tuple[Throttle, ...] = ()) -> Latency:
    latency = Latency(1, "model", False, 50, 1.0, 1.0, 1.0, variation, 1.0, 1.0, 1.0, 1.0)
    return replace(latency, gpu_clocks=gpu, slowed_by=slowed_by)


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in module._THREAD_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = environment([Engine("cpu", "torch", 3), Engine("cpu"), Engine("cuda:0", "tensorrt")], machine_state())
    assert found.cpu
    assert found.cores >= found.usable_cores > 0
    assert found.load is not None
    assert {"numpy", "pillow"} <= found.versions.keys()
    assert found.thread_settings == {"OMP_NUM_THREADS": "3"}
    assert found.threads == {"torch": 3, "onnxruntime": None}


def test_an_orin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eight_cores: None) -> None:
    write(tmp_path / "proc/device-tree/model", "NVIDIA Jetson Orin NX Engineering Reference Developer Kit\0")
    write(tmp_path / "proc/cpuinfo", "processor\t: 0\nBogoMIPS\t: 62.50\nFeatures\t: fp asimd aes asimddp")
    write(tmp_path / "etc/nv_tegra_release", "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic")
    for core in range(6):
        for name, value in {"governor": "schedutil", "min_freq": 1984000, "max_freq": 1984000}.items():
            write(tmp_path / f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_{name}", value)
    write(tmp_path / "sys/class/devfreq/17000000.gpu/max_freq", 918000000)
    tool = tmp_path / "bin/nvpmodel"
    write(tool, "#!/bin/sh\necho 'NV Power Mode: MAXN_SUPER'\necho 0")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    clocks = [timed(gpu=Clocks(612, 714)), timed(gpu=Clocks(816, 918)), timed()]
    found = environment([Engine("cuda:0", "tensorrt")], machine_state(tmp_path), clocks, tmp_path)
    assert found.board == "NVIDIA Jetson Orin NX Engineering Reference Developer Kit"
    assert (found.l4t, found.power_mode) == ("R36 (release), REVISION: 4.3", "MAXN_SUPER (0)")
    assert (found.cores, found.usable_cores, found.instruction_set) == (8, 6, "asimddp")
    assert (found.governors, found.clocks_locked) == (("schedutil",), True)
    assert (found.gpu_clocks, found.gpu_max_mhz) == (Clocks(612, 918), 918)


def test_the_first_gpu_that_a_model_ran_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        name, driver, max_mhz = "NVIDIA H100", "580.65.06", 1980

    monkeypatch.setattr(module, "open_gpu", lambda device: Gpu() if device == "cuda:1" else None)
    found = environment([Engine("cpu", "torch"), Engine("cuda:1"), Engine("cuda:0")], QUIET)
    assert (found.gpu, found.driver, found.gpu_max_mhz) == ("NVIDIA H100", "580.65.06", 1980)
    assert environment([Engine("cpu")], QUIET).gpu is None


@pytest.mark.parametrize(
    ("flags", "name"),
    [("sse2 avx avx2", "avx2"), ("avx2 avx512f avx512_vnni", "avx512_vnni"), ("avx2 avx_vnni", "avx_vnni")],
)
def test_the_instruction_set(flags: str, name: str, tmp_path: Path) -> None:
    write(tmp_path / "proc/cpuinfo", f"processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu {flags}")
    assert instruction_set(tmp_path) == name
    assert environment([], QUIET, root=tmp_path).cpu == "AMD EPYC"


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
def test_usable_cores(cgroup: str, files: dict[str, object], cores: float, tmp_path: Path, eight_cores: None) -> None:
    write(tmp_path / "proc/self/cgroup", cgroup)
    for name, content in files.items():
        write(tmp_path / "sys/fs/cgroup" / name, content)
    assert usable_cores(tmp_path) == cores


def test_noise(tmp_path: Path) -> None:
    assert noise_warnings([timed(0.02), timed(0.14)], QUIET, tmp_path) == []
    (busy,) = noise_warnings([timed()], replace(QUIET, load=3.2), tmp_path)
    assert (busy.kind, busy.value, busy.limit) == (WarningKind.BUSY, 3.2, 1.0)
    assert not noise_warnings([timed()], replace(QUIET, load=3.2, cores=64), tmp_path)
    assert not noise_warnings([timed()], replace(QUIET, load=None), tmp_path)
    (noisy,) = noise_warnings([timed(0.02), timed(0.2), timed(0.31)], QUIET, tmp_path)
    assert (noisy.kind, noisy.value, noisy.limit, noisy.count, noisy.total) == (WarningKind.NOISY, 0.31, 0.15, 2, 3)
    write(tmp_path / "proc/loadavg", "7.25 3.10 1.00 3/120 4711")  # much ran a minute ago; now two others do
    assert machine_state(tmp_path).load == 2


def test_throttling(tmp_path: Path) -> None:
    write(tmp_path / "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count", 3)
    write(tmp_path / "sys/class/hwmon/hwmon2/oc1_event_cnt", 1)
    before = machine_state(tmp_path)
    assert before.throttle_events == 4
    assert noise_warnings([timed()], before, tmp_path) == []
    write(tmp_path / "sys/class/hwmon/hwmon2/oc1_event_cnt", 3)
    hot = [timed(slowed_by=(Throttle.TEMPERATURE,)), timed(), timed(slowed_by=(Throttle.POWER_LIMIT,))]
    (found,) = noise_warnings([*hot, *hot], before, tmp_path)
    assert (found.kind, found.count) == (WarningKind.THROTTLED, 2)
    assert found.slowed_by == (Throttle.TEMPERATURE, Throttle.POWER_LIMIT)
