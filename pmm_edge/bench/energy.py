"""Energy per embedding, from whatever meter the machine has."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, Protocol

from pmm_edge.bench.figures import Energy
from pmm_edge.bench.nvml import Gpu, open_gpu
from pmm_edge.machine import text_of
from pmm_edge.runtime.crops import Pixels
from pmm_edge.runtime.embedder import Embedder

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
