"""Clocks, GPU memory and energy: NVML for GPUs, the kernel's files for CPU clocks and for Jetson."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import pynvml

from pmm_edge.bench.report import Clocks, Energy, Throttle
from pmm_edge.images import Pixels
from pmm_edge.machine import CPUFREQ, text_of
from pmm_edge.runtime.embedder import Embedder, parse_device

_THROTTLES: dict[int, Throttle] = {
    pynvml.nvmlClocksEventReasonSwPowerCap: Throttle.POWER_LIMIT,
    pynvml.nvmlClocksEventReasonHwSlowdown: Throttle.HARDWARE,
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: Throttle.TEMPERATURE,
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: Throttle.TEMPERATURE,
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: Throttle.POWER_BRAKE,
}


class Gpu:
    """One GPU, queried through NVML. A value that the GPU or its driver does not support is None."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self.name: str | None = self._query(pynvml.nvmlDeviceGetName)
        self.driver = str(pynvml.nvmlSystemGetDriverVersion())
        self.max_mhz: int | None = self._query(pynvml.nvmlDeviceGetMaxClockInfo, pynvml.NVML_CLOCK_SM)

    @property
    def joules(self) -> float | None:
        """Energy since the driver was loaded; Volta and later."""
        millijoules = self._query(pynvml.nvmlDeviceGetTotalEnergyConsumption)
        return None if millijoules is None else millijoules / 1000

    @property
    def used_mib(self) -> float | None:
        """Memory in use by all processes."""
        memory = self._query(pynvml.nvmlDeviceGetMemoryInfo)
        return None if memory is None else memory.used / 2**20

    @property
    def clock_mhz(self) -> int | None:
        """Current clock of the multiprocessors."""
        clock: int | None = self._query(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM)
        return clock

    @property
    def slowed_by(self) -> tuple[Throttle, ...]:
        """What holds the clocks down right now; empty if nothing does or the driver does not say."""
        reasons = self._query(pynvml.nvmlDeviceGetCurrentClocksEventReasons) or 0
        return tuple(dict.fromkeys(throttle for bit, throttle in _THROTTLES.items() if reasons & bit))

    def _query(self, function: Callable[..., Any], *arguments: object) -> Any:
        try:
            return function(self._handle, *arguments)
        except pynvml.NVMLError:
            return None


def open_gpu(device: str) -> Gpu | None:
    """Open the GPU that CUDA calls `cuda:N`; None for `cpu`, and without a driver that supports NVML.

    NVML numbers GPUs differently, so that they are matched by PCI bus id.
    """
    kind, index = parse_device(device)
    bus_id = None if kind == "cpu" else _pci_bus_id(index)
    if bus_id is None:
        return None
    try:
        pynvml.nvmlInit()
        return Gpu(pynvml.nvmlDeviceGetHandleByPciBusId(bus_id))
    except pynvml.NVMLError:
        return None


def _pci_bus_id(index: int) -> bytes | None:
    """Ask the CUDA driver, which is present even where cuda-python is not."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, bus_id = ctypes.c_int(), ctypes.create_string_buffer(32)
    failed = cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), index)
    return None if failed or cuda.cuDeviceGetPCIBusId(bus_id, len(bus_id), device) else bus_id.value


@dataclass(frozen=True)
class ClockReading:
    """Clocks at one moment; None where the system does not report them."""

    cpu_mhz: int | None = None
    """Of the fastest core, because the others may be idle."""
    gpu_mhz: int | None = None
    slowed_by: tuple[Throttle, ...] = ()


def clock_reader(device: str, root: Path = Path("/")) -> Callable[[], ClockReading]:
    """Return a function that reads the clocks of the CPU, and of the GPU if `device` is one."""
    cores = list(root.glob(f"{CPUFREQ}/scaling_cur_freq"))
    gpu = open_gpu(device)
    jetson = jetson_gpu(root) if parse_device(device)[0] == "cuda" else None

    def read() -> ClockReading:
        gpu_mhz = gpu.clock_mhz if gpu else None  # first, because a GPU lowers its clock quickly
        slowed_by = gpu.slowed_by if gpu else ()
        if jetson and (hertz := text_of(jetson / "cur_freq")).isdecimal():
            gpu_mhz = int(hertz) // 10**6
        kilohertz = [int(text) for text in map(text_of, cores) if text.isdecimal()]
        return ClockReading(max(kilohertz) // 1000 if kilohertz else None, gpu_mhz, slowed_by)

    return read


def clock_range(readings: Iterable[int | None]) -> Clocks | None:
    """Return the lowest and highest of the clocks that were reported; None if there are none."""
    reported = [reading for reading in readings if reading is not None]
    return Clocks(min(reported), max(reported)) if reported else None


def jetson_gpu(root: Path) -> Path | None:
    """Return the devfreq folder of a Jetson's GPU; None on other machines."""
    endings = (".gpu", ".ga10b", ".gv11b", ".gp10b", ".gm20b")  # they depend on JetPack version and module
    return next((folder for folder in sorted(root.glob("sys/class/devfreq/*")) if folder.name.endswith(endings)), None)


Rail = tuple[Path, Path]
"""The millivolts and the milliamperes of one channel of an INA3221 power sensor."""
RAIL_SAMPLE_SECONDS = 0.02
"""Reading a power sensor takes about 1 ms on a Jetson."""
_RAILS = (
    ("VDD_IN",),  # the whole module; the other rails are parts of it
    ("5V_IN",),
    ("POM_5V_IN",),
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin; VDDQ_VDD2_1V8AO is fed by VIN_SYS_5V0
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier
)
"""Rails that add up to the power of a module."""


def measure_energy(embedder: Embedder, crops: Pixels, seconds: float = 5.0, sys: Path = Path("/sys")) -> Energy | None:
    """Run a model repeatedly on one batch and measure the energy that the device uses, idle power included.

    `crops` is the batch, (N, height, width, 3) uint8 RGB at network size. The duration in `seconds` must be long,
    because energy counters of GPUs update only a few times per second. Returns None if the machine has neither a GPU
    with an energy counter (NVML) nor the power rails of a Jetson (INA3221).
    """
    gpu, rails = open_gpu(embedder.device), power_rails(sys)
    before = gpu.joules if gpu else None
    if before is None and not rails:
        return None
    embedder.embed_prepared(crops)
    source: Literal["NVML", "INA3221"]
    if gpu and (before := gpu.joules) is not None:
        source, (runs, elapsed) = "NVML", _repeat(embedder, crops, seconds)
        after = gpu.joules
        assert after is not None
        joules = after - before
    else:
        stop = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            watts = pool.submit(_mean_watts, rails, stop)
            try:
                source, (runs, elapsed) = "INA3221", _repeat(embedder, crops, seconds)
            finally:
                stop.set()
        joules = watts.result() * elapsed
    return Energy(joules / (runs * len(crops)), joules / elapsed, source, len(crops), elapsed)


def _repeat(embedder: Embedder, crops: Pixels, seconds: float) -> tuple[int, float]:
    """Return how often the model ran, and the seconds this took."""
    start, runs = time.perf_counter(), 0
    while True:
        embedder.embed_prepared(crops)
        runs += 1
        if (elapsed := time.perf_counter() - start) >= seconds:
            return runs, elapsed


def _mean_watts(rails: list[Rail], stop: threading.Event) -> float:
    """Sample the power of the rails until `stop` is set."""
    watts: list[float] = []
    while not watts or not stop.wait(RAIL_SAMPLE_SECONDS):
        watts.append(sum(int(text_of(millivolts)) * int(text_of(amperes)) / 1e6 for millivolts, amperes in rails))
    return mean(watts)


def power_rails(sys: Path = Path("/sys")) -> list[Rail]:
    """Find the rails that add up to the power of a Jetson module; empty on other machines and for unknown rails."""
    rails: dict[str, Rail] = {}
    for folder in ("class/hwmon/hwmon*", "bus/i2c/drivers/ina3221/*/hwmon/hwmon*"):  # some kernels list only one
        for label in sys.glob(f"{folder}/in[1-3]_label"):
            channel = label.name[2]
            files = label.with_name(f"in{channel}_input"), label.with_name(f"curr{channel}_input")
            enabled = all(text_of(file) for file in files)
            if enabled and text_of(label.with_name("name")) == "ina3221":
                rails[text_of(label)] = files
    return next(([rails[name] for name in names] for names in _RAILS if rails.keys() >= set(names)), [])
