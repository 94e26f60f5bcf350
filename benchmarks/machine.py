"""Helpers of the benchmarks: what a figure was measured on, the peak of memory, and how a script ends."""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from importlib.metadata import PackageNotFoundError, version

from pmm_edge.console import INTERRUPTED
from pmm_edge.errors import PmmError
from pmm_edge.machine import processor


def machine(*packages: str) -> str:
    """One line: processor, cores, load, Python, the versions of those `packages` that are installed, and the date."""
    parts = [f"{processor()}, {os.cpu_count()} cores", f"load {os.getloadavg()[0]:.1f}"]
    parts.append(f"Python {platform.python_version()}")
    for package in packages:
        with suppress(PackageNotFoundError):
            parts.append(f"{package} {version(package)}")
    return " · ".join([*parts, date.today().isoformat()])


def peak_memory() -> float:
    """Peak resident memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def end_with(work: Callable[[], int]) -> None:
    """Exit with the code of `work`, or after one line for an error or Ctrl-C as `pmm` does."""
    try:
        code = work()
    except (PmmError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = getattr(error, "exit_code", 2)
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)
