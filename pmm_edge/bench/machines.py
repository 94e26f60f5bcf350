"""Whether the times of two reports can be compared: were they of one machine, and what are their ratios to."""

from __future__ import annotations

from pathlib import Path

from pmm_edge.bench.figures import BenchReport, ModelReport

_MACHINE = ("processor", "board", "cores", "gpu", "power mode")
"""Entries of the environment that make times comparable, with the settings of threads; versions are what a comparison
is about."""
ONLY_RATIOS = "between machines only ratios of the same engines on one device say something"
"""What one machine's GPU is to its CPU says nothing of another's."""


def same_machine(before: BenchReport, now: BenchReport) -> bool:
    """Times themselves can be compared."""
    both = _machine(before), _machine(now)
    # A bench that had nothing to do on a GPU names none: that is no other machine.
    unknown = {"gpu"} if any("gpu" not in machine for machine in both) else set()
    old, new = ({key: value for key, value in machine.items() if key not in unknown} for machine in both)
    return old == new


def same_measure(before: BenchReport, now: BenchReport) -> bool:
    """Ratios are to the same thing: the same file in the same engine on the same device."""
    old, new = before.reference, now.reference
    return old.sha256 == new.sha256 and runs_with(old) == runs_with(new)


def ratios_hold(pair: tuple[ModelReport, ModelReport], before: BenchReport, now: BenchReport) -> bool:
    """A model's ratio can be compared on another machine: it is to the same thing, and of one device alone."""
    old, new = pair
    return same_measure(before, now) and runs_with(old) == runs_with(new) and new.device == now.reference.device


def machine_notes(before: BenchReport, now: BenchReport) -> list[str]:
    """How times are compared where the machines differ; nothing where they do not."""
    if same_machine(before, now):
        return []
    differ = f"the machines differ ({_words(before)}; {_words(now)})"
    if same_measure(before, now):
        how = "times are compared through the ratio to the reference, memory and energy not at all"
        return [f"{how}: {differ}"]
    ran = [f"{Path(model.path).name} with {runs_with(model)}" for model in (before.reference, now.reference)]
    how = "times, memory and energy are not compared"
    return [f"{how}: {differ}, and there is no ratio to the same reference ({ran[0]}; {ran[1]})"]


def runs_with(model: ModelReport) -> str:
    """Engine and device."""
    return f"{model.backend} on {model.device}"


def _machine(report: BenchReport) -> dict[str, str]:
    # A new driver is no other machine, but what a comparison may be about.
    found = {key: report.environment[key].partition(", driver")[0] for key in _MACHINE if key in report.environment}
    # Of the threads what the user set: the engines' own follow from that, from the cores, and from which are loaded.
    settings = [part for part in report.environment.get("threads", "").split(", ") if "=" in part]
    return found | ({"threads": ", ".join(settings)} if settings else {})


def _words(report: BenchReport) -> str:
    return ", ".join(f"{key} {value}" for key, value in _machine(report).items()) or "unknown"
