"""`pmm bench --compare`: what became better or worse between two reports, beyond noise (docs/regressions.md)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path

from pmm_edge.bench.report import BenchReport, Environment, Gates, Latency, ModelReport, Scope, read_report
from pmm_edge.bench.tables import Table, describe_failure, milliseconds


class Metric(Enum):
    """What was compared."""

    MAP = "mAP"
    RANK1 = "Rank-1"
    MINP = "mINP"
    COSINE_MIN = "minimum cosine"
    COSINE_MEAN = "mean cosine"
    MEDIAN = "median, ms"
    RATIO = "ratio to the reference"
    FIRST_EMBEDDING = "first embedding, ms"
    MEMORY = "peak memory, MiB"
    GPU_MEMORY = "GPU memory, MiB"
    ENERGY = "J per embedding"
    FILE_SIZE = "file, MiB"


class Outcome(Enum):
    """How a figure changed."""

    WORSE = "worse"
    BETTER = "better"
    SAME = "same"


@dataclass(frozen=True)
class MetricChange:
    """One figure of one model in both reports; retrieval in points of 100."""

    model: str
    metric: Metric
    old: float
    new: float
    noise: float
    """Change that means nothing: points for retrieval, 1 - cosine for cosines, otherwise a fraction of `old`."""
    outcome: Outcome
    batch: int | None = None
    scope: Scope | None = None
    cuda_graph: bool = False

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """Name, old, new, change and noise for a table."""
        name = self.metric.value
        if self.batch:
            scope = ", end to end" if self.scope == "end to end" else ""
            name = f"batch {self.batch}{scope}{', CUDA graph' if self.cuda_graph else ''}, {name}"
        if self.metric in _RETRIEVAL:
            change, noise = f"{self.new - self.old:+.2f} points", f"± {self.noise:.2f} points"
            return name, f"{self.old:.2f}", f"{self.new:.2f}", change, noise
        if self.metric in (Metric.COSINE_MIN, Metric.COSINE_MEAN):
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


@dataclass(frozen=True)
class Note:
    """A difference that is not a figure."""

    kind: NoteKind
    text: str
    model: str = ""

    @property
    def sentence(self) -> str:
        return f"{self.model} {self.text}" if self.model else self.text


@dataclass(frozen=True)
class Comparison:
    """Two reports side by side."""

    findings: list[MetricChange]
    notes: list[Note]

    @property
    def regressions(self) -> list[MetricChange | Note]:
        """Everything that became worse; empty if the comparison passes."""
        kinds = (NoteKind.MODEL_MISSING, NoteKind.MODEL_FAILS, NoteKind.INTERRUPTED)
        worse = [finding for finding in self.findings if finding.outcome is Outcome.WORSE]
        return [*(note for note in self.notes if note.kind in kinds), *worse]

    @property
    def improvements(self) -> list[MetricChange]:
        return [finding for finding in self.findings if finding.outcome is Outcome.BETTER]


def compare_reports(old: Path, new: Path) -> Comparison:
    """Compare two bench.json files; models are matched by file name and precision.

    Accuracy is compared on the same images only, and retrieval with the same reference. Times are compared on the same
    machine; on another machine only ratios to the same reference are. Raises DataError for a report that cannot be
    read.
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
        (same_reference, NoteKind.OTHER_REFERENCE, "the references differ: retrieval is not compared"),
        (here, NoteKind.OTHER_MACHINE, f"{machines}: {compared} are compared"),
    )
    notes, findings = [Note(kind, text) for holds, kind, text in general if not holds], list[MetricChange]()
    olds, news = _by_name(before), _by_name(now)
    missing = [_name(olds[key]) for key in olds if key not in news]
    notes += [Note(NoteKind.MODEL_MISSING, "is missing in the new report", name) for name in missing]
    for key, model in news.items():
        if (was := olds.get(key)) is None:
            notes.append(Note(NoteKind.MODEL_NEW, "is new and fails" if model.failures else "is new", _name(model)))
            continue
        notes += [Note(kind, text, _name(model)) for kind, text in _model_notes(was, model)]
        if same_images:
            findings += [*(_retrieval(was, model) if same_reference else []), *_cosines(was, model)]
        if here:
            findings += [*_latencies(was, model, Metric.MEDIAN), *_resources(was, model)]
        elif same_ratios and _engine(was) == _engine(model) and model.device == now.reference.device:
            findings += _latencies(was, model, Metric.RATIO)
        findings.append(_cost(model, Metric.FILE_SIZE, was.file_bytes / 2**20, model.file_bytes / 2**20, 0.01))
    return Comparison(findings, notes)


def comparison_table(comparison: Comparison) -> Table:
    """The figures that changed beyond noise, worse ones first."""
    findings, rows = comparison.findings, []
    for one in [*(one for one in findings if one.outcome is Outcome.WORSE), *comparison.improvements]:
        name, old, new, change, noise = one.cells
        rows.append((f"{one.model}: {name}", old, new, f"{change}\n{noise}", one.outcome.value))
    title = f"{len(findings)} figures compared, {len(rows)} changed beyond noise"
    return Table(title, ("model and figure", "old", "new", "change\nnoise", "result"), rows)


# Matching


def same_machine(old: Environment, new: Environment) -> bool:
    """Whether times can be compared. Software versions may differ, as they are what a comparison is about."""
    same = ("cpu", "instruction_set", "board", "cores", "usable_cores", "power_mode", "thread_settings")
    if any(getattr(old, name) != getattr(new, name) for name in same):
        return False
    return old.gpu == new.gpu or None in (old.gpu, new.gpu)  # a bench that used no GPU names none


def _engine(model: ModelReport) -> str:
    return f"{model.backend} on {model.device}"


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


def _model_notes(old: ModelReport, new: ModelReport) -> Iterator[tuple[NoteKind, str]]:
    if new.failures and not old.failures:
        yield NoteKind.MODEL_FAILS, f"passed and fails now: {'; '.join(map(describe_failure, new.failures))}"
    if old.failures and not new.failures:
        yield NoteKind.MODEL_PASSES, "failed and passes now"
    if _engine(old) != _engine(new):
        yield NoteKind.OTHER_ENGINE, f"ran with {_engine(old)}, now {_engine(new)}"
    looser = [
        f"{gate.name} {before:g} -> {now:g}"
        for gate in fields(Gates)
        if (before := getattr(old.gates, gate.name)) != (now := getattr(new.gates, gate.name))
        and (before > now) == (gate.name in ("min_cosine", "min_mean_cosine"))
    ]
    if looser and new.parity:
        yield NoteKind.GATES_LOOSENED, f"has looser gates: {', '.join(looser)}"
    parts = ("parity", "retrieval", "latency", "cold_start", "energy")
    if lost := [part for part in parts if getattr(old, part) and not getattr(new, part)]:
        yield NoteKind.NOT_MEASURED, f"was measured before, and not now, for {', '.join(lost)}"


# Figures and their noise

MIN_LATENCY_NOISE = 0.05
"""Two runs on a quiet machine agree within this fraction, whatever their spread says."""
MIN_POINTS = 0.01
"""Points of mAP, Rank-1 or mINP that rounding moves in another version of the same engine."""
_RETRIEVAL = {Metric.MAP: "mAP", Metric.RANK1: "rank1", Metric.MINP: "mINP"}
_RESOURCES = {
    Metric.FIRST_EMBEDDING: ("cold_start", "first_embedding_ms", 0.25),
    Metric.MEMORY: ("cold_start", "peak_memory_mib", 0.10),
    Metric.GPU_MEMORY: ("cold_start", "gpu_memory_mib", 0.10),
    Metric.ENERGY: ("energy", "joules_per_embedding", 0.10),
}


def _retrieval(old: ModelReport, new: ModelReport) -> Iterator[MetricChange]:
    """Compare retrieval beyond the intervals of the changes from the same reference."""
    if not old.retrieval or not new.retrieval:
        return
    for metric, name in _RETRIEVAL.items():
        noise = Gates().max_map_drop  # a reference has no interval
        if old.retrieval_change and new.retrieval_change:
            intervals = [getattr(change, name) for change in (old.retrieval_change, new.retrieval_change)]
            noise = max(MIN_POINTS, 100 * math.hypot(*((one.high - one.low) / 2 for one in intervals)))
        before, now = (100 * getattr(retrieval, name) for retrieval in (old.retrieval, new.retrieval))
        outcome = Outcome.SAME if abs(now - before) <= noise else Outcome.BETTER if now > before else Outcome.WORSE
        yield MetricChange(_name(new), metric, before, now, noise, outcome)


def _cosines(old: ModelReport, new: ModelReport) -> Iterator[MetricChange]:
    """Find cosines where 1 - cosine more than doubled and exceeds a tenth of what the stricter gate allows."""
    if not old.parity or not new.parity:
        return
    gate = max(old.gates.min_cosine, new.gates.min_cosine)
    mean_gate = max(old.gates.min_mean_cosine, new.gates.min_mean_cosine, gate)
    for metric, name, limit in (
        (Metric.COSINE_MIN, "cosine_min", gate),
        (Metric.COSINE_MEAN, "cosine_mean", mean_gate),
    ):
        before, now = (getattr(parity.whole, name) for parity in (old.parity, new.parity))
        noise, outcome = (1 - limit) / 10, Outcome.SAME
        if 1 - now > max(2 * (1 - before), noise):
            outcome = Outcome.WORSE
        elif 1 - before > max(2 * (1 - now), noise):
            outcome = Outcome.BETTER
        yield MetricChange(_name(new), metric, before, now, noise, outcome)


def _latencies(old: ModelReport, new: ModelReport, metric: Metric) -> Iterator[MetricChange]:
    """Compare the median, or its ratio to the reference, of all timings that both reports have."""
    rows = {(one.scope, one.batch, one.cuda_graph): one for one in old.latency}
    for now in new.latency:
        if before := rows.get((now.scope, now.batch, now.cuda_graph)):
            name = "median_ms" if metric is Metric.MEDIAN else "ratio"
            noise = max(MIN_LATENCY_NOISE, math.hypot(_interval(before), _interval(now)))
            found = _cost(new, metric, getattr(before, name), getattr(now, name), noise)
            yield replace(found, batch=now.batch, scope=now.scope, cuda_graph=now.cuda_graph)


def _interval(latency: Latency) -> float:
    """Half the 95 % interval of a median as a fraction: its own, or that of the ratio over turns, which shows drift."""
    own = 1.96 * 1.2533 * latency.variation / math.sqrt(latency.runs)  # of the median of n normal samples
    return max(own, (latency.ratio_high - latency.ratio_low) / 2 / latency.ratio)


def _resources(old: ModelReport, new: ModelReport) -> Iterator[MetricChange]:
    """Compare cold start, memory and energy of the same batch size and meter."""
    for metric, (part, name, noise) in _RESOURCES.items():
        before, now = getattr(old, part), getattr(new, part)
        alike = all(getattr(before, key, None) == getattr(now, key, None) for key in ("batch", "source"))
        if alike and getattr(before, name, None) and getattr(now, name, None):
            yield _cost(new, metric, getattr(before, name), getattr(now, name), noise)


def _cost(model: ModelReport, metric: Metric, old: float, new: float, noise: float) -> MetricChange:
    """Compare a figure of which less is better: the bounds are a factor of 1 + noise in either direction."""
    outcome = Outcome.WORSE if new > old else Outcome.BETTER
    if 1 / (1 + noise) <= new / old <= 1 + noise:
        outcome = Outcome.SAME
    return MetricChange(_name(model), metric, old, new, noise, outcome)
