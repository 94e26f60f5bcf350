"""The processor as the kernel shows it (`root` is the root of the file system, for tests), and torchrun's processes."""

import os
import platform
from pathlib import Path

CPUFREQ = "sys/devices/system/cpu/cpu[0-9]*/cpufreq"
THREADS = "PMM_THREADS"
"""Environment variable that limits the threads of a process."""
_INSTRUCTION_SETS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx512f", "avx2", "avx", "i8mm", "asimddp", "asimd")


def processor(root: Path = Path("/")) -> str:
    """Model name of the processor. (`platform.processor()` is empty on most Linux systems.)"""
    info = cpuinfo(root)
    return info.get("model name") or info.get("Model") or platform.machine()


def cpuinfo(root: Path = Path("/")) -> dict[str, str]:
    """The last value of each entry in /proc/cpuinfo; on Arm, the board's name is at its end."""
    pairs = (line.partition(":") for line in text_of(root / "proc/cpuinfo").splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs if value}


def instruction_set(root: Path = Path("/")) -> str:
    """The widest vector instructions that matter for INT8 and FP32, such as `avx512_vnni`; else the machine type."""
    info = cpuinfo(root)
    flags = {*info.get("flags", "").split(), *info.get("Features", "").split()}
    return next((name for name in _INSTRUCTION_SETS if name in flags), platform.machine())


def sums_in_float16(root: Path = Path("/")) -> bool:
    """Whether the processor adds vectors of float16: Arm with FP16 instructions, on which ONNX Runtime uses them."""
    return "asimdhp" in cpuinfo(root).get("Features", "").split()


def usable_cores(root: Path = Path("/")) -> float:
    """Number of cores that this process may use: by PMM_THREADS, its affinity and the quotas of its control groups."""
    found = [float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)]
    if (limit := os.environ.get(THREADS, "")).isdecimal():
        found.append(float(limit))
    for line in text_of(root / "proc/self/cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / controllers
        # In a container the name is often that of the host, while the container sees its own group at the top.
        folder = base / name.strip("/")
        for group in {base, *(parent for parent in (folder, *folder.parents) if parent.is_relative_to(base))}:
            version1 = [text_of(group / f"cpu.cfs_{value}_us") for value in ("quota", "period")]
            both = text_of(group / "cpu.max").split() or version1
            if len(both) == 2 and both[0].isdecimal() and both[1].isdecimal():
                found.append(int(both[0]) / int(both[1]))
    return min(found)


def threads(processes: int = 1) -> int:
    """Number of threads for each of `processes` processes that share the usable cores; at least 1."""
    return max(1, int(usable_cores() / processes))


def in_torchrun() -> bool:
    """Whether torchrun started this process and others; a stray variable of another tool does not count."""
    names = "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"
    return all(os.environ.get(name) for name in names) and os.environ["WORLD_SIZE"] != "1"


def governors(root: Path = Path("/")) -> set[str]:
    """Frequency governors of the cores; empty if the system does not report them."""
    return {text_of(file) for file in root.glob(f"{CPUFREQ}/scaling_governor")} - {""}


def clocks_are_locked(root: Path = Path("/")) -> bool:
    """Whether the minimum and maximum clock are equal on every core, as `jetson_clocks` sets them."""
    folders = list(root.glob(CPUFREQ))
    pairs = [(text_of(folder / "scaling_min_freq"), text_of(folder / "scaling_max_freq")) for folder in folders]
    return bool(pairs) and all(least and least == most for least, most in pairs)


def is_jetson(root: Path = Path("/")) -> bool:
    """Whether this is a Jetson board."""
    return (root / "etc/nv_tegra_release").is_file() or "Jetson" in text_of(root / "proc/device-tree/model")


def text_of(path: Path) -> str:
    """Contents of a kernel file, or an empty string if it is missing or unreadable."""
    try:
        return path.read_text(errors="replace").strip().strip("\0")
    except OSError:
        return ""
