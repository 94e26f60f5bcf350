"""The machine: processor, memory, disk, Jetson board; read from files below a root folder."""

from __future__ import annotations

import os
import platform
import re
import shutil
from pathlib import Path

from pmm_edge.doctor.findings import Finding, Section, shareable
from pmm_edge.doctor.packages import version_of
from pmm_edge.errors import OutputError
from pmm_edge.files import cache_folder, home_folder
from pmm_edge.machine import cores, processor, text_of

_LITTLE_DISK_GIB = 2.0
_JETPACKS = (
    ("38", "7"),
    ("36.4.4", "6.2.1"),
    ("36.4.3", "6.2"),
    ("36.4", "6.1"),
    ("36.3", "6.0"),
    ("36", "6.0 preview"),
    ("35", "5"),
    ("32", "4"),
)
"""JetPack by the release of Jetson Linux; the first prefix counts."""
_OLDEST_JETPACK = (6, 1)


def machine(root: Path) -> Section:
    """What the operating system says of the machine and of this Python."""
    findings = [
        Finding("pmm-edge", version_of("pmm-edge") or "not installed"),
        Finding("Python", f"{platform.python_version()} ({platform.python_implementation()}, {platform.machine()})"),
        Finding("system", platform.platform()),
        *jetson(root),
        Finding("processor", processor(root)),
        Finding("cores", cores(root)),
        Finding("memory", _memory(root)),
        _disk(),
    ]
    return Section("Machine", findings)


def jetson(root: Path) -> list[Finding]:
    """Board, Jetson Linux and JetPack; nothing where this is no Jetson."""
    release = re.search(r"R(\d+)\b.*?REVISION: *([\d.]+)", text_of(root / "etc/nv_tegra_release"))
    if not release:
        return []
    board = text_of(root / "proc/device-tree/model") or "unknown board"
    linux = f"{release[1]}.{release[2]}"
    package = re.search(r"Package: nvidia-jetpack\n(?:.+\n)*?Version: *([\d.]+)", text_of(root / "var/lib/dpkg/status"))
    jetpack = (
        package[1] if package else next((jp for known, jp in _JETPACKS if f"{linux}.".startswith(f"{known}.")), "")
    )
    numbers = tuple(int(part) for part in re.findall(r"\d+", jetpack)[:2])
    old = bool(numbers) and (*numbers, 0)[:2] < _OLDEST_JETPACK
    remedy = "Update to JetPack 6.1 or later: it brings TensorRT 10.3, which pmm export --trt needs" if old else ""
    shown = f"{jetpack or 'unknown'} (Jetson Linux {linux})"
    return [Finding("Jetson", board), Finding("JetPack", shown, False if old else None, remedy)]


def _memory(root: Path) -> str:
    sizes = dict(re.findall(r"^(MemTotal|MemAvailable): *(\d+) kB", text_of(root / "proc/meminfo"), re.MULTILINE))
    if "MemTotal" not in sizes:
        return "unknown"
    free = f", {int(sizes['MemAvailable']) / 2**20:.1f} GiB free" if "MemAvailable" in sizes else ""
    return f"{int(sizes['MemTotal']) / 2**20:.1f} GiB{free}"


def _disk() -> Finding:
    try:
        folder, home = cache_folder().absolute(), home_folder()
    except OutputError as error:
        return Finding("cache folder", shareable(error.problem), False, error.remedy)
    shown = shareable(str(folder)) if home and folder.is_relative_to(home) else "the folder that is set"
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        free = shutil.disk_usage(there).free / 2**30
    except OSError as error:
        return Finding("cache folder", f"{shown}: {error.strerror}", False, "Set PMM_HOME to a folder that works")
    if not there.is_dir() or not os.access(there, os.W_OK):
        return Finding("cache folder", f"{shown} cannot be written", False, "Set PMM_HOME to a folder that is writable")
    little = free < _LITTLE_DISK_GIB
    remedy = "Set PMM_HOME to a folder on a larger disk" if little else ""
    return Finding("cache folder", f"{shown}, {free:.1f} GiB free", False if little else None, remedy)
