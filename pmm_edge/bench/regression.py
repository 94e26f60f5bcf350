"""`pmm bench --compare`: what became better or worse between two reports, beyond noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pmm_edge.bench.figures import BenchReport, ModelReport
from pmm_edge.bench.findings import Finding, Pair, accuracy, ratios, sizes, times
from pmm_edge.bench.machines import ONLY_RATIOS, machine_notes, ratios_hold, runs_with, same_machine, same_measure
from pmm_edge.bench.read import read_report
from pmm_edge.bench.tables import Table
from pmm_edge.files import with_tilde


@dataclass(frozen=True)
class Comparison:
    """Two reports side by side."""

    old: str
    new: str
    findings: list[Finding]
    broken: list[str]
    """What is worse and no figure: a model that is gone, a gate that fails now."""
    notes: list[str]
    """What could not be compared and why, and what is new."""

    @property
    def regressions(self) -> list[str]:
        """A sentence for everything that became worse; none where the comparison passes."""
        return self.broken + [finding.sentence for finding in self.findings if finding.way == "worse"]

    @property
    def improvements(self) -> list[str]:
        return [finding.sentence for finding in self.findings if finding.way == "better"]


def compare_reports(old: Path, new: Path) -> Comparison:
    """Compare two `bench.json`, models matched by file name and precision.

    Accuracy is compared on the same images only, with another reference as the model's less its own reference's.
    Times are compared as they are on the same machine, on another one through the ratio to the same reference.
    `pmm_edge.bench.noise` says what counts as noise.

    Raises:
        DataError: a report cannot be read.
    """
    before, now = read_report(old), read_report(new)
    same_data = before.data_sha256 == now.data_sha256
    here = same_machine(before, now)
    same_reference = before.reference.sha256 == now.reference.sha256
    broken, notes = _unmatched(before, now)
    if not now.complete:
        broken.append(f"{new} is of a bench that was interrupted: what it lacks is not known to be well")
    if not same_data:
        notes.append(
            f"accuracy is not compared: the images differ ({with_tilde(before.data)} and {with_tilde(now.data)})"
        )
    elif not same_reference:
        notes.append(
            "mAP, Rank-1 and mINP are compared as each model's less its own reference's, the references' not at all:"
            " the references differ"
        )
    notes += machine_notes(before, now)
    findings: list[Finding] = []
    for pair in _matched(before, now):
        name = _name(pair[1])
        if pair[1].failures and not pair[0].failures:
            broken += [f"{name} passed and fails now: {failure}" for failure in pair[1].failures]
        if pair[0].failures and not pair[1].failures:
            notes.append(f"{name} failed and passes now")
        if (before_with := runs_with(pair[0])) != (now_with := runs_with(pair[1])):
            notes.append(f"{name} ran with {before_with}, now with {now_with}")
        findings += accuracy(name, pair, same_reference) if same_data else []
        if here:
            timed = list(times(name, pair))
            notes += _noisy(name, timed)
        elif ratios_hold(pair, before, now):
            timed = list(ratios(name, pair))
        else:
            timed = []
            notes += [f"{name}: its times are not compared: {ONLY_RATIOS}"] if same_measure(before, now) else []
        findings += [*timed, *sizes(name, pair, here)]
        notes += [*_loosened(name, pair), *_not_measured(name, pair)]
    return Comparison(str(old), str(new), findings, broken, notes + (_drift(before, now) if here else []))


def comparison_table(comparison: Comparison) -> Table:
    """What changed beyond noise; worse first."""
    shown = [finding for way in ("worse", "better") for finding in comparison.findings if finding.way == way]
    rows = [
        (f"{found.model}: {found.figure}", found.old, found.new, f"{found.change}\n{found.noise}", found.way)
        for found in shown
    ]
    title = f"{len(comparison.findings)} figures compared, {len(shown)} changed beyond noise"
    return Table(title, ("model and figure", "old", "new", "change\nnoise", "became"), rows)


def _matched(before: BenchReport, now: BenchReport) -> Iterator[Pair]:
    yield before.reference, now.reference
    old = _by_key(before)
    for key, model in _by_key(now).items():
        if key in old:
            yield old[key], model


def _by_key(report: BenchReport) -> dict[tuple[str, str, int], ModelReport]:
    """By file name and precision, numbered where several share both."""
    found: dict[tuple[str, str, int], ModelReport] = {}
    for model in report.models:
        number = 0
        while (key := (Path(model.path).name, model.precision, number)) in found:
            number += 1
        found[key] = model
    return found


def _unmatched(before: BenchReport, now: BenchReport) -> tuple[list[str], list[str]]:
    """Sentences for models that are gone, and for those that are new."""
    old, new = _by_key(before), _by_key(now)
    gone = [f"{_name(old[key])} ({key[1]}) is not in the new report" for key in old if key not in new]
    added = [f"{_name(new[key])} ({key[1]}) is new" for key in new if key not in old]
    added += [
        f"{_name(model)} is new and fails: {failure}"
        for key, model in new.items()
        if key not in old
        for failure in model.failures
    ]
    if Path(before.reference.path).name != Path(now.reference.path).name:
        added.append(f"the references differ: {_name(before.reference)} and {_name(now.reference)}")
    elif before.reference.sha256 != now.reference.sha256:
        added.append(f"the reference {_name(now.reference)} is another file than before")
    return gone, added


def _loosened(name: str, pair: Pair) -> list[str]:
    """Gates that ask for less than before: what passes now may not have passed then."""
    old, new = pair[0].gates, pair[1].gates
    # A report from before there was a gate on lengths reads as one that had the strictest.
    stretched = pair[0].parity and pair[0].parity.longest is not None and old.max_stretch < new.max_stretch
    asked = (
        ("least cosine", old.min_cosine, new.min_cosine, old.min_cosine > new.min_cosine),
        ("mean cosine", old.min_mean_cosine, new.min_mean_cosine, old.min_mean_cosine > new.min_mean_cosine),
        ("loss of mAP", old.max_map_drop, new.max_map_drop, old.max_map_drop < new.max_map_drop),
        ("ratio of lengths", old.max_stretch, new.max_stretch, stretched),
    )
    changes = [f"{words} {before:g} -> {now:g}" for words, before, now, looser in asked if looser]
    loosened = f"{name}: its gates were loosened ({', '.join(changes)}); cosines are compared by the stricter ones"
    return [loosened] if changes and pair[1].parity else []


def _not_measured(name: str, pair: Pair) -> list[str]:
    """What the old report has and the new one lacks: no regression, but not to be overlooked."""
    old, new = pair
    entries = {
        "parity": "parity",
        "retrieval": "retrieval",
        "cold_start": "the first embedding",
        "stream": "a stream",
        "energy": "energy",
    }
    lost = [words for entry, words in entries.items() if getattr(old, entry) and not getattr(new, entry)]
    timed = [{(own.scope, own.batch) for own in model.latency} for model in pair]
    lost += [f"batch {batch} ({scope})" for scope, batch in sorted(timed[0] - timed[1])]
    return [f"{name}: measured before and not now: {', '.join(lost)}"] if lost else []


def _noisy(name: str, timed: list[Finding]) -> list[str]:
    """Tails that moved, of timings that vary too much to say so: no regression, but not to be overlooked."""
    tails = [f"{found.figure} {found.old} -> {found.new}" for found in timed if found.noise.startswith("varies")]
    return [f"{name}: moved, in timings too noisy to judge it: {'; '.join(tails)}"] if tails else []


def _drift(before: BenchReport, now: BenchReport) -> list[str]:
    """Where the reference itself became slower or faster, the machine may have: that is said beside the times."""
    if before.reference.sha256 != now.reference.sha256:
        return []
    timed = times("", (before.reference, now.reference))
    moved = [found for found in timed if found.figure.startswith("batch") and found.figure.endswith(", ms")]
    return [
        f"the unchanged reference takes {found.change} at {found.figure.removesuffix(', ms')}: its engine or the"
        " machine changed, not the models alone"
        for found in moved
        if found.way in ("worse", "better")
    ]


def _name(model: ModelReport) -> str:
    return Path(model.path).name
