"""The few questions to NVIDIA's management library (NVML), which comes with the driver; no package is needed.

Signatures are those of the C headers; a test holds them against the ones that cuda-bindings was compiled with.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from ctypes import POINTER, c_char_p, c_int, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from pmm_edge.bench.report import Clocks, Compute, Energy, Latency
from pmm_edge.errors import ModelError
from pmm_edge.images import Pixels
from pmm_edge.machine import CPUFREQ, text_of
from pmm_edge.runtime.embedder import Embedder, parse_device
from pmm_edge.spec import ModelSpec

_TEXT = 96
"""Bytes of a name; NVML and CUDA want no more."""
CLOCK_SM = 1
SLOWED_BY = {
    0x4: "its power limit",
    0x8: "a hardware slowdown",
    0x20: "its temperature",
    0x40: "its temperature",
    0x80: "an external power brake",
}
"""Bits of nvmlDeviceGetCurrentClocksEventReasons that mean less speed than the clocks were set to."""


class Memory(ctypes.Structure):
    """nvmlMemory_v2_t."""

    _fields_ = (
        ("version", c_uint),
        ("total", c_ulonglong),
        ("reserved", c_ulonglong),
        ("free", c_ulonglong),
        ("used", c_ulonglong),
    )
    VERSION = 40 | 2 << 24  # its size, and 2


NVML = {
    "nvmlInit_v2": (),
    "nvmlSystemGetDriverVersion": (c_char_p, c_uint),
    "nvmlDeviceGetHandleByPciBusId_v2": (c_char_p, POINTER(c_void_p)),
    "nvmlDeviceGetName": (c_void_p, c_char_p, c_uint),
    "nvmlDeviceGetTotalEnergyConsumption": (c_void_p, POINTER(c_ulonglong)),
    "nvmlDeviceGetMemoryInfo_v2": (c_void_p, POINTER(Memory)),
    "nvmlDeviceGetClockInfo": (c_void_p, c_int, POINTER(c_uint)),
    "nvmlDeviceGetMaxClockInfo": (c_void_p, c_int, POINTER(c_uint)),
    "nvmlDeviceGetCurrentClocksEventReasons": (c_void_p, POINTER(c_ulonglong)),
}
CUDA = {
    "cuInit": (c_uint,),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetPCIBusId": (c_char_p, c_int, c_int),
}


class Gpu:
    """One GPU, as NVML sees it. What the GPU or its driver does not tell is None."""

    def __init__(self, library: ctypes.CDLL, handle: c_void_p) -> None:
        self._library, self._handle = library, handle

    @property
    def name(self) -> str | None:
        text = ctypes.create_string_buffer(_TEXT)
        return text.value.decode(errors="replace") if self._ask("nvmlDeviceGetName", text, _TEXT) else None

    @property
    def driver(self) -> str | None:
        text = ctypes.create_string_buffer(_TEXT)
        told = _call(self._library, NVML, "nvmlSystemGetDriverVersion", text, _TEXT)
        return text.value.decode(errors="replace") if told else None

    @property
    def joules(self) -> float | None:
        """Energy since the driver was loaded; of Volta and later."""
        millijoules = c_ulonglong()
        told = self._ask("nvmlDeviceGetTotalEnergyConsumption", ctypes.byref(millijoules))
        return millijoules.value / 1000 if told else None

    @property
    def used_mib(self) -> float | None:
        """Memory that all processes together hold."""
        memory = Memory(version=Memory.VERSION)
        return memory.used / 2**20 if self._ask("nvmlDeviceGetMemoryInfo_v2", ctypes.byref(memory)) else None

    @property
    def clock_mhz(self) -> int | None:
        """Of the multiprocessors, at this moment."""
        clock = c_uint()
        return clock.value if self._ask("nvmlDeviceGetClockInfo", CLOCK_SM, ctypes.byref(clock)) else None

    @property
    def most_mhz(self) -> int | None:
        """The highest clock that the multiprocessors can have."""
        clock = c_uint()
        return clock.value if self._ask("nvmlDeviceGetMaxClockInfo", CLOCK_SM, ctypes.byref(clock)) else None

    @property
    def slowed_by(self) -> list[str]:
        """What keeps the clocks down at this moment; empty where nothing does, or the driver does not tell."""
        reasons = c_ulonglong()
        if not self._ask("nvmlDeviceGetCurrentClocksEventReasons", ctypes.byref(reasons)):
            return []
        return list(dict.fromkeys(text for bit, text in SLOWED_BY.items() if reasons.value & bit))

    def _ask(self, name: str, *arguments: object) -> bool:
        return _call(self._library, NVML, name, self._handle, *arguments)


def open_gpu(device: str, nvml: str = "libnvidia-ml.so.1", cuda: str = "libcuda.so.1") -> Gpu | None:
    """The GPU that CUDA calls `cuda:N`: NVML counts in another order, and knows nothing of CUDA_VISIBLE_DEVICES.

    Args:
        device: `cpu`, `cuda` or `cuda:N`; `tensorrt:N`, ONNX Runtime's provider, is on the GPU of the same number.
        nvml, cuda: the libraries.

    Returns:
        None for the CPU, without a driver, and for a GPU that NVML does not know.
    """
    kind, index = parse_device(device, tensorrt=True)
    if kind == "cpu":
        return None
    try:
        library, driver = ctypes.CDLL(nvml), ctypes.CDLL(cuda)
    except OSError:
        return None
    number, bus, handle = c_int(), ctypes.create_string_buffer(_TEXT), c_void_p()
    found = (
        _call(driver, CUDA, "cuInit", 0)
        and _call(driver, CUDA, "cuDeviceGet", ctypes.byref(number), index)
        and _call(driver, CUDA, "cuDeviceGetPCIBusId", bus, _TEXT, number)
        and _call(library, NVML, "nvmlInit_v2")
        and _call(library, NVML, "nvmlDeviceGetHandleByPciBusId_v2", bus, ctypes.byref(handle))
    )
    return Gpu(library, handle) if found else None


def _call(library: ctypes.CDLL, signatures: dict[str, tuple[type, ...]], name: str, *arguments: object) -> bool:
    """Whether a function is there and says that it succeeded."""
    try:
        function = library[name]
    except AttributeError:
        return False
    function.argtypes, function.restype = signatures[name], c_int
    return function(*arguments) == 0


_SECONDS = 1e-3
"""For all cores, at least one: some kernels take their time, and what is read late is of a core at rest."""
_JETSON_GPUS = ("gpu", "ga10b", "gv11b", "gp10b", "gm20b")
"""17000000.gpu, .ga10b or .gv11b by JetPack and module."""


@dataclass(frozen=True)
class Reading:
    """A device at one moment; None where the system does not tell."""

    cpu_mhz: int | None = None
    """Of the fastest core: the others may have had nothing to do."""
    gpu_mhz: int | None = None
    slowed_by: tuple[str, ...] = ()


def clock_reader(device: str, root: Path = Path("/")) -> Callable[[], Reading]:
    """What reads the clocks of the CPU, and of the GPU where the device is one, in about a millisecond.

    Args:
        device: `cpu`, `cuda` or `cuda:N`.
        root: of the file system whose `sys` is read.
    """
    cores = _core_clocks(root)
    gpu = open_gpu(device)
    board = jetson_gpu(root) if parse_device(device)[0] == "cuda" else None

    def read() -> Reading:
        on_gpu = gpu.clock_mhz if gpu else None  # first of all, for a GPU comes to rest in no time
        slowed_by = tuple(gpu.slowed_by) if gpu else ()
        if board and (told := text_of(board / "cur_freq")).isdecimal():
            on_gpu = int(told) // 10**6
        return Reading(_fastest(cores), on_gpu, slowed_by)

    return read


def clock_range(readings: Iterable[int | None]) -> Clocks | None:
    """The least and the largest of those that were told; None for none."""
    told = [reading for reading in readings if reading is not None]
    return Clocks(min(told), max(told)) if told else None


def jetson_gpu(root: Path) -> Path | None:
    """The folder of a Jetson's GPU, in which the kernel tells its clocks; None on other machines."""
    folders = sorted(root.glob("sys/class/devfreq/*"))
    return next((folder for folder in folders if folder.name.rpartition(".")[2] in _JETSON_GPUS), None)


def _core_clocks(root: Path) -> list[Path]:
    """Of the cores that this process may use."""
    files = {int(file.parent.parent.name[3:]): file for file in root.glob(f"{CPUFREQ}/scaling_cur_freq")}
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(files)
    return [file for core, file in sorted(files.items()) if core in usable]


def _fastest(cores: list[Path]) -> int | None:
    until, clocks = time.perf_counter() + _SECONDS, list[int]()
    for file in cores:
        if (told := text_of(file)).isdecimal():
            clocks.append(int(told) // 1000)
        if time.perf_counter() > until:
            break
    return max(clocks, default=None)


SECONDS = 5.0
SAMPLE_SECONDS = 0.02
"""Between readings of a power sensor; one takes about a millisecond on a Jetson."""
SYS = Path("/sys")

_INPUT_RAILS = ("VDD_IN", "5V_IN", "POM_5V_IN")
"""What the whole module draws; the other rails are parts of it."""
_RAILS_THAT_ADD_UP = (
    frozenset({"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"}),  # AGX Orin; its VDDQ_VDD2_1V8AO is fed by the last
    frozenset({"GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"}),  # AGX Xavier
)


class Meter(Protocol):
    """Something that measures energy."""

    @property
    def source(self) -> Literal["NVML", "INA3221", "RAPL"]: ...

    def joules(self, work: Callable[[], None]) -> float | None:
        """What was taken while `work` ran; None where a reading failed."""


def measure_energy(embedder: Embedder, crops: Pixels, seconds: float = SECONDS, sys: Path = SYS) -> Energy | None:
    """Run a model on one batch again and again, and read what the device takes meanwhile.

    Idle power is not subtracted: it is what an embedding costs on a device that does nothing else.

    Args:
        crops: (N, height, width, 3) uint8 RGB of network size, N >= 1: the batch.
        seconds: to run; counters of GPUs move only a few times a second.

    Returns:
        None where the machine has no meter, or does not let this user read it.
    """
    meter = find_meter(embedder.device, sys)
    if meter is None:
        return None
    embedder.embed_prepared(crops)
    taken, runs = 0.0, 0

    def work() -> None:
        nonlocal taken, runs
        start = time.perf_counter()
        while (taken := time.perf_counter() - start) < seconds or not runs:
            embedder.embed_prepared(crops)
            runs += 1

    joules = meter.joules(work)
    if joules is None:
        return None
    return Energy(joules / (runs * len(crops)), joules / taken, meter.source, len(crops), taken)


def find_meter(device: str, sys: Path = SYS) -> Meter | None:
    """The meter that covers a device: a GPU's own, else a Jetson's module, which has CPU and GPU; else the CPU's.

    Args:
        device: `cpu` or `cuda:N`.
        sys: where the kernel shows its devices.
    """
    gpu = open_gpu(device)
    if gpu and gpu.joules is not None:
        return NvmlMeter(gpu)
    rails = power_rails(sys)
    if rails:
        return RailMeter(rails)
    packages = rapl_packages(sys)
    return RaplMeter(packages) if packages and device == "cpu" else None


@dataclass(frozen=True)
class NvmlMeter:
    """The energy counter of a GPU's board, memory included."""

    gpu: Gpu
    source: Literal["NVML"] = "NVML"

    def joules(self, work: Callable[[], None]) -> float | None:
        before = self.gpu.joules
        work()
        after = self.gpu.joules
        return None if before is None or after is None else after - before


@dataclass(frozen=True)
class Rail:
    """One channel of an INA3221."""

    label: str
    millivolts: Path
    milliamperes: Path

    @property
    def watts(self) -> float:
        return int(self.millivolts.read_text()) * int(self.milliamperes.read_text()) / 1e6


def power_rails(sys: Path = SYS) -> list[Rail]:
    """The rails of a Jetson that add up to what its module draws; empty on other machines, and where it is not known.

    JetPack 5 and 6 show its INA3221 sensors as hwmon devices, by the driver and, on most kernels, by class.
    """
    folders = {
        folder.resolve()
        for pattern in ("class/hwmon/hwmon*", "bus/i2c/drivers/ina3221/*/hwmon/hwmon*")
        for folder in sys.glob(pattern)
        if text_of(folder / "name") == "ina3221"
    }
    rails: dict[str, Rail] = {}
    for folder in sorted(folders):
        for named in sorted(folder.glob("in[1-3]_label")):
            channel = named.name[2]
            rail = Rail(text_of(named), folder / f"in{channel}_input", folder / f"curr{channel}_input")
            try:
                rail.watts  # noqa: B018  a channel that is switched off has no value
            except (OSError, ValueError):
                continue
            rails[rail.label] = rail
    for label in _INPUT_RAILS:
        if label in rails:
            return [rails[label]]
    return next(([rails[label] for label in sorted(few)] for few in _RAILS_THAT_ADD_UP if few <= rails.keys()), [])


@dataclass(frozen=True)
class RailMeter:
    """Power of a Jetson's module, sampled beside the work and integrated."""

    rails: list[Rail]
    source: Literal["INA3221"] = "INA3221"

    def joules(self, work: Callable[[], None]) -> float | None:
        samples: list[tuple[float, float]] = []
        stop, broken = threading.Event(), threading.Event()

        def sample() -> None:
            try:
                samples.append((time.perf_counter(), sum(rail.watts for rail in self.rails)))
            except (OSError, ValueError):
                broken.set()

        def watch() -> None:
            while not stop.wait(SAMPLE_SECONDS) and not broken.is_set():
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
        if broken.is_set():
            return None
        pairs = pairwise(samples)
        return sum((after - before) * (first + second) / 2 for (before, first), (after, second) in pairs)


def rapl_packages(sys: Path = SYS) -> list[Path]:
    """The energy counters of the processor's packages; empty where there are none or this user may not read them."""
    # Domains within a package (cores, graphics) are parts of it, and psys is more than the processor.
    found = sorted(
        domain
        for domain in sys.glob("class/powercap/intel-rapl:*")
        if domain.name.count(":") == 1 and text_of(domain / "name").startswith("package")
    )
    return found if all(_microjoules(domain) is not None for domain in found) else []


@dataclass(frozen=True)
class RaplMeter:
    """The energy counters of a processor's packages (Intel's and AMD's)."""

    packages: list[Path]
    source: Literal["RAPL"] = "RAPL"

    def joules(self, work: Callable[[], None]) -> float | None:
        before = [_microjoules(domain) for domain in self.packages]
        work()
        total = 0
        for domain, start in zip(self.packages, before, strict=True):
            end, most = _microjoules(domain), _microjoules(domain, "max_energy_range_uj")
            if start is None or end is None or (end < start and most is None):
                return None
            # It wraps after some minutes at full power: once at most in a measurement.
            total += end - start + (most if end < start and most is not None else 0)
        return total / 1e6


def _microjoules(domain: Path, name: str = "energy_uj") -> int | None:
    try:
        return int((domain / name).read_text())
    except (OSError, ValueError):
        return None


_BASIC, _BOTTLENECK = 1, 4
RESNETS = {
    "resnet18": (_BASIC, (2, 2, 2, 2)),
    "resnet34": (_BASIC, (3, 4, 6, 3)),
    "resnet50": (_BOTTLENECK, (3, 4, 6, 3)),
    "resnet101": (_BOTTLENECK, (3, 4, 23, 3)),
}
"""Expansion of a block, and the blocks of each stage (He et al. 2016, table 1)."""
_STRIDES = (1, 2, 2, 1)
"""Of the stages; the last keeps its resolution (paper section 2.1)."""
_EXTRA_BOTTLENECK = ("pmm", "bdb")
PEAK_SECONDS = 0.3
_LEAST_PRODUCT_SECONDS = 0.02


@dataclass(frozen=True)
class Product:
    """A convolution or a linear layer, its batch normalisation folded in."""

    inputs: int
    outputs: int
    kernel: int = 1
    positions: int = 1
    """Of the map that it gives."""

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return self.inputs * self.outputs * self.kernel**2 + self.outputs

    @property
    def operations(self) -> int:
        """A multiplication and an addition for each weight at each position; biases are left out, as is usual."""
        return 2 * self.inputs * self.outputs * self.kernel**2 * self.positions


def products(spec: ModelSpec) -> Iterator[Product]:
    """All convolutions and linear layers of the deployed network, in their order; whatever else it does is below 1 %.

    Raises:
        ModelError: the spec names a backbone that is none of this project's.
    """
    if spec.backbone not in RESNETS:
        raise ModelError(
            f"the operations of a backbone '{spec.backbone}' are not known", f"Known are {', '.join(RESNETS)}"
        )
    expansion, stages = RESNETS[spec.backbone]
    size = _half(spec.input.height), _half(spec.input.width)
    yield Product(3, 64, 7, prod(size))
    size = _half(size[0]), _half(size[1])  # the max pooling
    channels = 64
    for stage, (blocks, stage_stride) in enumerate(zip(stages, _STRIDES, strict=True)):
        for block in range(blocks):
            stride = stage_stride if block == 0 else 1
            yield from _block(channels, 64 * 2**stage, expansion, size, stride)
            size = (_half(size[0]), _half(size[1])) if stride == 2 else size
            channels = 64 * 2**stage * expansion
    if spec.architecture in _EXTRA_BOTTLENECK:
        yield from _block(channels, channels // _BOTTLENECK, _BOTTLENECK, size, 1)
    yield Product(channels, spec.embedding_size)  # the heads side by side


def compute_of(spec: ModelSpec, latencies: Sequence[Latency], device: str) -> Compute:
    """A network's operations and parameters, and the share of the measured peak that an engine reaches with them.

    Args:
        latencies: of this model; those of scope `model` count.
        device: that they were measured on: `cpu` or `cuda:N`.

    Raises:
        ModelError: the spec names a backbone that is none of this project's.
    """
    layers = list(products(spec))
    gflops = sum(layer.operations for layer in layers) / 1e9
    speeds = [found.images_per_second for found in latencies if found.scope == "model"]
    peak = measured_peak(device)
    return Compute(
        gflops=gflops,
        parameters=sum(layer.parameters for layer in layers),
        peak_gflops_per_second=peak,
        share_of_peak=gflops * max(speeds) / peak if peak and speeds else None,
    )


@cache
def measured_peak(device: str) -> float | None:
    """GFLOP/s of a large FP32 matrix product: numpy's on the CPU, on a GPU that of a PyTorch that is loaded.

    Returns:
        The fastest of several, measured at the first call for this device; None for a GPU without PyTorch.
    """
    kind, index = parse_device(device)
    if kind == "cpu":
        return _fastest_product(_NumpyProduct)
    # Loading PyTorch takes seconds, and libraries of CUDA's that may not be those the engine runs on.
    if "torch" not in sys.modules:
        return None
    import torch

    from pmm_edge.runtime.torch_backend import without_tf32

    if index >= torch.cuda.device_count():
        return None

    class TorchProduct:
        def __init__(self, side: int) -> None:
            self.left, self.right = torch.rand(2, side, side, device=f"cuda:{index}")

        def run(self) -> None:
            torch.matmul(self.left, self.right)
            torch.cuda.synchronize(index)

    with without_tf32():
        return _fastest_product(TorchProduct)


class _NumpyProduct:
    def __init__(self, side: int) -> None:
        self.left, self.right = np.random.default_rng(0).random((2, side, side), np.float32)
        self.out = np.empty((side, side), np.float32)

    def run(self) -> None:
        np.matmul(self.left, self.right, out=self.out)


def _fastest_product(make: type) -> float:
    """Matrices as large as it takes for a product to last, for only then all cores are busy nearly all of the time."""
    side = 512
    while True:
        product = make(side)
        product.run()
        if (seconds := _seconds(product)) >= _LEAST_PRODUCT_SECONDS or side >= 16384:
            break
        side *= 2
    until = time.perf_counter() + PEAK_SECONDS
    while time.perf_counter() < until:
        seconds = min(seconds, _seconds(product))
    return 2 * side**3 / seconds / 1e9


def _seconds(product: _NumpyProduct) -> float:
    start = time.perf_counter()
    product.run()
    return time.perf_counter() - start


def _block(channels: int, width: int, expansion: int, size: tuple[int, int], stride: int) -> Iterator[Product]:
    """A residual block of torchvision's: the bottleneck has its stride in the 3×3 convolution."""
    before = prod(size)
    behind = _half(size[0]) * _half(size[1]) if stride == 2 else before
    outputs = width * expansion
    if expansion == _BASIC:
        yield Product(channels, width, 3, behind)
        yield Product(width, outputs, 3, behind)
    else:
        yield Product(channels, width, 1, before)
        yield Product(width, width, 3, behind)
        yield Product(width, outputs, 1, behind)
    if stride != 1 or channels != outputs:
        yield Product(channels, outputs, 1, behind)


def _half(side: int) -> int:
    """What a padded kernel with stride 2 leaves."""
    return -(-side // 2)
