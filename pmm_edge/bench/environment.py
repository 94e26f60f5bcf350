"""What a measurement was taken on: the machine, how it was set, and the versions of what computes on it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pmm_edge.bench.nvml import Gpu, open_gpu
from pmm_edge.bench.quiet import MachineState
from pmm_edge.machine import CPUFREQ, clocks_are_locked, cores, governors, processor, text_of

_PACKAGES = ("pmm-edge", "numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "torch", "tensorrt")
_THREAD_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def environment(root: Path = Path("/"), device: str = "cuda", before: MachineState | None = None) -> dict[str, str]:
    """The machine, its settings and the versions; what it does not have or does not tell is left out.

    Args:
        root: of the file system whose `proc` and `sys` are read.
        device: whose GPU is described, where there is one.
        before: the machine before the measurement, whose load is told: afterwards it is the measurement's own.
    """
    gpu = open_gpu(device)
    found = {
        "processor": processor(root),
        "board": text_of(root / "proc/device-tree/model"),
        "cores": cores(root),
        "threads": _threads(),
        "load": f"{before.load:.2f}" if before and before.load is not None else "",
        "cpu clocks": _cpu_clocks(root),
        "power mode": _power_mode(),
        "jetson": text_of(root / "etc/nv_tegra_release").partition(", GCID")[0].lstrip("# "),
        "gpu": _gpu(gpu),
        "gpu clocks": _gpu_clocks(root, gpu),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    return {name: value for name, value in found.items() if value} | _versions()


def _threads() -> str:
    """What decides on the engines' threads; by default they take one for each core."""
    told = [f"{name}={os.environ[name]}" for name in _THREAD_SETTINGS if name in os.environ]
    torch = sys.modules.get("torch")
    if torch is not None:
        told.append(f"torch {torch.get_num_threads()}")
    return ", ".join([*told, "onnxruntime: one for each core"])


def _cpu_clocks(root: Path) -> str:
    now = [int(text) for file in root.glob(f"{CPUFREQ}/scaling_cur_freq") if (text := text_of(file)).isdecimal()]
    if not now:
        return ""
    parts = [f"{min(now) // 1000} to {max(now) // 1000} MHz"]
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


def _gpu_clocks(root: Path, gpu: Gpu | None) -> str:
    if gpu and gpu.clocks_mhz:
        now, most = gpu.clocks_mhz
        return f"{now} of {most} MHz"
    # A Jetson's: 17000000.gpu, .ga10b or .gv11b by JetPack and module.
    for folder in sorted(root.glob("sys/class/devfreq/*")):
        if folder.name.rpartition(".")[2] in ("gpu", "ga10b", "gv11b", "gp10b", "gm20b"):
            now_, least, most_ = (text_of(folder / name) for name in ("cur_freq", "min_freq", "max_freq"))
            if now_.isdecimal() and most_.isdecimal():
                locked = ", locked" if least == most_ else ""
                return f"{int(now_) // 10**6} of {int(most_) // 10**6} MHz{locked}"
    return ""


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
