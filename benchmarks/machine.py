"""What a figure was measured on: printed above every benchmark's table."""

from __future__ import annotations

import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version

from pmm_edge.machine import processor


def machine(*packages: str) -> str:
    """One line: processor, cores, load, Python, the versions of `packages`, and the date."""
    load = f"load {os.getloadavg()[0]:.1f}"
    parts = [f"{processor()}, {os.cpu_count()} cores", load, f"Python {platform.python_version()}"]
    return " · ".join([*parts, *map(_versioned, packages), date.today().isoformat()])


def _versioned(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} absent"
