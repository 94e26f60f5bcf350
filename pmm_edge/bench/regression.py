"""`pmm bench --compare`: what became better or worse between two reports, beyond noise (docs/regressions.md)."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pmm_edge.bench.report import BenchReport, Change, Decision, Latency, ModelReport, Scope, read_report
from pmm_edge.bench.tables import Table, describe_failure, milliseconds
from pmm_edge.spec import Distance, RetrievalFigures

Unit = Literal["points", "cosine", "factor"]
"""Points and cosines are better if higher, factors (times, memory, energy, sizes, false matches) if lower."""
# Path in a model's report, label, unit, what must be the same in both reports, minimum noise, scale.
FIGURES: tuple[tuple[str, str, Unit, tuple[str, ...], float, float], ...] = (
    ("retrieval.mAP", "mAP", "points", ("images", "reference"), 0.01, 100),
    ("retrieval.rank1", "Rank-1", "points", ("images", "reference"), 0.01, 100),
    ("retrieval.mINP", "mINP", "points", ("images", "reference"), 0.01, 100),
    ("decisions.thresholds.fmr_ratio", "false-match rate ratio", "factor", ("images", "reference"), 0.05, 1),
    ("decisions.thresholds.tmr", "true-match rate, %", "points", ("images", "reference"), 0.01, 100),
    ("parity.whole.cosine_min", "minimum cosine", "cosine", ("images",), 0, 1),
    ("parity.whole.cosine_mean", "mean cosine", "cosine", ("images",), 0, 1),
    ("latency.median_ms", "median, ms", "factor", ("machine",), 0.05, 1),
    ("cold_start.first_embedding_ms", "first embedding, ms", "factor", ("machine",), 0.25, 1),
    ("cold_start.peak_memory_mib", "peak memory, MiB", "factor", ("machine",), 0.10, 1),
    ("energy.joules_per_embedding", "J per embedding", "factor", ("machine",), 0.10, 1),
    ("file_bytes", "file, MiB", "factor", (), 0.01, 2**-20),
)
_MACHINE = ("cpu", "instruction_set", "board", "cores", "usable_cores", "power_mode", "thread_settings")
"""Parts of the environment. Software versions may differ, as they are what a comparison is about."""
_IS_WORSE = {
    "points": lambda old, new, noise: old - new > noise,
    "cosine": lambda old, new, noise: 1 - new > max(2 * (1 - old), noise),
    "factor": lambda old, new, noise: new > old * (1 + noise),
}

Outcome = Literal["worse", "better", "same"]
NoteKind = Literal[
    "interrupted", "model missing", "model fails", "model passes", "model new",
    "other images", "other reference", "other machine", "other engine", "not measured",
]  # fmt: skip


@dataclass(frozen=True)
class MetricChange:
    """One figure of one model in both reports; `noise` is in points of 100, in 1 - cosine, or a fraction of `old`."""

    model: str
    figure: str
    label: str
    unit: Unit
    old: float
    new: float
    noise: float
    outcome: Outcome
    batch: int | None = None
    scope: Scope | None = None
    distance: Distance | None = None
    nominal: float | None = None
    """False-match rate of the threshold of a decision."""

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """Name, old, new, change and noise for a table."""
        name, old, new, noise = self.label, self.old, self.new, self.noise
        if self.scope:
            name = f"batch {self.batch}{', end to end' if self.scope == 'end to end' else ''}, {name}"
        elif self.distance:
            name = f"{self.distance} {self.nominal:g}, {name}"
        if self.unit == "points":
            return name, f"{old:.2f}", f"{new:.2f}", f"{new - old:+.2f} points", f"± {noise:.2f} points"
        if self.unit == "cosine":
            change = f"1-c {1 - old:.0e} -> {1 - new:.0e}"
            return name, f"{old:.6f}", f"{new:.6f}", change, f"x2, to {noise:.0e}"
        before, now = (f"{value:.3g}" if abs(value) < 1 else milliseconds(value) for value in (old, new))
        return name, before, now, f"x{new / old:.2f}", f"± {100 * noise:.0f} %"

    @property
    def sentence(self) -> str:
        name, old, new, change, noise = self.cells
        return f"{self.model}: {name} is {self.outcome}: {old} -> {new} ({change}, noise {noise})"


@dataclass(frozen=True)
class Note:
    """A difference that is not a figure."""

    kind: NoteKind
    sentence: str


@dataclass(frozen=True)
class Comparison:
    """Two reports side by side."""

    findings: list[MetricChange]
    notes: list[Note]

    @property
    def regressions(self) -> list[MetricChange | Note]:
        """Everything that became worse; empty if the comparison passes."""
        worse = [note for note in self.notes if note.kind in ("interrupted", "model missing", "model fails")]
        return [*worse, *(finding for finding in self.findings if finding.outcome == "worse")]


def compare_reports(old: Path, new: Path) -> Comparison:
    """Compare two bench.json files; models are matched by file name and precision.

    Accuracy is compared on the same images only, retrieval and decisions with the same reference, times on the same
    machine. Raises DataError for a report that cannot be read.
    """
    before, now = read_report(old), read_report(new)
    gpus = {before.environment.gpu, now.environment.gpu} - {None}  # a bench that used no GPU names none
    machine = [[getattr(report.environment, name) for name in _MACHINE] for report in (before, now)]
    same = {
        "images": before.data_sha256 == now.data_sha256,
        "reference": before.reference.sha256 == now.reference.sha256,
        "machine": machine[0] == machine[1] and len(gpus) < 2,
    }
    machines = f"the machines differ ({before.environment.cpu}; {now.environment.cpu})"
    general: tuple[tuple[bool, NoteKind, str], ...] = (
        (now.complete, "interrupted", f"{new} is the report of an interrupted bench"),
        (same["images"], "other images", "the images differ: accuracy is not compared"),
        (same["reference"], "other reference", "the references differ: retrieval and decisions are not compared"),
        (same["machine"], "other machine", f"{machines}: times, memory and energy are not compared"),
    )
    notes, findings = [Note(kind, text) for holds, kind, text in general if not holds], list[MetricChange]()
    olds, news = _by_name(before), _by_name(now)
    notes += [Note("model missing", f"{key[0]} is missing in the new report") for key in olds if key not in news]
    for key, model in news.items():
        if (was := olds.get(key)) is None:
            notes.append(Note("model new", f"{key[0]} is new{' and fails' if model.failures else ''}"))
            continue
        notes += _model_notes(was, model)
        findings += _changes(was, model, {name for name, holds in same.items() if holds})
    return Comparison(findings, notes)


def comparison_table(comparison: Comparison) -> Table:
    """The figures that changed beyond noise, worse ones first."""
    rows = []
    for outcome in ("worse", "better"):
        for one in comparison.findings:
            if one.outcome == outcome:
                name, old, new, change, noise = one.cells
                rows.append((f"{one.model}: {name}", old, new, f"{change}\n{noise}", outcome))
    title = f"{len(comparison.findings)} figures compared, {len(rows)} changed beyond noise"
    return Table(title, ("model and figure", "old", "new", "change\nnoise", "result"), rows)


def _by_name(report: BenchReport) -> dict[tuple[str, str, int], ModelReport]:
    """Models by file name and precision, numbered where several share both; the reference's number is -1."""
    found, seen = {("", "", -1): report.reference}, Counter[tuple[str, str]]()
    for model in report.models:
        name, precision = Path(model.path).name, model.precision
        found[name, precision, seen[name, precision]] = model
        seen[name, precision] += 1
    return found


def _model_notes(old: ModelReport, new: ModelReport) -> Iterator[Note]:
    name, failures = Path(new.path).name, "; ".join(map(describe_failure, new.failures))
    engine, engine_before = (f"{model.backend} on {model.device}" for model in (new, old))
    if failures and not old.failures:
        yield Note("model fails", f"{name} passed and fails now: {failures}")
    if old.failures and not failures:
        yield Note("model passes", f"{name} failed and passes now")
    if engine != engine_before:
        yield Note("other engine", f"{name} ran with {engine_before}, now {engine}")
    parts = ("parity", "retrieval", "decisions", "latency", "cold_start", "energy")
    if lost := [part for part in parts if getattr(old, part) and not getattr(new, part)]:
        yield Note("not measured", f"{name} was measured before, and not now, for {', '.join(lost)}")


def _changes(old: ModelReport, new: ModelReport, same: set[str]) -> Iterator[MetricChange]:
    """Compare the figures of all parts that both reports have for the same batch, scope and meter."""
    for path, label, unit, needed, least, scale in FIGURES:
        *parents, name = path.split(".")
        olds, news = _parts(old, parents), _parts(new, parents)
        for key in [key for key in news if key in olds and same >= set(needed)]:
            before, now = getattr(olds[key], name), getattr(news[key], name)
            if unit == "cosine":  # a tenth of what the stricter gate allows
                gates = ("min_cosine", "min_mean_cosine")[: 1 + (name == "cosine_mean")]
                noise = (1 - max(getattr(model.gates, gate) for model in (old, new) for gate in gates)) / 10
            else:
                spreads = _spread(old, olds[key], name), _spread(new, news[key], name)
                noise = max(least, scale * math.hypot(*spreads))
            before, now = scale * before, scale * now
            worse, better = _IS_WORSE[unit](before, now, noise), _IS_WORSE[unit](now, before, noise)
            outcome: Outcome = "worse" if worse else "better" if better else "same"
            named = ("batch", "scope", "distance", "nominal") if isinstance(news[key], Latency | Decision) else ()
            where = {each: getattr(news[key], each, None) for each in named}
            yield MetricChange(Path(new.path).name, path, label, unit, before, now, noise, outcome, **where)


def _parts(model: ModelReport, parents: list[str]) -> dict[tuple[Any, ...], Any]:
    """Return the parts of a report under a path that were measured, by what must be the same to compare them."""
    part: Any = model
    for name in parents:
        part = getattr(part, name, None)
    parts = part if isinstance(part, list) else [] if part is None else [part]
    same = ("batch", "scope", "source", "distance", "nominal")
    return {tuple(getattr(one, name, None) for name in same): one for one in parts}


def _spread(model: ModelReport, part: Any, name: str) -> float:
    """Half the 95 % interval of a figure, 0 where it has none; of a time or ratio as a fraction of it."""
    if isinstance(part, Latency):
        # Its own, for the median of n normal samples, or that of its ratio over turns, which shows drift.
        own = 1.96 * 1.2533 * part.variation / math.sqrt(part.runs)
        return max(own, (part.ratio_high - part.ratio_low) / 2 / part.ratio)
    if isinstance(part, Decision):
        change = part.tmr_change
        if name == "tmr":
            return (change.high - change.low) / 2
        return (part.fmr_ratio_high - part.fmr_ratio_low) / 2 / part.fmr_ratio
    if isinstance(part, RetrievalFigures):
        found: Change | None = getattr(model.retrieval_change, name, None)
        return (found.high - found.low) / 2 if found else 7e-4  # a reference has no interval: 0.1 points for both
    return 0.0
