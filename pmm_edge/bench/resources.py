"""Clocks, GPU memory and energy: NVML for GPUs, the kernel's files for CPU clocks and for Jetson."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
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
"""NVML's reasons for a clock below the one that was set."""


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

    def joules_of(self, work: Callable[[], None]) -> float | None:
        """Run `work` and return the energy used meanwhile."""
        before = self.joules
        work()
        after = self.joules
        return None if before is None or after is None else after - before

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
    """Open the GPU that CUDA calls `cuda:N`; NVML numbers GPUs differently, so they are matched by PCI bus id.

    Args:
        device: `cpu`, `cuda`, `cuda:N`, or `tensorrt:N` (ONNX Runtime's provider).

    Returns:
        None for the CPU, without a driver, and for a GPU that NVML does not list.
    """
    kind, index = parse_device(device, tensorrt=True)
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
    failed = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), index)
        or cuda.cuDeviceGetPCIBusId(bus_id, len(bus_id), device)
    )
    return None if failed else bus_id.value


_CLOCK_SECONDS = 1e-3
"""Stop reading core clocks after this time: a clock that is read late belongs to an idle core."""
_JETSON_GPUS = ("gpu", "ga10b", "gv11b", "gp10b", "gm20b")
"""Endings such as in 17000000.gpu; they depend on JetPack version and module."""


@dataclass(frozen=True)
class ClockReading:
    """Clocks at one moment; None where the system does not report them."""

    cpu_mhz: int | None = None
    """Of the fastest core, because the others may be idle."""
    gpu_mhz: int | None = None
    slowed_by: tuple[Throttle, ...] = ()


def clock_reader(device: str, root: Path = Path("/")) -> Callable[[], ClockReading]:
    """Return a function that reads the clocks of the CPU, and of the GPU if `device` is one, in about 1 ms."""
    files = {int(file.parent.parent.name[3:]): file for file in root.glob(f"{CPUFREQ}/scaling_cur_freq")}
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(files)
    cores = [file for core, file in sorted(files.items()) if core in usable]
    gpu = open_gpu(device)
    jetson = jetson_gpu(root) if parse_device(device)[0] == "cuda" else None

    def read() -> ClockReading:
        gpu_mhz = gpu.clock_mhz if gpu else None  # first, because a GPU lowers its clock quickly
        slowed_by = gpu.slowed_by if gpu else ()
        if jetson and (hertz := text_of(jetson / "cur_freq")).isdecimal():
            gpu_mhz = int(hertz) // 10**6
        until, clocks = time.perf_counter() + _CLOCK_SECONDS, list[int]()
        for file in cores:
            if (kilohertz := text_of(file)).isdecimal():
                clocks.append(int(kilohertz) // 1000)
            if time.perf_counter() > until:
                break
        return ClockReading(max(clocks, default=None), gpu_mhz, slowed_by)

    return read


def clock_range(readings: Iterable[int | None]) -> Clocks | None:
    """Return the lowest and highest of the clocks that were reported; None if there are none."""
    reported = [reading for reading in readings if reading is not None]
    return Clocks(min(reported), max(reported)) if reported else None


def jetson_gpu(root: Path) -> Path | None:
    """Return the devfreq folder of a Jetson's GPU; None on other machines."""
    folders = sorted(root.glob("sys/class/devfreq/*"))
    return next((folder for folder in folders if folder.name.rpartition(".")[2] in _JETSON_GPUS), None)


ENERGY_SECONDS = 5.0
RAIL_SAMPLE_SECONDS = 0.02
"""Reading a power sensor takes about 1 ms on a Jetson."""
_INPUT_RAILS = ("VDD_IN", "5V_IN", "POM_5V_IN")
"""Power of the whole module; the other rails are parts of it."""
_ADDITIVE_RAILS = (
    frozenset({"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"}),  # AGX Orin; VDDQ_VDD2_1V8AO is fed by VIN_SYS_5V0
    frozenset({"GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"}),  # AGX Xavier
)


def measure_energy(
    embedder: Embedder, crops: Pixels, seconds: float = ENERGY_SECONDS, sys: Path = Path("/sys")
) -> Energy | None:
    """Run a model repeatedly on one batch and measure the energy that the device uses, idle power included.

    Args:
        embedder: the model.
        crops: the batch, (N, height, width, 3) uint8 RGB at network size, N >= 1.
        seconds: duration; energy counters of GPUs update only a few times per second.
        sys: folder of the kernel's devices, for tests.

    Returns:
        Energy from the GPU's counter (NVML) or a Jetson's power rails (INA3221); None if the machine has neither.
    """
    gpu, rails = open_gpu(embedder.device), power_rails(sys)
    use_counter = gpu is not None and gpu.joules is not None
    if not use_counter and not rails:
        return None
    embedder.embed_prepared(crops)
    elapsed, runs = 0.0, 0

    def work() -> None:
        nonlocal elapsed, runs
        start = time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds or not runs:
            embedder.embed_prepared(crops)
            runs += 1

    joules = gpu.joules_of(work) if gpu and use_counter else _rail_joules(rails, work)
    if joules is None:
        return None
    source: Literal["NVML", "INA3221"] = "NVML" if use_counter else "INA3221"
    return Energy(joules / (runs * len(crops)), joules / elapsed, source, len(crops), elapsed)


@dataclass(frozen=True)
class PowerRail:
    """One channel of an INA3221 power sensor."""

    label: str
    millivolts: Path
    milliamperes: Path

    @property
    def watts(self) -> float:
        return int(self.millivolts.read_text()) * int(self.milliamperes.read_text()) / 1e6


def power_rails(sys: Path = Path("/sys")) -> list[PowerRail]:
    """Find the rails that add up to the power of a Jetson module; empty on other machines and for unknown rails."""
    folders = {
        folder.resolve()
        for pattern in ("class/hwmon/hwmon*", "bus/i2c/drivers/ina3221/*/hwmon/hwmon*")  # some kernels list only one
        for folder in sys.glob(pattern)
        if text_of(folder / "name") == "ina3221"
    }
    rails: dict[str, PowerRail] = {}
    for label in (label for folder in sorted(folders) for label in sorted(folder.glob("in[1-3]_label"))):
        channel = label.name[2]
        rail = PowerRail(text_of(label), label.with_name(f"in{channel}_input"), label.with_name(f"curr{channel}_input"))
        with suppress(OSError, ValueError):  # a disabled channel has no value
            rail.watts  # noqa: B018
            rails[rail.label] = rail
    for name in _INPUT_RAILS:
        if name in rails:
            return [rails[name]]
    return next(([rails[name] for name in sorted(names)] for names in _ADDITIVE_RAILS if names <= rails.keys()), [])


def _rail_joules(rails: list[PowerRail], work: Callable[[], None]) -> float | None:
    """Sample the power in a thread during the work and integrate it; None if a reading fails."""
    samples: list[tuple[float, float]] = []
    stop, failed = threading.Event(), threading.Event()

    def sample() -> None:
        try:
            samples.append((time.perf_counter(), sum(rail.watts for rail in rails)))
        except (OSError, ValueError):
            failed.set()

    def watch() -> None:
        while not stop.wait(RAIL_SAMPLE_SECONDS) and not failed.is_set():
            sample()

    sample()
    watcher = threading.Thread(target=watch, name="power", daemon=True)
    watcher.start()
    try:
        work()
    finally:
        stop.set()
        watcher.join()
    sample()
    if failed.is_set():
        return None
    return sum((t1 - t0) * (first + second) / 2 for (t0, first), (t1, second) in pairwise(samples))
