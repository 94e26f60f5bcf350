"""The machine that a bench runs on, by NVML and the kernel's files under `root`: noise, settings, clocks, energy."""

import ctypes
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean
from threading import Event
from typing import Any, Literal, NamedTuple

import pynvml

from pmm_edge import machine
from pmm_edge.bench.report import BenchWarning, Clocks, Energy, Environment, Latency, WarningKind
from pmm_edge.images import Pixels
from pmm_edge.machine import text_of
from pmm_edge.runtime.embedder import Embedder, parse_device

ROOT = Path("/")
ClockReading = tuple[int | None, int | None]
"""MHz of the fastest CPU core and of the GPU at one moment; None where the system does not report them."""
MAX_VARIATION = 0.15  # timings with a larger coefficient of variation are noisy
MAX_LOAD_PER_CORE = 0.5  # a larger load of other processes disturbs the timings
_LOAD_SAMPLES, _LOAD_SAMPLE_SECONDS = 10, 0.02
_THROTTLE_COUNTERS = (
    "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count",  # Intel
    "sys/class/hwmon/*/oc*_event_cnt",  # over-current events of a Jetson
)
_PACKAGES = ("pmm-edge", "numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "torch", "tensorrt")
_THREAD_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class MachineState(NamedTuple):
    """Load of other processes, cores that this process may use, and throttling events since boot."""

    load: float | None
    cores: float
    throttle_events: int


def machine_state(root: Path = ROOT) -> MachineState:
    """Read the state of the machine; the load is averaged over 0.2 s, None if the system does not report it."""
    running = []
    with suppress(IndexError):  # not Linux
        for _ in range(_LOAD_SAMPLES):
            running.append(int(text_of(root / "proc/loadavg").split()[3].partition("/")[0]) - 1)  # without this thread
            time.sleep(_LOAD_SAMPLE_SECONDS)
    return MachineState(mean(running) if running else None, machine.usable_cores(root), _throttle_events(root))


def _throttle_events(root: Path) -> int:
    counts = [text_of(file) for pattern in _THROTTLE_COUNTERS for file in root.glob(pattern)]
    return sum(int(count) for count in counts if count.isdecimal())


def noise_warnings(latencies: Sequence[Latency], before: MachineState, root: Path = ROOT) -> list[BenchWarning]:
    """Return what makes the timings less reliable: load of other processes before, variation, throttling."""
    found, quiet = [], MAX_LOAD_PER_CORE * before.cores
    if before.load is not None and before.load > quiet:
        found.append(BenchWarning(WarningKind.BUSY, value=before.load, limit=quiet))
    if noisy := [latency.variation for latency in latencies if latency.variation > MAX_VARIATION]:
        found.append(BenchWarning(WarningKind.NOISY, "", max(noisy), MAX_VARIATION, len(noisy), len(latencies)))
    if (events := _throttle_events(root) - before.throttle_events) > 0:  # a core that was switched off has no counter
        found.append(BenchWarning(WarningKind.THROTTLED, count=events))
    return found


def environment(
    embedders: Sequence[Embedder], before: MachineState, latencies: Sequence[Latency] = (), root: Path = ROOT
) -> Environment:
    """Describe the machine, its clocks during the timings, the software, and the first GPU that a model runs on."""
    device = next((one.device for one in embedders if one.device.startswith("cuda")), "cpu")
    gpu, jetson = open_gpu(device), jetson_gpu(root) if device != "cpu" else None
    max_mhz = gpu.max_mhz if gpu else None
    if jetson and (hertz := text_of(jetson / "max_freq")).isdecimal():
        max_mhz = int(hertz) // 10**6
    versions = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return Environment(
        cpu=machine.processor(root),
        instruction_set=machine.instruction_set(root),
        board=text_of(root / "proc/device-tree/model") or None,
        cores=os.cpu_count() or 1,
        usable_cores=before.cores,
        threads={one.backend: one.threads for one in embedders if one.device == "cpu"},
        thread_settings={name: os.environ[name] for name in _THREAD_SETTINGS if name in os.environ},
        load=before.load,
        cpu_clocks=_merged(latency.cpu_clocks for latency in latencies),
        governors=tuple(sorted(machine.governors(root))),
        clocks_locked=machine.clocks_are_locked(root),
        l4t=text_of(root / "etc/nv_tegra_release").partition(", GCID")[0].lstrip("# ") or None,
        power_mode=_power_mode() if machine.is_jetson(root) else None,
        gpu=gpu.name if gpu else None,
        driver=gpu.driver if gpu else None,
        gpu_clocks=_merged(latency.gpu_clocks for latency in latencies),
        gpu_max_mhz=max_mhz,
        os=platform.platform(),
        python=platform.python_version(),
        versions=versions,
    )


def _merged(clocks: Iterable[Clocks | None]) -> Clocks | None:
    return clock_range(mhz for clock in clocks if clock for mhz in (clock.min_mhz, clock.max_mhz))


def _power_mode() -> str | None:
    """Return the power mode of a Jetson, such as `MAXN (0)`. `nvpmodel -q` prints the name, then the number."""
    with suppress(OSError, subprocess.TimeoutExpired, ValueError):
        ended = subprocess.run(["nvpmodel", "-q"], capture_output=True, text=True, timeout=10, check=False)
        name, number = ended.stdout.partition("NV Power Mode:")[2].split()
        return f"{name} ({number})"
    return None


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
    def clock_mhz(self) -> int | None:
        return self._query(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM)

    def _query(self, function: Callable[..., Any], *arguments: object) -> Any:
        try:
            return function(self._handle, *arguments)
        except pynvml.NVMLError:
            return None


def open_gpu(device: str) -> Gpu | None:
    """Open the GPU that CUDA calls `cuda:N`; NVML numbers GPUs differently. None for `cpu` and without NVML."""
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


def clock_reader(device: str, root: Path = ROOT) -> Callable[[], ClockReading]:
    """Return a function that reads the clocks of the CPU, and of the GPU if `device` is one."""
    cores, gpu = list(root.glob(f"{machine.CPUFREQ}/scaling_cur_freq")), open_gpu(device)
    jetson = jetson_gpu(root) if parse_device(device)[0] == "cuda" else None

    def read() -> ClockReading:
        gpu_mhz = gpu.clock_mhz if gpu else None  # first, because a GPU lowers its clock quickly
        if jetson and (hertz := text_of(jetson / "cur_freq")).isdecimal():
            gpu_mhz = int(hertz) // 10**6
        kilohertz = [int(text) for text in map(text_of, cores) if text.isdecimal()]
        return max(kilohertz) // 1000 if kilohertz else None, gpu_mhz

    return read


def clock_range(readings: Iterable[int | None]) -> Clocks | None:
    """Return the lowest and highest of the clocks that were reported; None if there are none."""
    reported = [reading for reading in readings if reading is not None]
    return Clocks(min(reported), max(reported)) if reported else None


def jetson_gpu(root: Path) -> Path | None:
    """Return the devfreq folder of a Jetson's GPU; None on other machines."""
    folders = sorted(root.glob("sys/class/devfreq/*"))
    return next((folder for folder in folders if folder.name.endswith((".gpu", ".ga10b"))), None)


RAIL_SAMPLE_SECONDS = 0.02  # reading a power sensor takes about 1 ms on a Jetson
_RAILS = (
    ("VDD_IN",),  # the whole module; the other rails are parts of it
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin; VDDQ_VDD2_1V8AO is fed by VIN_SYS_5V0
)


def power_rails(root: Path = ROOT) -> list[tuple[Path, Path]]:
    """Find the files of millivolts and milliamperes (INA3221) that add up to the power of a Jetson, if it is one."""
    rails = {}
    for folder in ("class/hwmon/hwmon*", "bus/i2c/drivers/ina3221/*/hwmon/hwmon*"):  # some kernels list only one
        for label in root.glob(f"sys/{folder}/in[1-3]_label"):
            files = label.with_name(f"in{label.name[2]}_input"), label.with_name(f"curr{label.name[2]}_input")
            if all(map(text_of, files)) and text_of(label.with_name("name")) == "ina3221":  # enabled
                rails[text_of(label)] = files
    return next(([rails[name] for name in names] for names in _RAILS if rails.keys() >= set(names)), [])


def measure_energy(embedder: Embedder, crops: Pixels, seconds: float = 5.0, root: Path = ROOT) -> Energy | None:
    """Measure the energy of the device, idle power included, while a model runs on `crops`, as in `embed_prepared`.

    Energy counters of GPUs update only a few times per second. Returns None if the machine has neither a GPU with such
    a counter (NVML) nor the power rails of a Jetson (INA3221), or if they could not be read.
    """
    gpu, rails = open_gpu(embedder.device), power_rails(root)
    if gpu and gpu.joules is None:
        gpu = None
    if not gpu and not rails:
        return None
    watts, stop = list[float](), Event()

    def sample() -> None:
        ended = False
        while not ended:
            with suppress(ValueError):  # a sensor that is busy has no value
                watts.append(sum(int(text_of(volts)) * int(text_of(amperes)) / 1e6 for volts, amperes in rails))
            ended = stop.wait(RAIL_SAMPLE_SECONDS)

    embedder.embed_prepared(crops)
    with ThreadPoolExecutor(1) as pool:
        before, sampled = (gpu.joules, None) if gpu else (None, pool.submit(sample))
        start, runs, elapsed = time.perf_counter(), 0, 0.0
        try:
            while elapsed < seconds:
                embedder.embed_prepared(crops)
                runs, elapsed = runs + 1, time.perf_counter() - start
        finally:
            stop.set()
        after = gpu.joules if gpu else None
        if sampled:
            sampled.result()
    if before is not None and after is not None:
        joules = after - before
    elif watts:
        joules = mean(watts) * elapsed
    else:
        return None
    source: Literal["NVML", "INA3221"] = "NVML" if gpu else "INA3221"
    return Energy(joules / (runs * len(crops)), joules / elapsed, source, len(crops), elapsed)
