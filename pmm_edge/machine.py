"""The processor and how it is set, read where the kernel shows it. `root` is that of the file system, for tests."""

from __future__ import annotations

import os
import platform
from pathlib import Path

CPUFREQ = "sys/devices/system/cpu/cpu[0-9]*/cpufreq"


def processor(root: Path = Path("/")) -> str:
    """The model's name. `platform.processor()` is empty on most Linux systems, and many ARM kernels give no name."""
    info = cpuinfo(root)
    return info.get("model name") or info.get("Model") or platform.machine()


def cpuinfo(root: Path = Path("/")) -> dict[str, str]:
    """The last value of each entry of /proc/cpuinfo: on ARM the board's name stands at its end."""
    pairs = (line.partition(":") for line in text_of(root / "proc/cpuinfo").splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs if value}


def cores(root: Path = Path("/")) -> str:
    """How many there are, and how many of them may be used: `8, 6 of them usable`."""
    all_, usable = os.cpu_count() or 1, usable_cores(root)
    return str(all_) if usable == all_ else f"{all_}, {usable:g} of them usable"


def usable_cores(root: Path = Path("/")) -> float:
    """The cores that this process may use: its affinity, and the quota of its control group."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([float(affinity), *_quotas(root)])


def threads(processes: int = 1) -> int:
    """How many the usable cores have room for where so many processes run as many each; one at least."""
    return max(1, int(usable_cores() / processes))


def governors(root: Path = Path("/")) -> set[str]:
    """Of the cores' clocks; empty where the system does not tell."""
    return {text_of(file) for file in root.glob(f"{CPUFREQ}/scaling_governor")} - {""}


def clocks_are_locked(root: Path = Path("/")) -> bool:
    """Least and largest clock are set to the same on every core, as `jetson_clocks` does."""
    pairs = [
        (text_of(folder / "scaling_min_freq"), text_of(folder / "scaling_max_freq")) for folder in root.glob(CPUFREQ)
    ]
    return bool(pairs) and all(least and least == most for least, most in pairs)


def is_jetson(root: Path = Path("/")) -> bool:
    """NVIDIA's Linux for Tegra, or its board."""
    return (root / "etc/nv_tegra_release").is_file() or "Jetson" in text_of(root / "proc/device-tree/model")


def _quotas(root: Path) -> list[float]:
    """Cores that each control group above this process grants, of versions 2 and 1."""
    quotas = []
    for line in text_of(root / "proc/self/cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            base = root / "sys/fs/cgroup"
        elif "cpu" in controllers.split(","):
            base = root / "sys/fs/cgroup" / controllers
        else:
            continue
        # In a container the group's name is often that of the host, and what the container sees is the top.
        folder = base / name.strip("/")
        for group in {base, *(parent for parent in (folder, *folder.parents) if parent.is_relative_to(base))}:
            both = text_of(group / "cpu.max").split() or [
                text_of(group / "cpu.cfs_quota_us"),
                text_of(group / "cpu.cfs_period_us"),
            ]
            if len(both) == 2 and both[0].isdecimal() and both[1].isdecimal() and int(both[1]):
                quotas.append(int(both[0]) / int(both[1]))
    return quotas


def text_of(path: Path) -> str:
    """What a file of the kernel's says; nothing where it is not there or may not be read."""
    try:
        return path.read_text(errors="replace").strip().strip("\0")
    except OSError:
        return ""
