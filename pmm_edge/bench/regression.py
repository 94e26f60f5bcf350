"""Whether the times of two reports can be compared: were they of one machine, and what are their ratios to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pmm_edge.bench.environment import MOST_VARIATION
from pmm_edge.bench.report import BenchReport, Change, Gates, Latency, ModelReport, read_report
from pmm_edge.bench.tables import Table, milliseconds
from pmm_edge.files import with_tilde

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


LEAST_LATENCY = 0.05
"""Two runs on a quiet machine agree within this share, whatever their own spread says."""
LEAST_P90 = 0.10
"""The same of a 90th percentile, which one run in ten makes."""
COLD_START = 0.25
"""Share of the time to the first embedding: one process each, disk caches included."""
MEMORY = 0.10
ENERGY = 0.10
STREAM = 0.10
FILE_SIZE = 0.01
LEAST_POINTS = 0.01
"""Points of mAP, Rank-1 or mINP: what rounding moves on another version of the same engine."""
# 1.96 standard errors of a median, 1.2533 s / sqrt(n) for n draws of a normal distribution of spread s.
_MEDIAN_INTERVAL = 1.96 * 1.2533
# Of the way from the median to p90, down to the 77th percentile: 1.96 sqrt(0.9 * 0.1 / 20) below the 90th.
_BELOW_P90 = 0.13 / 0.4


def latency_noise(old: Latency, new: Latency) -> float:
    """The share that a median may move by: both medians' 95 % intervals, at least `LEAST_LATENCY`.

    The wider of two estimates for each: from the spread of single runs, and from the interval of the ratio to the
    reference, which is over turns and so knows of drift.
    """
    return max(LEAST_LATENCY, math.hypot(*(max(_of_runs(one), _of_ratio(one)) for one in (old, new))))


def ratio_noise(old: Latency, new: Latency) -> float:
    """The share that a ratio to the reference may move by: both ratios' intervals, at least `LEAST_LATENCY`."""
    return max(LEAST_LATENCY, math.hypot(_of_ratio(old), _of_ratio(new)))


def p90_noise(old: Latency, new: Latency) -> float:
    """The share that a 90th percentile may move by, at least `LEAST_P90`.

    Runs of one turn are not independent of each other: 50 runs or 5,000 are 10 to 20 turns. Of so many draws the 95 %
    interval of a 90th percentile reaches from about the 77th percentile (binomial) to beyond the largest, for which p99
    stands: that of the lower report upwards, that of the higher one downwards. And it is at least both spreads, for of
    n = 10 to 20 normal draws 1.96 standard errors of a 90th percentile, 1.709 s / sqrt(n), come to 0.7 to 1.1 s.
    """
    low, high = sorted((old, new), key=lambda one: one.p90_ms)
    if not low.p90_ms > 0:
        return LEAST_P90
    above, below = low.p99_ms - low.p90_ms, _BELOW_P90 * (high.p90_ms - high.median_ms)
    spreads = math.hypot(_known(old.variation), _known(new.variation))
    return max(LEAST_P90, spreads, math.hypot(_known(above), _known(below)) / low.p90_ms)


def points_noise(old: Change | None, new: Change | None) -> float:
    """The points of 100 that a share may fall by on the same images.

    Both 95 % intervals of the paired bootstrap over queries, at least `LEAST_POINTS`. They are of a model less its
    reference, and of the model alone only where both have the same one. A reference has no interval; the loss that
    the usual gate allows stands in.
    """
    if old is None or new is None:
        return Gates().max_map_drop
    halves = [100 * _known((change.high - change.low) / 2) for change in (old, new)]
    return max(LEAST_POINTS, math.hypot(*halves))


def cosine_is_worse(old: float, new: float, gate: float) -> bool:
    """Whether an embedding departs more than rounding explains.

    1 - cosine more than doubled, and has come to more than a tenth of what the gate allows.
    """
    before, now = 1 - _known(old), 1 - _known(new)
    return now > 2 * before and now > (1 - gate) / 10


def _of_runs(latency: Latency) -> float:
    return _MEDIAN_INTERVAL * _known(latency.variation) / math.sqrt(latency.runs)


def _of_ratio(latency: Latency) -> float:
    return _known((latency.ratio_high - latency.ratio_low) / 2 / latency.ratio) if latency.ratio > 0 else 0.0


def _known(value: float) -> float:
    """0 for a figure that was not finite: no interval, and no cosine."""
    return value if math.isfinite(value) else 0.0


Way = Literal["worse", "better", "same", "unknown"]
Pair = tuple[ModelReport, ModelReport]
"""The old one and the new one."""


@dataclass(frozen=True)
class Finding:
    """One figure of one model in both reports."""

    model: str
    figure: str
    old: str
    new: str
    change: str
    """With its unit: `-0.31 points`, `x1.20`."""
    noise: str
    """The change that may be none: `± 0.25 points`."""
    way: Way

    @property
    def sentence(self) -> str:
        words = {"worse": "became worse", "better": "became better", "same": "is as it was"}
        became = words.get(self.way, "cannot be compared")
        return f"{self.model}: {self.figure} {became}: {self.old} -> {self.new} ({self.change}, noise {self.noise})"


def accuracy(name: str, pair: Pair, same_reference: bool) -> Iterator[Finding]:
    """Retrieval and cosine; both reports must be of the same images. A gate that was loosened makes no more of noise.

    The intervals are of the model less its reference: with another reference only that difference is compared.
    """
    old, new = pair
    for word, entry in (("mAP", "mAP"), ("Rank-1", "rank1"), ("mINP", "mINP")):
        # None for a reference, which has no change: getattr gives the default of an entry that None lacks.
        changes = [getattr(model.retrieval_change, entry, None) for model in pair]
        allowed = points_noise(changes[0], changes[1])
        if same_reference and old.retrieval and new.retrieval:
            values = [100 * float(getattr(model.retrieval, entry)) for model in pair]
            yield _points(name, word, values, allowed, ".2f")
        elif not same_reference and changes[0] and changes[1]:
            differences = [100 * float(change.difference) for change in (changes[0], changes[1])]
            yield _points(name, f"{word} less the reference's", differences, allowed, "+.2f")
    if old.parity and new.parity and old.parity.images == new.parity.images:
        before, now = old.parity.whole, new.parity.whole
        least_gate, mean_gate = (
            max(getattr(m.gates, entry) for m in pair) for entry in ("min_cosine", "min_mean_cosine")
        )
        yield _cosine(name, "least cosine", before.cosine_min, now.cosine_min, least_gate)
        yield _cosine(name, "mean cosine", before.cosine_mean, now.cosine_mean, max(mean_gate, least_gate))


def _points(name: str, figure: str, values: list[float], allowed: float, form: str) -> Finding:
    """The old and the new share in points of 100, shown in this form: more is better."""
    old, new = values
    moved = new - old
    way: Way = "same" if abs(moved) <= allowed else "better" if moved > 0 else "worse"
    return Finding(
        name, figure, f"{old:{form}}", f"{new:{form}}", f"{moved:+.2f} points", f"± {allowed:.2f} points", way
    )


def _cosine(name: str, figure: str, old: float, new: float, gate: float) -> Finding:
    way: Way = "same"
    if cosine_is_worse(old, new, gate):
        way = "worse"
    elif cosine_is_worse(new, old, gate):
        way = "better"
    change = f"1-c {1 - old:.0e} -> {1 - new:.0e}"
    return Finding(name, figure, f"{old:.6f}", f"{new:.6f}", change, f"x2, to {(1 - gate) / 10:.0e}", way)


def times(name: str, pair: Pair) -> Iterator[Finding]:
    """Medians and p90 as they are: the machine is the same."""
    for what, first, second in _latencies(pair):
        allowed = latency_noise(first, second)
        yield _share(name, f"{what}, ms", first.median_ms, second.median_ms, allowed)
        yield _p90(name, f"{what}, p90 ms", first, second)
    old, new = pair
    if old.cold_start and new.cold_start:
        starts = old.cold_start.first_embedding_ms, new.cold_start.first_embedding_ms
        yield _share(name, "first embedding, ms", *starts, COLD_START)
    if old.stream and new.stream and old.stream.clients == new.stream.clients:
        rates = old.stream.crops_per_second, new.stream.crops_per_second
        yield _share(name, f"{new.stream.clients} clients, crops a second", *rates, STREAM, more_is_better=True)
    if old.energy and new.energy and (old.energy.source, old.energy.batch) == (new.energy.source, new.energy.batch):
        joules = old.energy.joules_per_embedding, new.energy.joules_per_embedding
        yield _share(name, "J an embedding", *joules, ENERGY)


def _p90(name: str, figure: str, old: Latency, new: Latency) -> Finding:
    """Timings that the bench itself calls noisy show no change of their tail."""
    found = _share(name, figure, old.p90_ms, new.p90_ms, p90_noise(old, new))
    variation = max(old.variation, new.variation)
    if found.way == "same" or variation <= MOST_VARIATION:
        return found
    return replace(found, noise=f"varies by {100 * variation:.0f} %", way="unknown")


def ratios(name: str, pair: Pair) -> Iterator[Finding]:
    """On another machine only what the reference took there can be compared with."""
    for what, first, second in _latencies(pair):
        if (first.ratio, second.ratio) != (1, 1):  # the reference's own
            allowed = ratio_noise(first, second)
            yield _share(name, f"{what}, ratio to the reference", first.ratio, second.ratio, allowed)


def sizes(name: str, pair: Pair, same_machine: bool) -> Iterator[Finding]:
    """The file's size; on the same machine the memory as well."""
    old, new = pair
    yield _share(name, "file, MiB", old.file_bytes / 2**20, new.file_bytes / 2**20, FILE_SIZE)
    starts = old.cold_start, new.cold_start
    if same_machine and starts[0] and starts[1] and starts[0].batch == starts[1].batch:
        memory = starts[0].peak_memory_mib, starts[1].peak_memory_mib
        yield _share(name, "peak memory, MiB", *memory, MEMORY)
        gpu = starts[0].peak_gpu_memory_mib, starts[1].peak_gpu_memory_mib
        if gpu[0] is not None and gpu[1] is not None:
            yield _share(name, "peak GPU memory, MiB", gpu[0], gpu[1], MEMORY)


def _share(name: str, figure: str, old: float, new: float, allowed: float, more_is_better: bool = False) -> Finding:
    """A figure whose noise is a share of it. The bounds are x(1 + share) and its inverse: neither way is easier."""
    if not (old > 0 and new > 0):
        return Finding(name, figure, _short(old), _short(new), "not finite or none", "–", "unknown")
    factor = new / old
    up = factor > 1 + allowed
    way: Way = "same" if 1 / (1 + allowed) <= factor <= 1 + allowed else "better" if up == more_is_better else "worse"
    return Finding(name, figure, _short(old), _short(new), f"x{factor:.2f}", f"± {100 * allowed:.0f} %", way)


def _latencies(pair: Pair) -> Iterator[tuple[str, Latency, Latency]]:
    old = {(own.scope, own.batch, own.cuda_graph): own for own in pair[0].latency}
    for own in pair[1].latency:
        if found := old.get((own.scope, own.batch, own.cuda_graph)):
            scope = "" if own.scope == "model" else ", end to end"
            yield f"batch {own.batch}{scope}{', CUDA graph' if own.cuda_graph else ''}", found, own


def _short(value: float) -> str:
    return f"{value:.3g}" if 0 < abs(value) < 1 else milliseconds(value)


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
    `pmm_edge.bench.regression` says what counts as noise.

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
