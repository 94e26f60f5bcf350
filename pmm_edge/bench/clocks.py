"""The clocks that a machine really had while something was timed, and what kept them down.

They are read at the end of each turn, while the device is still hot: at rest clocks fall, and reasons are forgotten.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from pmm_edge.bench.figures import Clocks
from pmm_edge.bench.nvml import open_gpu
from pmm_edge.machine import CPUFREQ, text_of
from pmm_edge.runtime.embedder import parse_device

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
