"""What a measurement was taken on: the machine, how it was set, and the versions of what computes on it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pmm_edge.bench.clocks import clock_range, jetson_gpu
from pmm_edge.bench.figures import Clocks, Latency
from pmm_edge.bench.nvml import Gpu, open_gpu
from pmm_edge.bench.quiet import MachineState
from pmm_edge.machine import clocks_are_locked, cores, governors, processor, text_of
from pmm_edge.runtime import Embedder

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
