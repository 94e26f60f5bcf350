"""Whether a machine was quiet enough for its timings to mean something."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from pmm_edge.bench.figures import Latency
from pmm_edge.machine import clocks_are_locked, governors, is_jetson, text_of, usable_cores

MOST_VARIATION = 0.15
"""Coefficient of variation above which timings are noise."""
MOST_LOAD = 0.5
"""Of other work, for each core that is usable: more than that takes turns with what is measured."""


_SAMPLES, _SAMPLE_SECONDS = 10, 0.02


@dataclass(frozen=True)
class MachineState:
    """A machine before a measurement."""

    load: float | None
    """Processes of others that want a core now: the mean over a fifth of a second. Where the system does not tell, the
    load average of the last minute, in which what ran just before still counts."""
    cores: float
    throttled: int | None
    """How often it has slowed down by heat or current since it booted."""


def machine_state(root: Path = Path("/")) -> MachineState:
    """The state of this machine; taken before a measurement, lest the load is its own."""
    return MachineState(_load(root), usable_cores(root), _throttled(root))


def _load(root: Path) -> float | None:
    try:
        samples = []
        for _ in range(_SAMPLES):
            running = text_of(root / "proc/loadavg").split()[3].partition("/")[0]
            samples.append(int(running) - 1)  # without this thread, which is running as it reads
            time.sleep(_SAMPLE_SECONDS)
        return mean(samples)
    except (IndexError, ValueError):
        return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def machine_warnings(
    latencies: Sequence[Latency], before: MachineState | None = None, root: Path = Path("/")
) -> list[str]:
    """What makes timings less worth, each in a sentence that says what to do.

    Args:
        latencies: all that were measured.
        before: what `machine_state` gave before them; without it neither the load nor the CPU's throttling is judged.
        root: of the file system whose `proc` and `sys` are read.
    """
    found = [
        _load_warning(before) if before else None,
        _variation_warning(latencies, root),
        _throttling_warning(latencies, before, root),
    ]
    return [warning for warning in found if warning]


def _load_warning(before: MachineState) -> str | None:
    if before.load is None or before.load <= MOST_LOAD * before.cores:
        return None
    return (
        f"the machine was busy before the measurement: a load of {before.load:.1f} on {before.cores:g} cores;"
        " end other work (top shows it) and measure again"
    )


def _variation_warning(latencies: Sequence[Latency], root: Path) -> str | None:
    noisy = [found for found in latencies if found.variation > MOST_VARIATION]
    if not noisy:
        return None
    worst = max(noisy, key=lambda found: found.variation)
    return (
        f"{len(noisy)} of {len(latencies)} timings are noisy, the worst (batch {worst.batch}, {worst.scope}) varies by"
        f" {100 * worst.variation:.0f} % where a quiet machine stays below {100 * MOST_VARIATION:.0f} %;"
        f" {_how_to_quieten(root)} and measure again"
    )


def _how_to_quieten(root: Path) -> str:
    if is_jetson(root):
        locked = clocks_are_locked(root)
        return "end other work" if locked else "run sudo nvpmodel -m 0 and sudo jetson_clocks, end other work"
    if governors(root) - {"performance"}:
        return "set the clocks with sudo cpupower frequency-set -g performance, end other work"
    return "end other work, of neighbours as well where it is a virtual machine,"


def _throttling_warning(latencies: Sequence[Latency], before: MachineState | None, root: Path) -> str | None:
    reasons = []
    now = _throttled(root)
    if now is not None and before and before.throttled is not None and now > before.throttled:
        reasons.append(f"{now - before.throttled} times by heat or current")
    reasons += dict.fromkeys(f"the GPU by {reason}" for found in latencies for reason in found.slowed_by)
    if not reasons:
        return None
    return (
        f"the machine slowed itself down during the measurement ({', '.join(reasons)}); cool it, or lock lower clocks"
        " that it can hold, and measure again"
    )


def _throttled(root: Path) -> int | None:
    """Events counted by the kernel: of Intel's cores, and a Jetson's over-current."""
    patterns = (
        "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count",
        "sys/class/hwmon/*/oc*_event_cnt",
    )
    counts = []
    for pattern in patterns:
        for file in root.glob(pattern):
            try:
                counts.append(int(file.read_text()))
            except (OSError, ValueError):
                continue
    return sum(counts) if counts else None
