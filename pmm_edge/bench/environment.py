"""The machine that a bench runs on, and whether it was quiet enough for its timings to be meaningful."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
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
    """Other processes that want a core, averaged over 0.2 s; None if the system does not report it."""
    cores: float
    """Cores that this process may use."""
    throttle_events: int
    """Since boot, because of heat or current."""


def machine_state(root: Path = Path("/")) -> MachineState:
    """Read the state of the machine. Call it before a measurement, which would add to the load."""
    running = []
    with suppress(IndexError):  # not Linux
        for _ in range(_LOAD_SAMPLES):
            running.append(int(text_of(root / "proc/loadavg").split()[3].partition("/")[0]) - 1)  # without this thread
            time.sleep(_LOAD_SAMPLE_SECONDS)
    return MachineState(mean(running) if running else None, usable_cores(root), _throttle_events(root))


def noise_warnings(latencies: Sequence[Latency], before: MachineState, root: Path = Path("/")) -> list[BenchWarning]:
    """Return what makes the timings less reliable: load of other processes before, variation, throttling."""
    found, quiet = [], MAX_LOAD_PER_CORE * before.cores
    if before.load is not None and before.load > quiet:
        found.append(BenchWarning(WarningKind.BUSY, value=before.load, limit=quiet))
    if noisy := [latency.variation for latency in latencies if latency.variation > MAX_VARIATION]:
        found.append(BenchWarning(WarningKind.NOISY, "", max(noisy), MAX_VARIATION, len(noisy), len(latencies)))
    slowed_by = tuple(dict.fromkeys(reason for latency in latencies for reason in latency.slowed_by))
    events = _throttle_events(root) - before.throttle_events
    if events or slowed_by:
        found.append(BenchWarning(WarningKind.THROTTLED, count=events, slowed_by=slowed_by))
    return found


def _throttle_events(root: Path) -> int:
    counts = [text_of(file) for pattern in _THROTTLE_COUNTERS for file in root.glob(pattern)]
    return sum(int(count) for count in counts if count.isdecimal())


def environment(
    embedders: Sequence[Embedder],
    before: MachineState,
    latencies: Sequence[Latency] = (),
    root: Path = Path("/"),
) -> Environment:
    """Describe the machine, its settings, the versions of the software and the first GPU that a model runs on.

    Clocks are those during the timings, because the clocks of an idle machine mean nothing.
    """
    device = next((one.device for one in embedders if one.device.startswith("cuda")), "cpu")
    gpu, jetson = open_gpu(device), jetson_gpu(root) if device != "cpu" else None
    max_hertz = text_of(jetson / "max_freq") if jetson else ""
    versions = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return Environment(
        cpu=processor(root),
        instruction_set=instruction_set(root),
        board=text_of(root / "proc/device-tree/model") or None,
        cores=os.cpu_count() or 1,
        usable_cores=before.cores,
        threads={one.backend: one.threads for one in embedders if one.device == "cpu"},
        thread_settings={name: os.environ[name] for name in _THREAD_SETTINGS if name in os.environ},
        load=before.load,
        cpu_clocks=_merged(latency.cpu_clocks for latency in latencies),
        governors=tuple(sorted(governors(root))),
        clocks_locked=clocks_are_locked(root),
        l4t=text_of(root / "etc/nv_tegra_release").partition(", GCID")[0].lstrip("# ") or None,
        power_mode=_power_mode() if is_jetson(root) else None,
        gpu=gpu.name if gpu else None,
        driver=gpu.driver if gpu else None,
        gpu_clocks=_merged(latency.gpu_clocks for latency in latencies),
        gpu_max_mhz=gpu.max_mhz if gpu else int(max_hertz) // 10**6 if max_hertz.isdecimal() else None,
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
