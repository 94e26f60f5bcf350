"""A process of its own that loads a model and embeds: how long until the first embedding, and how much memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pmm_edge.bench.figures import ColdStart
from pmm_edge.bench.nvml import Gpu, open_gpu
from pmm_edge.errors import ModelError, PmmError

TIMEOUT = 600.0
_TICK = 0.01

# No module of pmm_edge.bench: importing the package would be timed. The paths are those of this process, for `-c`
# puts the working folder in front of them.
_CHILD = """
import json, sys, time
path, device, batch, sys.path[:] = json.loads(sys.argv[1])
import numpy
import pmm_edge
embedder = pmm_edge.load(path, device)
size = embedder.spec.input
crops = numpy.zeros((batch, size.height, size.width, 3), numpy.uint8)
embedder.embed(crops[:1])
first = time.monotonic()
embedder.embed(crops)
try:
    # Not getrusage: what a process begins with there is the size of the one that started it.
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024
except (OSError, StopIteration):
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
print(json.dumps([first, peak]))
"""


def measure_cold_start(path: Path, device: str | None, batch: int, timeout: float = TIMEOUT) -> ColdStart:
    """Start Python, load a model, embed one crop, then a batch of crops.

    The file is in the system's cache where it was read before; right after a boot the disk comes on top.

    Args:
        path: what `pmm_edge.load` loads.
        device: as of `pmm_edge.load`.
        batch: crops whose memory is measured.
        timeout: seconds after which the process is killed.

    Returns:
        Times and memory. That of the GPU is what all processes on it hold at most, less what they held before: None
        without an NVIDIA GPU, and a Jetson's is part of the process's own.

    Raises:
        ModelError: the process ended before it had embedded, or took too long.
        PmmError: `batch` is less than 1.
    """
    if batch < 1:
        raise PmmError(f"the memory of a batch of {batch} cannot be measured", "Choose 1 or more")
    gpu = open_gpu(device or "cuda")
    before = gpu.used_mib if gpu else None
    arguments = json.dumps([str(path), device, batch, sys.path])
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.monotonic()  # the same clock in all processes
        process = subprocess.Popen([sys.executable, "-c", _CHILD, arguments], stdout=out, stderr=err)
        try:
            most = _watch(process, gpu, start + timeout)
        finally:
            process.kill()  # nothing to do where it has ended
            process.wait()
        out.seek(0)
        err.seek(0)
        told = _told(out.read())
        if told is None or process.returncode:
            raise ModelError(
                f"{path} cannot be run in a process of its own: {_end(process.returncode, err.read(), timeout)}",
                "Is there memory for it a second time? Leave the cold start out otherwise",
            )
    first, peak = told
    grown = most - before if most is not None and before is not None else None
    return ColdStart(1000 * (first - start), peak, batch, grown)


def _watch(process: subprocess.Popen[bytes], gpu: Gpu | None, until: float) -> float | None:
    """Wait for the end of a process, at most until then; the most memory that was in use on the GPU meanwhile."""
    most: float | None = None
    while process.poll() is None and time.monotonic() < until:
        used = gpu.used_mib if gpu else None
        most = used if most is None or (used is not None and used > most) else most
        time.sleep(_TICK)
    return most


def _told(printed: bytes) -> Any:
    """What the process printed last: engines may have printed something before."""
    try:
        first, peak = json.loads(printed.splitlines()[-1])
    except (IndexError, ValueError, TypeError):
        return None
    return float(first), float(peak)


def _end(code: int, errors: bytes, timeout: float) -> str:
    lines = errors.decode(errors="replace").strip().splitlines()
    if code < 0:
        return f"killed by signal {-code}, after {timeout:g} s at the latest"
    return lines[-1] if lines else f"it ended with exit code {code}"
