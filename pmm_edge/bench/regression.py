"""`pmm bench --compare`: what became better or worse between two reports, beyond noise (docs/regressions.md)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path

from pmm_edge.bench.environment import MAX_VARIATION
from pmm_edge.bench.report import BenchReport, Environment, Gates, Latency, ModelReport, Scope, read_report
from pmm_edge.bench.report import Change as Interval
from pmm_edge.bench.sentences import describe_failure
from pmm_edge.bench.tables import Table, milliseconds

MIN_LATENCY_NOISE = 0.05
"""Two runs on a quiet machine agree within this fraction, whatever their spread says."""
MIN_P90_NOISE = 0.10
MIN_POINTS = 0.01
"""Points of mAP, Rank-1 or mINP that rounding moves in another version of the same engine."""
_MEDIAN_INTERVAL = 1.96 * 1.2533
"""1.96 standard errors of the median of n normal samples: 1.2533 s / sqrt(n)."""


class Metric(Enum):
    """What was compared."""

    MAP = "mAP"
    RANK1 = "Rank-1"
    MINP = "mINP"
    COSINE_MIN = "minimum cosine"
    COSINE_MEAN = "mean cosine"
    MEDIAN = "median, ms"
    P90 = "p90, ms"
    RATIO = "ratio to the reference"
    FIRST_EMBEDDING = "first embedding, ms"
    MEMORY = "peak memory, MiB"
    GPU_MEMORY = "peak GPU memory, MiB"
    ENERGY = "J per embedding"
    FILE_SIZE = "file, MiB"


RETRIEVAL = {Metric.MAP: "mAP", Metric.RANK1: "rank1", Metric.MINP: "mINP"}
COSINES = (Metric.COSINE_MIN, Metric.COSINE_MEAN)


class Outcome(Enum):
    """How a figure changed."""

    WORSE = "worse"
    BETTER = "better"
    SAME = "same"


@dataclass(frozen=True)
class Finding:
    """One figure of one model in both reports."""

    model: str
    metric: Metric
    old: float
    """Retrieval in points of 100."""
    new: float
    noise: float
    """Change that means nothing: points for retrieval, 1 - cosine for cosines, otherwise a fraction of `old`."""
    outcome: Outcome
    batch: int | None = None
    scope: Scope | None = None
    cuda_graph: bool = False
    less_reference: bool = False
    """Retrieval minus that of the report's own reference."""

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """Name, old, new, change and noise for a table."""
        name = self.metric.value
        if self.batch:
            scope = ", end to end" if self.scope == "end to end" else ""
            name = f"batch {self.batch}{scope}{', CUDA graph' if self.cuda_graph else ''}, {name}"
        if self.metric in RETRIEVAL:
            name, form = (f"{name} minus reference", "+.2f") if self.less_reference else (name, ".2f")
            change, noise = f"{self.new - self.old:+.2f} points", f"± {self.noise:.2f} points"
            return name, format(self.old, form), format(self.new, form), change, noise
        if self.metric in COSINES:
            change = f"1-c {1 - self.old:.0e} -> {1 - self.new:.0e}"
            return name, f"{self.old:.6f}", f"{self.new:.6f}", change, f"x2, to {self.noise:.0e}"
        old, new = (f"{value:.3g}" if abs(value) < 1 else milliseconds(value) for value in (self.old, self.new))
        return name, old, new, f"x{self.new / self.old:.2f}", f"± {100 * self.noise:.0f} %"

    @property
    def sentence(self) -> str:
        name, old, new, change, noise = self.cells
        return f"{self.model}: {name} is {self.outcome.value}: {old} -> {new} ({change}, noise {noise})"


class NoteKind(Enum):
    """What else differs between two reports."""

    MODEL_MISSING = "model missing"
    MODEL_FAILS = "model fails"
    INTERRUPTED = "interrupted"
    MODEL_NEW = "model new"
    MODEL_PASSES = "model passes"
    OTHER_IMAGES = "other images"
    OTHER_REFERENCE = "other reference"
    OTHER_MACHINE = "other machine"
    OTHER_ENGINE = "other engine"
    NOT_MEASURED = "not measured"
    GATES_LOOSENED = "gates loosened"
    REFERENCE_MOVED = "reference moved"


REGRESSIONS = (NoteKind.MODEL_MISSING, NoteKind.MODEL_FAILS, NoteKind.INTERRUPTED)


@dataclass(frozen=True)
class Note:
    """A difference that is not a figure. Those in `REGRESSIONS` count as regressions."""

    kind: NoteKind
    text: str
    model: str = ""

    @property
    def sentence(self) -> str:
        return f"{self.model} {self.text}" if self.model else self.text


@dataclass(frozen=True)
class Comparison:
    """Two reports side by side."""

    findings: list[Finding]
    notes: list[Note]

    @property
    def regressions(self) -> list[Finding | Note]:
        """Everything that became worse; empty if the comparison passes."""
        notes = [note for note in self.notes if note.kind in REGRESSIONS]
        return [*notes, *(finding for finding in self.findings if finding.outcome is Outcome.WORSE)]

    @property
    def improvements(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.outcome is Outcome.BETTER]


def compare_reports(old: Path, new: Path) -> Comparison:
    """Compare two bench.json files; models are matched by file name and precision.

    Accuracy is compared on the same images only, and with another reference only relative to it. Times are compared on
    the same machine; on another machine only ratios to the same reference are.

    Raises:
        DataError: a report cannot be read.
    """
    before, now = read_report(old), read_report(new)
    same_images = before.data_sha256 == now.data_sha256
    same_reference = before.reference.sha256 == now.reference.sha256
    here = same_machine(before.environment, now.environment)
    same_ratios = same_reference and _engine(before.reference) == _engine(now.reference)
    machines = f"the machines differ ({before.environment.cpu}; {now.environment.cpu})"
    compared = "ratios to the reference" if same_ratios else "no times"
    general = (
        (now.complete, NoteKind.INTERRUPTED, f"{new} is the report of an interrupted bench"),
        (same_images, NoteKind.OTHER_IMAGES, "the images differ: accuracy is not compared"),
        (same_reference, NoteKind.OTHER_REFERENCE, "the references differ: retrieval is compared relative to them"),
        (here, NoteKind.OTHER_MACHINE, f"{machines}: {compared} are compared"),
    )
    notes, findings = [Note(kind, text) for holds, kind, text in general if not holds], list[Finding]()
    olds, news = _by_name(before), _by_name(now)
    notes += [
        Note(NoteKind.MODEL_MISSING, "is missing in the new report", _name(model))
        for key, model in olds.items()
        if key not in news
    ]
    for key, model in news.items():
        if key not in olds:
            failed = f" and fails: {'; '.join(map(describe_failure, model.failures))}" if model.failures else ""
            notes.append(Note(NoteKind.MODEL_NEW, f"is new{failed}", _name(model)))
            continue
        was = olds[key]
        notes += _model_notes(was, model)
        if same_images:
            findings += _accuracy(was, model, same_reference)
        if here:
            findings += [*_latencies(was, model), *_resources(was, model)]
        elif same_ratios and _engine(was) == _engine(model) and model.device == now.reference.device:
            findings += _ratios(was, model)
        findings += _figure(Metric.FILE_SIZE, model, was.file_bytes / 2**20, model.file_bytes / 2**20, 0.01)
    for one in findings if here and same_reference else []:
        if one.metric is Metric.MEDIAN and one.model == _name(now.reference) and one.outcome is not Outcome.SAME:
            text = f"has {one.cells[3]} in {one.cells[0]}, although it is the same file: machine or engine changed"
            notes.append(Note(NoteKind.REFERENCE_MOVED, text, one.model))
    return Comparison(findings, notes)


def comparison_table(comparison: Comparison) -> Table:
    """The figures that changed beyond noise, worse ones first."""
    findings = comparison.findings
    changed = [one for outcome in (Outcome.WORSE, Outcome.BETTER) for one in findings if one.outcome is outcome]
    rows = []
    for one in changed:
        name, old, new, change, noise = one.cells
        rows.append((f"{one.model}: {name}", old, new, f"{change}\n{noise}", one.outcome.value))
    title = f"{len(findings)} figures compared, {len(changed)} changed beyond noise"
    return Table(title, ("model and figure", "old", "new", "change\nnoise", "result"), rows)


# Matching


def same_machine(old: Environment, new: Environment) -> bool:
    """Whether times can be compared. Software versions may differ, as they are what a comparison is about."""
    same = ("cpu", "instruction_set", "board", "cores", "usable_cores", "power_mode", "thread_settings")
    if any(getattr(old, name) != getattr(new, name) for name in same):
        return False
    return old.gpu == new.gpu or None in (old.gpu, new.gpu)  # a bench that used no GPU names none


def _engine(model: ModelReport) -> tuple[str, str]:
    return model.backend, model.device


def _name(model: ModelReport) -> str:
    return Path(model.path).name


def _by_name(report: BenchReport) -> dict[tuple[str, str, int], ModelReport]:
    """Models by file name and precision, numbered where several share both; the reference is ("", "", 0)."""
    found = {("", "", 0): report.reference}
    for model in report.models:
        number = 0
        while (key := (_name(model), model.precision, number)) in found:
            number += 1
        found[key] = model
    return found


def _model_notes(old: ModelReport, new: ModelReport) -> Iterator[Note]:
    name = _name(new)
    if new.failures and not old.failures:
        yield Note(
            NoteKind.MODEL_FAILS, f"passed and fails now: {'; '.join(map(describe_failure, new.failures))}", name
        )
    if old.failures and not new.failures:
        yield Note(NoteKind.MODEL_PASSES, "failed and passes now", name)
    if _engine(old) != _engine(new):
        yield Note(
            NoteKind.OTHER_ENGINE, f"ran with {' on '.join(_engine(old))}, now {' on '.join(_engine(new))}", name
        )
    looser = [
        f"{gate.name} {before:g} -> {now:g}"
        for gate in fields(Gates)
        if (before := getattr(old.gates, gate.name)) != (now := getattr(new.gates, gate.name))
        and (before > now) == (gate.name in ("min_cosine", "min_mean_cosine"))
    ]
    if looser and new.parity:
        yield Note(NoteKind.GATES_LOOSENED, f"has looser gates: {', '.join(looser)}", name)
    lost = [
        part
        for part in ("parity", "retrieval", "cold_start", "energy")
        if getattr(old, part) and not getattr(new, part)
    ]
    timed = [{(one.scope, one.batch) for one in model.latency} for model in (old, new)]
    lost += [f"batch {batch}, {scope}" for scope, batch in sorted(timed[0] - timed[1])]
    if lost:
        yield Note(NoteKind.NOT_MEASURED, f"was measured before, and not now, for {', '.join(lost)}", name)


# Figures


def _accuracy(old: ModelReport, new: ModelReport, same_reference: bool) -> Iterator[Finding]:
    """Compare retrieval and cosines on the same images.

    Intervals are those of the change from the reference, so that with another reference only the change is compared.
    """
    changes = old.retrieval_change, new.retrieval_change
    for metric, name in RETRIEVAL.items():
        intervals: list[Interval] = [getattr(change, name) for change in changes if change]
        noise = Gates().max_map_drop  # a reference has no interval
        if len(intervals) == 2:
            noise = max(MIN_POINTS, 100 * math.hypot(*((one.high - one.low) / 2 for one in intervals)))
        if same_reference and old.retrieval and new.retrieval:
            before, now = (100 * float(getattr(model.retrieval, name)) for model in (old, new))
        elif not same_reference and len(intervals) == 2:
            before, now = (100 * one.difference for one in intervals)
        else:
            continue
        outcome = Outcome.SAME if abs(now - before) <= noise else Outcome.BETTER if now > before else Outcome.WORSE
        yield Finding(_name(new), metric, before, now, noise, outcome, less_reference=not same_reference)
    if old.parity and new.parity and old.parity.images == new.parity.images:
        was, whole = old.parity.whole, new.parity.whole
        min_gate = max(old.gates.min_cosine, new.gates.min_cosine)  # the stricter one
        mean_gate = max(old.gates.min_mean_cosine, new.gates.min_mean_cosine, min_gate)
        yield _cosine(Metric.COSINE_MIN, new, was.cosine_min, whole.cosine_min, min_gate)
        yield _cosine(Metric.COSINE_MEAN, new, was.cosine_mean, whole.cosine_mean, mean_gate)


def _cosine(metric: Metric, model: ModelReport, old: float, new: float, gate: float) -> Finding:
    """Worse where 1 - cosine more than doubled and exceeds a tenth of what the gate allows."""
    noise, outcome = (1 - gate) / 10, Outcome.SAME
    if 1 - new > max(2 * (1 - old), noise):
        outcome = Outcome.WORSE
    elif 1 - old > max(2 * (1 - new), noise):
        outcome = Outcome.BETTER
    return Finding(_name(model), metric, old, new, noise, outcome)


def _latencies(old: ModelReport, new: ModelReport) -> Iterator[Finding]:
    for before, now in _timed(old, new):
        noise = math.hypot(*(max(_median_noise(one), _ratio_noise(one)) for one in (before, now)))
        yield _timing(Metric.MEDIAN, new, now, before.median_ms, now.median_ms, max(MIN_LATENCY_NOISE, noise))
        if max(before.variation, now.variation) <= MAX_VARIATION:
            yield _timing(Metric.P90, new, now, before.p90_ms, now.p90_ms, _p90_noise(before, now))


def _ratios(old: ModelReport, new: ModelReport) -> Iterator[Finding]:
    for before, now in _timed(old, new):
        if (before.ratio, now.ratio) != (1, 1):  # the reference itself
            noise = max(MIN_LATENCY_NOISE, math.hypot(_ratio_noise(before), _ratio_noise(now)))
            yield _timing(Metric.RATIO, new, now, before.ratio, now.ratio, noise)


def _timed(old: ModelReport, new: ModelReport) -> Iterator[tuple[Latency, Latency]]:
    before = {(one.scope, one.batch, one.cuda_graph): one for one in old.latency}
    for now in new.latency:
        if found := before.get((now.scope, now.batch, now.cuda_graph)):
            yield found, now


def _resources(old: ModelReport, new: ModelReport) -> Iterator[Finding]:
    """Compare cold start, memory and energy on the same machine."""
    if old.cold_start and new.cold_start:
        before, now = old.cold_start, new.cold_start
        yield from _figure(Metric.FIRST_EMBEDDING, new, before.first_embedding_ms, now.first_embedding_ms, 0.25)
        if before.batch == now.batch:
            yield from _figure(Metric.MEMORY, new, before.peak_memory_mib, now.peak_memory_mib, 0.10)
            yield from _figure(Metric.GPU_MEMORY, new, before.peak_gpu_memory_mib, now.peak_gpu_memory_mib, 0.10)
    if old.energy and new.energy and (old.energy.source, old.energy.batch) == (new.energy.source, new.energy.batch):
        yield from _figure(Metric.ENERGY, new, old.energy.joules_per_embedding, new.energy.joules_per_embedding, 0.10)


def _figure(metric: Metric, model: ModelReport, old: float | None, new: float | None, noise: float) -> list[Finding]:
    return [Finding(_name(model), metric, old, new, noise, _outcome(old, new, noise))] if old and new else []


def _timing(metric: Metric, model: ModelReport, row: Latency, old: float, new: float, noise: float) -> Finding:
    outcome = _outcome(old, new, noise)
    return Finding(_name(model), metric, old, new, noise, outcome, row.batch, row.scope, row.cuda_graph)


def _outcome(old: float, new: float, noise: float) -> Outcome:
    """Less is better. The bounds are a factor of 1 + noise in either direction."""
    if 1 / (1 + noise) <= new / old <= 1 + noise:
        return Outcome.SAME
    return Outcome.WORSE if new > old else Outcome.BETTER


# Noise


def _median_noise(latency: Latency) -> float:
    """Half the 95 % interval of the median of independent runs, as a fraction."""
    return _MEDIAN_INTERVAL * latency.variation / math.sqrt(latency.runs)


def _ratio_noise(latency: Latency) -> float:
    """Half the 95 % interval of the ratio, as a fraction. It is over turns, so that it includes drift."""
    return (latency.ratio_high - latency.ratio_low) / 2 / latency.ratio


def _p90_noise(old: Latency, new: Latency) -> float:
    """Fraction by which a 90th percentile may change.

    Runs of one turn are not independent: 50 runs or 5,000 count as 10 to 20 draws. Of so few, the 95 % interval of a
    90th percentile reaches beyond the maximum, for which p99 stands, and is at least both spreads together: 1.96
    standard errors of the p90 of 10 to 20 normal draws, 1.709 s / sqrt(n), are 0.7 to 1.1 s.
    """
    low = min(old, new, key=lambda one: one.p90_ms)
    return max(MIN_P90_NOISE, math.hypot(old.variation, new.variation), low.p99_ms / low.p90_ms - 1)
