"""The machine that a bench runs on, and whether it was quiet enough for its timings to be meaningful."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean

from pmm_edge.bench.report import BenchWarning, Clocks, Environment, Latency, WarningKind
from pmm_edge.bench.resources import clock_range, jetson_gpu, open_gpu
from pmm_edge.machine import (
    clocks_are_locked,
    governors,
    instruction_set,
    is_jetson,
    processor,
    text_of,
    usable_cores,
)
from pmm_edge.runtime import Embedder

MAX_VARIATION = 0.15
"""Timings with a larger coefficient of variation are noisy."""
MAX_LOAD_PER_CORE = 0.5
"""A larger load of other processes disturbs the timings."""
_LOAD_SAMPLES, _LOAD_SAMPLE_SECONDS = 10, 0.02
_THROTTLE_COUNTERS = (
    "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count",  # Intel
    "sys/class/hwmon/*/oc*_event_cnt",  # over-current events of a Jetson
)
_PACKAGES = ("pmm-edge", "numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "torch", "tensorrt")
_THREAD_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class MachineState:
    """State of the machine before a measurement."""

    load: float | None
    """Other processes that want a core, averaged over 0.2 s; where Linux does not tell, the load average of the last
    minute; None if that is unknown too."""
    cores: float
    """Cores that this process may use."""
    throttle_events: int | None
    """Since boot, because of heat or current."""


def machine_state(root: Path = Path("/")) -> MachineState:
    """Read the state of the machine. Call it before a measurement, which would add to the load."""
    try:
        samples = []
        for _ in range(_LOAD_SAMPLES):
            running = text_of(root / "proc/loadavg").split()[3].partition("/")[0]
            samples.append(int(running) - 1)  # without this thread
            time.sleep(_LOAD_SAMPLE_SECONDS)
        load: float | None = mean(samples)
    except (IndexError, ValueError):
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return MachineState(load, usable_cores(root), _throttle_events(root))


def noise_warnings(
    latencies: Sequence[Latency], before: MachineState | None = None, root: Path = Path("/")
) -> list[BenchWarning]:
    """Return what makes the timings less reliable: load of other processes, variation, throttling.

    Args:
        latencies: everything that was timed.
        before: state of the machine before; without it, load and throttling of the CPU are not checked.
        root: file system root, for tests.
    """
    found = []
    if before and before.load is not None and before.load > MAX_LOAD_PER_CORE * before.cores:
        found.append(BenchWarning(WarningKind.BUSY, value=before.load, limit=MAX_LOAD_PER_CORE * before.cores))
    noisy = [latency.variation for latency in latencies if latency.variation > MAX_VARIATION]
    if noisy:
        found.append(BenchWarning(WarningKind.NOISY, "", max(noisy), MAX_VARIATION, len(noisy), len(latencies)))
    events = _throttle_events(root)
    slowed_by = tuple(dict.fromkeys(reason for latency in latencies for reason in latency.slowed_by))
    new = events - before.throttle_events if events and before and before.throttle_events is not None else 0
    if new > 0 or slowed_by:
        found.append(BenchWarning(WarningKind.THROTTLED, count=new, slowed_by=slowed_by))
    return found


def _throttle_events(root: Path) -> int | None:
    counts = [text_of(file) for pattern in _THROTTLE_COUNTERS for file in root.glob(pattern)]
    numbers = [int(count) for count in counts if count.isdecimal()]
    return sum(numbers) if numbers else None


def environment(
    embedders: Sequence[Embedder] = (),
    before: MachineState | None = None,
    latencies: Sequence[Latency] = (),
    root: Path = Path("/"),
) -> Environment:
    """Describe the machine, its settings and the versions of the software.

    Args:
        embedders: the models; their threads are recorded, and the first GPU that one of them runs on.
        before: state of the machine before the measurement, whose load is recorded.
        latencies: everything that was timed; its clocks are recorded, because those of an idle machine mean nothing.
        root: file system root, for tests.
    """
    device = next((one.device for one in embedders if one.device.startswith("cuda")), "cpu")
    gpu, jetson = open_gpu(device), jetson_gpu(root) if device != "cpu" else None
    release = text_of(root / "etc/nv_tegra_release").partition(", GCID")[0].lstrip("# ")
    max_hertz = text_of(jetson / "max_freq") if jetson else ""
    return Environment(
        cpu=processor(root),
        instruction_set=instruction_set(root),
        board=text_of(root / "proc/device-tree/model") or None,
        cores=os.cpu_count() or 1,
        usable_cores=usable_cores(root),
        threads={one.backend: one.threads for one in embedders if one.device == "cpu"},
        thread_settings={name: os.environ[name] for name in _THREAD_SETTINGS if name in os.environ},
        load=before.load if before else None,
        cpu_clocks=_merged(latency.cpu_clocks for latency in latencies),
        governors=tuple(sorted(governors(root))),
        clocks_locked=clocks_are_locked(root),
        l4t=(release or "unknown release") if is_jetson(root) else None,
        power_mode=_power_mode(),
        gpu=gpu.name if gpu else None,
        driver=gpu.driver if gpu else None,
        gpu_clocks=_merged(latency.gpu_clocks for latency in latencies),
        gpu_max_mhz=gpu.max_mhz if gpu else int(max_hertz) // 10**6 if max_hertz.isdecimal() else None,
        os=platform.platform(),
        python=platform.python_version(),
        versions=_versions(),
    )


def _merged(clocks: Iterable[Clocks | None]) -> Clocks | None:
    known = [clock for clock in clocks if clock]
    return clock_range([mhz for clock in known for mhz in (clock.min_mhz, clock.max_mhz)])


def _power_mode() -> str | None:
    """Return the power mode of a Jetson as `nvpmodel -q` prints it, such as `MAXN (0)`."""
    tool = shutil.which("nvpmodel")
    if not tool:
        return None
    try:
        ended = subprocess.run([tool, "-q"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line.strip() for line in ended.stdout.splitlines() if line.strip()]
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("NV Power Mode")]
    number = lines[-1] if lines and lines[-1].isdecimal() else "?"
    return f"{names[0]} ({number})" if names else None


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
