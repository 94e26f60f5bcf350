"""What a figure was measured on: printed above every benchmark's table."""

from __future__ import annotations

import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def machine(*packages: str) -> str:
    """One line: processor, cores, load, Python, the versions of `packages`, and the date."""
    load = f"load {os.getloadavg()[0]:.1f}"
    parts = [f"{_processor()}, {os.cpu_count()} cores", load, f"Python {platform.python_version()}"]
    return " · ".join([*parts, *map(_versioned, packages), date.today().isoformat()])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _versioned(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} absent"
