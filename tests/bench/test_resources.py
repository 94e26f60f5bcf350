"""Clocks, GPU queries and energy, from files as the kernel lays them out and a simulated NVML."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pynvml
import pytest

from pmm_edge.bench import resources
from pmm_edge.bench.report import Clocks, Throttle
from pmm_edge.bench.resources import (
    ClockReading,
    clock_range,
    clock_reader,
    jetson_gpu,
    measure_energy,
    open_gpu,
    power_rails,
)
from pmm_edge.runtime import Embedder
from pmm_edge.spec import InputSpec, ModelSpec

BATCH = np.zeros((4, 4, 2, 3), np.uint8)


class Counted(Embedder):
    def __init__(self, device: str = "cpu") -> None:
        super().__init__(ModelSpec("pmm", "none", 1, InputSpec(4, 2), 3, {}), Path("model"), "none", device)
        self.runs = 0

    def embed_prepared(self, images: np.ndarray) -> np.ndarray:
        self.runs += 1
        time.sleep(0.001)
        return np.zeros((len(images), 3), np.float32)


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{content}\n")


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """NVML with one GPU that CUDA calls cuda:1; an answer that is missing is not supported."""
    energy = iter(range(5000, 10**6, 1500))
    answers: dict[str, object] = {
        "nvmlDeviceGetName": lambda: "NVIDIA H100",
        "nvmlDeviceGetMaxClockInfo": lambda: 1980,
        "nvmlDeviceGetClockInfo": lambda: 1410,
        "nvmlDeviceGetMemoryInfo": lambda: SimpleNamespace(used=3 << 30),
        "nvmlDeviceGetCurrentClocksEventReasons": lambda: 0x65,
        "nvmlDeviceGetTotalEnergyConsumption": lambda: next(energy),
    }

    def unsupported() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def handle(bus_id: bytes) -> str:
        return "handle" if bus_id == b"0000:C1:00.0" else unsupported()

    for name in list(answers):
        monkeypatch.setattr(pynvml, name, lambda handle, *rest, name=name: answers.get(name, unsupported)())
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "580.65.06")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByPciBusId", handle)
    monkeypatch.setattr(resources, "_pci_bus_id", {0: b"0000:01:00.0", 1: b"0000:C1:00.0"}.get)
    return answers


def test_a_gpu(nvml: dict[str, object]) -> None:
    gpu = open_gpu("cuda:1")
    assert gpu
    assert (gpu.name, gpu.driver, gpu.max_mhz, gpu.clock_mhz) == ("NVIDIA H100", "580.65.06", 1980, 1410)
    assert (gpu.joules, gpu.used_mib) == (5.0, 3072)
    assert gpu.slowed_by == (Throttle.POWER_LIMIT, Throttle.TEMPERATURE)
    nvml.clear()
    gpu = open_gpu("cuda:1")
    assert gpu
    assert (gpu.name, gpu.max_mhz, gpu.clock_mhz, gpu.joules, gpu.used_mib) == (None,) * 5
    assert gpu.slowed_by == ()


def test_no_gpu(nvml: dict[str, object]) -> None:
    assert open_gpu("cpu") is None
    assert open_gpu("cuda:0") is None  # known to CUDA, not to NVML
    assert open_gpu("cuda:2") is None


def test_clocks_of_the_fastest_core_and_of_gpus(tmp_path: Path, nvml: dict[str, object]) -> None:
    assert clock_reader("cpu", tmp_path)() == ClockReading()
    assert jetson_gpu(tmp_path) is None
    write(tmp_path / "sys/class/devfreq/17000000.gpu/cur_freq", 918_000_000)
    write(tmp_path / "sys/class/devfreq/15340000.vic/cur_freq", 115_200_000)
    assert clock_reader("cuda:0", tmp_path)() == ClockReading(gpu_mhz=918)
    for core, khz in ((0, 800_000), (1, "<unknown>"), (10, 3_400_000)):
        write(tmp_path / f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq", khz)
    assert clock_reader("cpu", tmp_path)() == ClockReading(3400)
    (tmp_path / "sys/class/devfreq/17000000.gpu/cur_freq").unlink()
    throttled = (Throttle.POWER_LIMIT, Throttle.TEMPERATURE)
    assert clock_reader("cuda:1", tmp_path)() == ClockReading(3400, 1410, throttled)
    assert clock_range([1500, None, 1200, 1400]) == Clocks(1200, 1500)
    assert clock_range([None, None]) is None


def sensor(sys: Path, address: str, number: int, *channels: tuple[str, int, int], by_class: bool = True) -> Path:
    """An INA3221 as JetPack 5 and 6 show it: a device folder that the driver and the class link to."""
    device = sys / "devices/platform/bus@0/c240000.i2c/i2c-1" / address
    hwmon = device / f"hwmon/hwmon{number}"
    write(hwmon / "name", "ina3221")
    write(hwmon / "in7_label", "sum of shunt voltages")
    for channel, (label, millivolts, milliamperes) in enumerate(channels, start=1):
        write(hwmon / f"in{channel}_label", label)
        write(hwmon / f"in{channel}_input", millivolts)
        write(hwmon / f"curr{channel}_input", milliamperes)
    links = [(sys / "bus/i2c/drivers/ina3221" / address, device)]
    if by_class:
        links.append((sys / f"class/hwmon/hwmon{number}", hwmon))
    for link, target in links:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
    return hwmon


@pytest.mark.parametrize("by_class", [True, False])
def test_the_input_rail_of_an_orin_nx_is_the_whole_module(tmp_path: Path, by_class: bool) -> None:
    channels = ("VDD_IN", 5000, 2000), ("VDD_CPU_GPU_CV", 5000, 800), ("VDD_SOC", 5000, 400)
    sensor(tmp_path, "1-0040", 4, *channels, by_class=by_class)
    write(tmp_path / "class/hwmon/hwmon0/name", "tmp451")
    write(tmp_path / "class/hwmon/hwmon0/in1_label", "VDD_IN")
    ((millivolts, milliamperes),) = power_rails(tmp_path)
    assert (millivolts.read_text(), milliamperes.read_text()) == ("5000\n", "2000\n")


def test_the_rails_of_an_agx_orin_add_up(tmp_path: Path) -> None:
    sensor(tmp_path, "1-0040", 3, ("VDD_GPU_SOC", 20000, 500), ("VDD_CPU_CV", 20000, 100), ("VIN_SYS_5V0", 5000, 1000))
    second = sensor(tmp_path, "1-0041", 4, ("VDD_IN", 0, 0), ("VDDQ_VDD2_1V8AO", 5000, 300))
    (second / "in1_input").unlink()  # disabled
    assert len(power_rails(tmp_path)) == 3
    found = measure_energy(Counted(), BATCH, 0.05, tmp_path)
    assert found
    assert found.watts == pytest.approx(17.0)


def test_energy_of_rails_and_gpus(tmp_path: Path, nvml: dict[str, object]) -> None:
    embedder = Counted()
    assert measure_energy(embedder, BATCH, sys=tmp_path) is None
    assert not embedder.runs
    sensor(tmp_path, "1-0040", 3, ("VDD_IN", 5000, 1000))
    threads = set(threading.enumerate())
    found = measure_energy(embedder, BATCH, 0.1, tmp_path)
    assert found
    assert (found.source, found.batch, found.watts) == ("INA3221", 4, pytest.approx(5))
    assert found.seconds >= 0.1
    assert found.joules_per_embedding * 4 * (embedder.runs - 1) == pytest.approx(found.watts * found.seconds)
    assert set(threading.enumerate()) <= threads
    found = measure_energy(Counted("cuda:1"), BATCH, 0.02, tmp_path)  # the counter of a GPU comes first
    assert found
    assert (found.source, found.watts * found.seconds) == ("NVML", pytest.approx(1.5))
    nvml.clear()  # as on a Jetson, whose NVML has no energy counter
    found = measure_energy(Counted("cuda:1"), BATCH, 0.02, tmp_path)
    assert found
    assert found.source == "INA3221"
