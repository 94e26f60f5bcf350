"""Whether a machine was quiet enough for its timings to mean something."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean

from pmm_edge.bench.report import Clocks, Latency
from pmm_edge.bench.resources import Gpu, clock_range, jetson_gpu, open_gpu
from pmm_edge.machine import clocks_are_locked, cores, governors, is_jetson, processor, text_of, usable_cores
from pmm_edge.runtime import Embedder

MOST_VARIATION = 0.15
"""Coefficient of variation above which timings are noise."""
MOST_LOAD = 0.5
"""Of other work, for each core that is usable: more than that takes turns with what is measured."""


_SAMPLES, _SAMPLE_SECONDS = 10, 0.02


@dataclass(frozen=True)
class MachineState:
    """A machine before a measurement."""

    load: float | None
    """Processes of others that want a core now: the mean over a fifth of a second. Where the system does not tell, the
    load average of the last minute, in which what ran just before still counts."""
    cores: float
    throttled: int | None
    """How often it has slowed down by heat or current since it booted."""


def machine_state(root: Path = Path("/")) -> MachineState:
    """The state of this machine; taken before a measurement, lest the load is its own."""
    return MachineState(_load(root), usable_cores(root), _throttled(root))


def _load(root: Path) -> float | None:
    try:
        samples = []
        for _ in range(_SAMPLES):
            running = text_of(root / "proc/loadavg").split()[3].partition("/")[0]
            samples.append(int(running) - 1)  # without this thread, which is running as it reads
            time.sleep(_SAMPLE_SECONDS)
        return mean(samples)
    except (IndexError, ValueError):
        return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def machine_warnings(
    latencies: Sequence[Latency], before: MachineState | None = None, root: Path = Path("/")
) -> list[str]:
    """What makes timings less worth, each in a sentence that says what to do.

    Args:
        latencies: all that were measured.
        before: what `machine_state` gave before them; without it neither the load nor the CPU's throttling is judged.
        root: of the file system whose `proc` and `sys` are read.
    """
    found = [
        _load_warning(before) if before else None,
        _variation_warning(latencies, root),
        _throttling_warning(latencies, before, root),
    ]
    return [warning for warning in found if warning]


def _load_warning(before: MachineState) -> str | None:
    if before.load is None or before.load <= MOST_LOAD * before.cores:
        return None
    return (
        f"the machine was busy before the measurement: a load of {before.load:.1f} on {before.cores:g} cores;"
        " end other work (top shows it) and measure again"
    )


def _variation_warning(latencies: Sequence[Latency], root: Path) -> str | None:
    noisy = [found for found in latencies if found.variation > MOST_VARIATION]
    if not noisy:
        return None
    worst = max(noisy, key=lambda found: found.variation)
    return (
        f"{len(noisy)} of {len(latencies)} timings are noisy, the worst (batch {worst.batch}, {worst.scope}) varies by"
        f" {100 * worst.variation:.0f} % where a quiet machine stays below {100 * MOST_VARIATION:.0f} %;"
        f" {_how_to_quieten(root)} and measure again"
    )


def _how_to_quieten(root: Path) -> str:
    if is_jetson(root):
        locked = clocks_are_locked(root)
        return "end other work" if locked else "run sudo nvpmodel -m 0 and sudo jetson_clocks, end other work"
    if governors(root) - {"performance"}:
        return "set the clocks with sudo cpupower frequency-set -g performance, end other work"
    return "end other work, of neighbours as well where it is a virtual machine,"


def _throttling_warning(latencies: Sequence[Latency], before: MachineState | None, root: Path) -> str | None:
    reasons = []
    now = _throttled(root)
    if now is not None and before and before.throttled is not None and now > before.throttled:
        reasons.append(f"{now - before.throttled} times by heat or current")
    reasons += dict.fromkeys(f"the GPU by {reason}" for found in latencies for reason in found.slowed_by)
    if not reasons:
        return None
    return (
        f"the machine slowed itself down during the measurement ({', '.join(reasons)}); cool it, or lock lower clocks"
        " that it can hold, and measure again"
    )


def _throttled(root: Path) -> int | None:
    """Events counted by the kernel: of Intel's cores, and a Jetson's over-current."""
    patterns = (
        "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count",
        "sys/class/hwmon/*/oc*_event_cnt",
    )
    counts = []
    for pattern in patterns:
        for file in root.glob(pattern):
            try:
                counts.append(int(file.read_text()))
            except (OSError, ValueError):
                continue
    return sum(counts) if counts else None


_PACKAGES = ("pmm-edge", "numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "torch", "tensorrt")
_THREAD_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def environment(
    embedders: Sequence[Embedder] = (),
    before: MachineState | None = None,
    latencies: Sequence[Latency] = (),
    root: Path = Path("/"),
) -> dict[str, str]:
    """The machine, its settings and the versions; what it does not have or does not tell is left out.

    Args:
        embedders: what was measured: their threads are told, and the first GPU that one of them runs on.
        before: the machine before the measurement, whose load is told: afterwards it is the measurement's own.
        latencies: what was timed, whose clocks are told: afterwards they are those of a machine at rest.
        root: of the file system whose `proc` and `sys` are read.
    """
    device = next((one.device for one in embedders if one.device.startswith("cuda")), "cpu")
    gpu = open_gpu(device)
    found = {
        "processor": processor(root),
        "board": text_of(root / "proc/device-tree/model"),
        "cores": cores(root),
        "threads": _threads(embedders),
        "load": f"{before.load:.2f}" if before and before.load is not None else "",
        "cpu clocks": _cpu_clocks(root, _range([one.cpu_clocks for one in latencies])),
        "power mode": _power_mode(),
        "jetson": text_of(root / "etc/nv_tegra_release").partition(", GCID")[0].lstrip("# "),
        "gpu": _gpu(gpu),
        "gpu clocks": _gpu_clocks(root, gpu, _range([one.gpu_clocks for one in latencies])) if device != "cpu" else "",
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    return {name: value for name, value in found.items() if value} | _versions()


def _threads(embedders: Sequence[Embedder]) -> str:
    """What the user set, and what each engine has; one that decides by itself is left out where none is set."""
    told = [f"{name}={os.environ[name]}" for name in _THREAD_SETTINGS if name in os.environ]
    engines = {one.backend: one.threads for one in embedders}
    told += [f"{backend} {threads}" for backend, threads in engines.items() if threads]
    by_default = [backend for backend, threads in engines.items() if not threads and not backend.endswith("tensorrt")]
    return ", ".join([*told, *(f"{backend} by default" for backend in by_default)])


def _range(clocks: Sequence[Clocks | None]) -> str:
    """`1410 to 1755`, one number where it never moved, nothing where nobody told."""
    told = [clock for clock in clocks if clock]
    whole = clock_range([*(one.least_mhz for one in told), *(one.most_mhz for one in told)])
    if whole is None:
        return ""
    return str(whole.most_mhz) if whole.least_mhz == whole.most_mhz else f"{whole.least_mhz} to {whole.most_mhz}"


def _cpu_clocks(root: Path, timed: str) -> str:
    parts = [f"{timed} MHz"] if timed else []
    if found := governors(root):
        parts.append(f"governor {', '.join(sorted(found))}")
    if clocks_are_locked(root):
        parts.append("locked")
    return ", ".join(parts)


def _power_mode() -> str:
    """A Jetson's, as `nvpmodel -q` says it: `MAXN (0)`."""
    tool = shutil.which("nvpmodel")
    if not tool:
        return ""
    try:
        ended = subprocess.run([tool, "-q"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = [line.strip() for line in ended.stdout.splitlines() if line.strip()]
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("NV Power Mode")]
    number = lines[-1] if lines and lines[-1].isdecimal() else "?"
    return f"{names[0]} ({number})" if names else ""


def _gpu(gpu: Gpu | None) -> str:
    if gpu is None or gpu.name is None:
        return ""
    return f"{gpu.name}, driver {gpu.driver}" if gpu.driver else gpu.name


def _gpu_clocks(root: Path, gpu: Gpu | None, timed: str) -> str:
    most, locked = gpu.most_mhz if gpu else None, ""
    if not gpu and (board := jetson_gpu(root)):
        least, told = (text_of(board / name) for name in ("min_freq", "max_freq"))
        most = int(told) // 10**6 if told.isdecimal() else None
        locked = ", locked" if told and least == told else ""
    if most is None:
        return f"{timed} MHz" if timed else ""
    return f"{timed} of {most} MHz{locked}" if timed else f"at most {most} MHz{locked}"


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
