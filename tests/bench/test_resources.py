"""The machine, its noise, clocks and energy, from files as the kernel lays them out and a simulated NVML."""

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pynvml
import pytest

from pmm_edge.bench import resources
from pmm_edge.bench.report import Clocks, Latency, WarningKind
from pmm_edge.bench.resources import MachineState, environment, measure_energy, noise_warnings, open_gpu
from pmm_edge.machine import instruction_set, sums_in_float16, usable_cores
from pmm_edge.runtime import Embedder
from pmm_edge.spec import InputSpec, ModelSpec

QUIET = MachineState(load=0.1, cores=2, throttle_events=0)
BATCH = np.zeros((4, 4, 2, 3), np.uint8)
CPU = "sys/devices/system/cpu"


class Engine(Embedder):
    """A device and a number of threads; it counts runs, and there is no network."""

    def __init__(self, device: str = "cpu", backend: str = "onnxruntime", threads: int | None = None) -> None:
        super().__init__(ModelSpec("pmm", "none", 1, InputSpec(4, 2), 3, {}), Path("model"), backend, device)
        self.threads, self.runs = threads, 0

    def embed_prepared(self, images: np.ndarray) -> np.ndarray:
        self.runs += 1
        time.sleep(0.001)
        return np.zeros((len(images), 3), np.float32)


def write(root: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")


def timed(variation: float = 0.0, gpu: Clocks | None = None) -> Latency:
    return Latency(1, "model", False, 50, 1.0, 1.0, 1.0, variation, 1.0, 1.0, 1.0, 1.0, gpu_clocks=gpu)


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """NVML with one GPU that CUDA calls cuda:1; an answer that is missing is not supported."""
    energy = iter(range(5000, 10**6, 1500))
    answers: dict[str, object] = {
        "nvmlDeviceGetName": lambda: "NVIDIA H100",
        "nvmlDeviceGetMaxClockInfo": lambda: 1980,
        "nvmlDeviceGetClockInfo": lambda: 1410,
        "nvmlDeviceGetTotalEnergyConsumption": lambda: next(energy),
    }

    def unsupported() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    for name in list(answers):
        monkeypatch.setattr(pynvml, name, lambda handle, *rest, name=name: answers.get(name, unsupported)())
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "580.65.06")
    handle = {b"0000:C1:00.0": "handle"}
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByPciBusId", lambda bus_id: handle.get(bus_id) or unsupported())
    monkeypatch.setattr(resources, "_pci_bus_id", {0: b"0000:01:00.0", 1: b"0000:C1:00.0"}.get)
    return answers


# Environment and noise


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in resources._THREAD_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    engines = Engine("cpu", "torch", 3), Engine("cpu"), Engine("cuda:0", "tensorrt")
    found = environment(engines, resources.machine_state())
    assert found.cpu
    assert found.cores >= found.usable_cores > 0
    assert {"numpy", "pillow"} <= found.versions.keys()
    assert found.thread_settings == {"OMP_NUM_THREADS": "3"}
    assert found.threads == {"torch": 3, "onnxruntime": None}


def test_an_orin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eight_cores: None) -> None:
    scaling = {"governor": "schedutil", "min_freq": 1984000, "max_freq": 1984000}
    frequencies = {
        f"{CPU}/cpu{core}/cpufreq/scaling_{name}": value for core in range(6) for name, value in scaling.items()
    }
    board = "NVIDIA Jetson Orin NX Engineering Reference Developer Kit"
    files = {
        "proc/device-tree/model": f"{board}\0",
        "proc/cpuinfo": "processor\t: 0\nBogoMIPS\t: 62.50\nFeatures\t: fp asimd aes asimddp",
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic",
        "sys/class/devfreq/17000000.gpu/max_freq": 918000000,
        "bin/nvpmodel": "#!/bin/sh\necho 'NV Power Mode: MAXN_SUPER'\necho 0",
    }
    write(tmp_path, files | frequencies)
    (tmp_path / "bin/nvpmodel").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    latencies = [timed(gpu=Clocks(612, 714)), timed(gpu=Clocks(816, 918)), timed()]
    found = environment([Engine("cuda:0", "tensorrt")], resources.machine_state(tmp_path), latencies, tmp_path)
    assert (found.board, found.l4t, found.power_mode) == (board, "R36 (release), REVISION: 4.3", "MAXN_SUPER (0)")
    assert (found.cores, found.usable_cores, found.instruction_set) == (8, 6, "asimddp")
    assert (found.governors, found.clocks_locked) == (("schedutil",), True)
    assert (found.gpu_clocks, found.gpu_max_mhz) == (Clocks(612, 918), 918)
    monkeypatch.setattr(resources, "open_gpu", lambda device: SimpleNamespace(name="Orin", driver="540", max_mhz=None))
    found = environment([Engine("cuda:0", "tensorrt")], QUIET, root=tmp_path)
    assert (found.gpu, found.gpu_max_mhz) == ("Orin", 918)  # NVML of a Jetson does not know its clocks


def test_the_instruction_set(tmp_path: Path) -> None:
    names = {"sse2 avx avx2": "avx2", "avx2 avx512f avx512_vnni": "avx512_vnni", "avx2 avx_vnni": "avx_vnni"}
    for flags, name in names.items():
        write(tmp_path, {"proc/cpuinfo": f"processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu {flags}"})
        assert instruction_set(tmp_path) == name
    assert environment([], QUIET, root=tmp_path).cpu == "AMD EPYC"
    for features, in_float16 in (("fp asimd", False), ("fp asimd fphp asimdhp asimddp", True)):
        write(tmp_path, {"proc/cpuinfo": f"processor\t: 0\nFeatures\t: {features}"})
        assert sums_in_float16(tmp_path) == in_float16


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
    write(tmp_path, {"proc/self/cgroup": cgroup})
    write(tmp_path / "sys/fs/cgroup", files)
    assert usable_cores(tmp_path) == cores


def test_noise(tmp_path: Path) -> None:
    assert noise_warnings([timed(0.02), timed(0.14)], QUIET, tmp_path) == []
    (busy,) = noise_warnings([timed()], QUIET._replace(load=3.2), tmp_path)
    assert (busy.kind, busy.value, busy.limit) == (WarningKind.BUSY, 3.2, 1.0)
    assert not noise_warnings([timed()], QUIET._replace(load=3.2, cores=64), tmp_path)
    assert not noise_warnings([timed()], QUIET._replace(load=None), tmp_path)
    (noisy,) = noise_warnings([timed(0.02), timed(0.2), timed(0.31)], QUIET, tmp_path)
    assert (noisy.kind, noisy.value, noisy.limit, noisy.count, noisy.total) == (WarningKind.NOISY, 0.31, 0.15, 2, 3)
    counts = {f"{CPU}/cpu0/thermal_throttle/core_throttle_count": 3, "sys/class/hwmon/hwmon2/oc1_event_cnt": 1}
    write(tmp_path, {"proc/loadavg": "7.25 3.10 1.00 3/120 4711"} | counts)  # now two others run
    before = resources.machine_state(tmp_path)
    assert (before.load, before.throttle_events) == (2, 4)
    write(tmp_path, {"sys/class/hwmon/hwmon2/oc1_event_cnt": 3})
    (found,) = noise_warnings([timed()], before._replace(load=0), tmp_path)
    assert (found.kind, found.count) == (WarningKind.THROTTLED, 2)
    assert not noise_warnings([timed()], before._replace(load=0, throttle_events=9), tmp_path)


# GPUs and clocks


def test_gpus(nvml: dict[str, object]) -> None:
    gpu = open_gpu("cuda:1")
    assert (gpu.name, gpu.driver, gpu.max_mhz, gpu.clock_mhz) == ("NVIDIA H100", "580.65.06", 1980, 1410)
    assert gpu.joules == 5.0
    found = environment([Engine("cpu", "torch"), Engine("cuda:1"), Engine("cuda:0")], QUIET)  # the first GPU
    assert (found.gpu, found.driver, found.gpu_max_mhz) == ("NVIDIA H100", "580.65.06", 1980)
    assert environment([Engine("cpu")], QUIET).gpu is None
    nvml.clear()
    gpu = open_gpu("cuda:1")
    assert (gpu.name, gpu.max_mhz, gpu.clock_mhz, gpu.joules) == (None,) * 4
    assert [open_gpu(device) for device in ("cpu", "cuda:0", "cuda:2")] == [None] * 3  # NVML does not know cuda:0


def test_clocks_of_the_fastest_core_and_of_gpus(tmp_path: Path, nvml: dict[str, object]) -> None:
    assert resources.clock_reader("cpu", tmp_path)() == (None, None)
    devices = tmp_path / "sys/class/devfreq"
    write(devices, {"17000000.gpu/cur_freq": 918_000_000, "15340000.vic/cur_freq": 115_200_000})
    assert resources.clock_reader("cuda:0", tmp_path)() == (None, 918)
    for core, khz in ((0, 800_000), (1, "<unknown>"), (10, 3_400_000)):
        write(tmp_path, {f"{CPU}/cpu{core}/cpufreq/scaling_cur_freq": khz})
    assert resources.clock_reader("cpu", tmp_path)() == (3400, None)
    (devices / "17000000.gpu/cur_freq").unlink()
    assert resources.clock_reader("cuda:1", tmp_path)() == (3400, 1410)
    assert resources.clock_range([1500, None, 1200, 1400]) == Clocks(1200, 1500)
    assert resources.clock_range([None, None]) is None


# Energy


def sensor(root: Path, address: str, number: int, *channels: tuple[str, int, int]) -> Path:
    """An INA3221 as JetPack 6 shows it: a device folder that the driver links to."""
    device = root / "sys/devices/platform/bus@0/c240000.i2c/i2c-1" / address
    hwmon = device / f"hwmon/hwmon{number}"
    write(hwmon, {"name": "ina3221", "in7_label": "sum of shunt voltages"})
    for channel, (label, millivolts, milliamperes) in enumerate(channels, start=1):
        values = {f"in{channel}_label": label, f"in{channel}_input": millivolts, f"curr{channel}_input": milliamperes}
        write(hwmon, values)
    link = root / "sys/bus/i2c/drivers/ina3221" / address
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(device)  # some kernels do not list it in sys/class/hwmon
    return hwmon


def test_the_input_rail_of_an_orin_nx_is_the_whole_module(tmp_path: Path) -> None:
    channels = ("VDD_IN", 5000, 2000), ("VDD_CPU_GPU_CV", 5000, 800), ("VDD_SOC", 5000, 400)
    sensor(tmp_path, "1-0040", 4, *channels)
    write(tmp_path / "sys/class/hwmon/hwmon0", {"name": "tmp451", "in1_label": "VDD_IN"})
    ((millivolts, milliamperes),) = resources.power_rails(tmp_path)
    assert (millivolts.read_text(), milliamperes.read_text()) == ("5000\n", "2000\n")


def test_the_rails_of_an_agx_orin_add_up(tmp_path: Path) -> None:
    sensor(tmp_path, "1-0040", 3, ("VDD_GPU_SOC", 20000, 500), ("VDD_CPU_CV", 20000, 100), ("VIN_SYS_5V0", 5000, 1000))
    second = sensor(tmp_path, "1-0041", 4, ("VDD_IN", 0, 0), ("VDDQ_VDD2_1V8AO", 5000, 300))
    (second / "in1_input").unlink()  # disabled
    assert len(resources.power_rails(tmp_path)) == 3
    found = measure_energy(Engine(), BATCH, 0.05, tmp_path)
    assert found.watts == pytest.approx(17.0)


def test_energy_of_rails_and_gpus(tmp_path: Path, nvml: dict[str, object]) -> None:
    engine = Engine()
    assert measure_energy(engine, BATCH, root=tmp_path) is None
    assert not engine.runs
    sensor(tmp_path, "1-0040", 3, ("VDD_IN", 5000, 1000))
    threads = set(threading.enumerate())
    found = measure_energy(engine, BATCH, 0.1, tmp_path)
    assert (found.source, found.batch, found.watts) == ("INA3221", 4, pytest.approx(5))
    assert found.seconds >= 0.1
    assert found.joules_per_embedding * 4 * (engine.runs - 1) == pytest.approx(found.watts * found.seconds)
    assert set(threading.enumerate()) <= threads
    found = measure_energy(Engine("cuda:1"), BATCH, 0.02, tmp_path)  # the counter of a GPU comes first
    assert (found.source, found.watts * found.seconds) == ("NVML", pytest.approx(1.5))
    nvml.clear()  # as on a Jetson, whose NVML has no energy counter
    found = measure_energy(Engine("cuda:1"), BATCH, 0.02, tmp_path)
    assert found.source == "INA3221"


def test_energy_that_cannot_be_read_is_missing(
    tmp_path: Path, nvml: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = iter([5000, 5000])  # one to see whether there is a counter, one before the runs, and none after them
    nvml["nvmlDeviceGetTotalEnergyConsumption"] = lambda: next(counter, None)
    assert measure_energy(Engine("cuda:1"), BATCH, 0.02, tmp_path) is None
    sensor(tmp_path, "1-0040", 3, ("VDD_IN", 5000, 1000))
    monkeypatch.setattr(resources, "RAIL_SAMPLE_SECONDS", 0.001)
    values, text_of = iter(["", "5000"] * 10_000), resources.text_of  # busy every other time
    monkeypatch.setattr(resources, "text_of", lambda file: next(values) if file.name == "in1_input" else text_of(file))
    rails = resources.power_rails(tmp_path) or resources.power_rails(tmp_path)
    monkeypatch.setattr(resources, "power_rails", lambda root: rails)
    assert measure_energy(Engine(), BATCH, 0.05, tmp_path).watts == pytest.approx(5)
    monkeypatch.setattr(resources, "text_of", lambda file: "")
    assert measure_energy(Engine(), BATCH, 0.02, tmp_path) is None
