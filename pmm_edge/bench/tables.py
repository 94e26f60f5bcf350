"""What a bench found, in one sentence."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pmm_edge.bench.report import BenchReport, Change, Closeness, Latency, ModelReport, Scope
from pmm_edge.files import with_tilde


@dataclass(frozen=True)
class Verdict:
    """The answer, before any figure."""

    state: Literal["passes", "fails", "partial"]
    sentence: str


def verdict(report: BenchReport) -> Verdict:
    """Whether the models may ship; where not, the first gate that failed and how many more did."""
    if not report.complete:
        return Verdict("partial", f"Interrupted: {_so_far(report)}.")
    if not report.failures:
        return Verdict("passes", f"{_all_models(report)} against {Path(report.reference.path).name}{_shown(report)}.")
    return Verdict("fails", f"{_failing(report)}.")


def named(report: BenchReport) -> list[tuple[str, ModelReport]]:
    """The reference and the models under what tables call them: the file's name, the path where two share one."""
    models = (report.reference, *report.models)
    shared = Counter(Path(model.path).name for model in models)
    found = [Path(model.path).name if shared[Path(model.path).name] == 1 else model.path for model in models]
    unique = [name if found.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(found)]
    return list(zip(unique, models, strict=True))


def _all_models(report: BenchReport) -> str:
    if len(report.models) == 1:
        return f"{Path(report.models[0].path).name} holds its gates"
    return f"All {len(report.models)} models hold their gates"


def _shown(report: BenchReport) -> str:
    """What they were seen to do, in the figure that says most, of the model that moved most."""
    changes = [model.retrieval_change for model in report.models if model.retrieval_change]
    cosines = [model.parity.whole.cosine_min for model in report.models if model.parity]
    if changes:
        moved = 100 * max(abs(change.mAP.difference) for change in changes)
        hits = max(len(change.first_hits) for change in changes)
        most = "at most " if len(changes) > 1 else ""
        return f": mAP moves by {most}{moved:.2f} points, {most}{hits:,} of {changes[0].queries:,} first hits change"
    return f": least cosine {min(cosines):.6f}" if cosines else ""


def _failing(report: BenchReport) -> str:
    (reference, judge), *models = named(report)
    if judge.failures:
        return f"The reference {reference} fails: {judge.failures[0]}"
    failing = [(name, model) for name, model in models if model.failures]
    (name, first), total = failing[0], len(report.failures)
    who = f"{len(failing)} of {len(report.models)} models {'fails' if len(failing) == 1 else 'fail'}"
    more = f" (and {total - 1} more {'failure' if total == 2 else 'failures'})" if total > 1 else ""
    return f"{who}: {name} {first.failures[0]}{more}"


def _so_far(report: BenchReport) -> str:
    if report.failures:
        return f"not everything was measured, and already {_failing(report)[0].lower()}{_failing(report)[1:]}"
    return "not everything was measured; nothing has failed by then"


NONE = "–"
"""In a cell: not measured."""


@dataclass(frozen=True)
class Table:
    """Rows of text under columns. The first cell names the row; a cell may break where it has a newline."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def terminal_tables(report: BenchReport) -> list[Table]:
    """What fits 80 columns and is worth a look each time; the invariants only where one is broken."""
    broken = any(not invariant.held for model in _all(report) for invariant in model.invariants)
    found = [
        parity_table(report),
        invariant_table(report) if broken else None,
        retrieval_table(report),
        latency_table(report, "model"),
        latency_table(report, "end to end"),
        stream_table(report),
        cost_table(report),
    ]
    return [table for table in found if table]


def model_table(report: BenchReport) -> Table:
    """For each model: what it is and what it runs on."""
    rows = []
    for name, model in named(report):
        compute = model.compute
        rows.append(
            (
                name,
                model.precision,
                f"{model.backend} {model.device}",
                mebibytes(model.file_bytes),
                f"{model.embedding_size:,}",
                f"{compute.gflops:.2f}" if compute else NONE,
                f"{compute.parameters / 1e6:.2f}" if compute else NONE,
                result(report, model),
            )
        )
    columns = (
        "model",
        "type",
        "runs on",
        "file\nMiB",
        "embedding",
        "GFLOPs\nan image",
        "parameters\nmillion",
        "result",
    )
    return Table("models", columns, rows)


def parity_table(report: BenchReport) -> Table:
    """For each model: cosine to the reference's embeddings and the largest difference."""
    rows = [
        (name, *closeness_cells(model.parity.whole if model.parity else None), result(report, model))
        for name, model in named(report)
    ]
    columns = ("model", "cosine\nmin", "cosine\n1 %", "cosine\nmean", "largest\nrelative", "result")
    return Table(f"parity on {report.images:,} images of {with_tilde(report.data)}", columns, rows)


def stage_table(report: BenchReport) -> Table | None:
    """For each stage's slice of the embedding alone, cosine least and mean; None where no embedding has stages."""
    stages = list(dict.fromkeys(stage for model in report.models if model.parity for stage in model.parity.stages))
    if not stages:
        return None
    rows = []
    for name, model in named(report)[1:]:
        own = model.parity.stages if model.parity else {}
        cells = [closeness_cells(own.get(stage)) for stage in stages]
        rows.append((name, *(least if least == NONE else f"{least}\n{mean}" for least, _, mean, _ in cells)))
    return Table("cosine of each stage's slice, least and mean", ("model", *stages), rows)


def invariant_table(report: BenchReport) -> Table | None:
    """For each model what every network must hold; None where nothing was checked."""
    checked = list(dict.fromkeys(invariant.name for model in _all(report) for invariant in model.invariants))
    if not checked:
        return None
    rows = []
    for name, model in named(report):
        held = {invariant.name: "holds" if invariant.held else "broken" for invariant in model.invariants}
        rows.append((name, *(held.get(invariant, NONE) for invariant in checked)))
    return Table("invariants", ("model", *(name.replace(" ", "\n") for name in checked)), rows)


def retrieval_table(report: BenchReport) -> Table | None:
    """mAP, Rank-1 and mINP, each with the change in points and its 95 % interval; None where none was judged."""
    if not any(model.retrieval for model in _all(report)):
        return None
    rows = []
    for name, model in named(report):
        own, change = model.retrieval, model.retrieval_change
        rows.append(
            (
                name,
                _share(own.mAP if own else None, change.mAP if change else None),
                _share(own.rank1 if own else None, change.rank1 if change else None),
                _share(own.mINP if own else None, change.mINP if change else None),
                f"{len(change.first_hits):,}" if change else NONE,
            )
        )
    queries = next((model.retrieval_change.queries for model in report.models if model.retrieval_change), None)
    title = "retrieval in %, change in points and its 95 % interval"
    return Table(
        f"{title}, {queries:,} queries" if queries else title,
        ("model", "mAP", "Rank-1", "mINP", "hits\nchanged"),
        rows,
    )


def latency_table(report: BenchReport, scope: Scope, full: bool = False) -> Table | None:
    """For each batch size and model the time of a batch and its ratio to the reference's; None where not measured.

    Args:
        report: what was measured.
        scope: `model` or `end to end`.
        full: with p99, spread, the number of runs and the GPU's own time; too wide for a terminal.
    """
    timed = [
        (latency.batch, latency.cuda_graph, number, name, latency)
        for number, (name, model) in enumerate(named(report))
        for latency in model.latency
        if latency.scope == scope
    ]
    if not timed:
        return None
    rows = []
    for batch, cuda_graph, _, name, latency in sorted(timed, key=lambda entry: entry[:3]):
        rows.append((f"{name}, CUDA graph" if cuda_graph else name, str(batch), *_latency_cells(latency, full)))
    extra = ("p99\nms", "GPU\nms", "spread\n%", "runs") if full else ()
    columns = ("model", "batch", "median\nms", "p90\nms", *extra, "images\na second", "ratio")
    what = "model only" if scope == "model" else "from image files"
    return Table(f"latency of a batch, {what}; ratio to the reference, 95 % interval", columns, rows)


def stream_table(report: BenchReport) -> Table | None:
    """Single crops from several clients at once; None where not measured."""
    rows = []
    for name, model in named(report):
        if own := model.stream:
            times = tuple(milliseconds(value) for value in (own.median_ms, own.p90_ms, own.p99_ms))
            rows.append((name, str(own.clients), f"{own.crops_per_second:,.0f}", f"{own.mean_batch:.1f}", *times))
    columns = ("model", "clients", "crops\na second", "mean\nbatch", "median\nms", "p90\nms", "p99\nms")
    return Table("single crops from several clients, gathered into batches", columns, rows) if rows else None


def cost_table(report: BenchReport) -> Table | None:
    """Size, start, memory, the machine's share that is reached, energy: the columns that were measured.

    That energy could not be measured is said where a cold start was: a machine without a meter is common.
    """
    cells = {
        "file\nMiB": lambda model: mebibytes(model.file_bytes),
        "first\nembed. ms": lambda model: (start := model.cold_start) and milliseconds(start.first_embedding_ms),
        "memory\nMiB": lambda model: (start := model.cold_start) and _count(start.peak_memory_mib),
        "GPU mem.\nMiB": lambda model: (start := model.cold_start) and _count(start.peak_gpu_memory_mib),
        "of peak\n%": lambda model: (own := model.compute) and _percent(own.share_of_peak),
        "J an\nembed.": _energy,
    }
    columns = [
        (heading, [cell(model) for model in _all(report)])
        for heading, cell in cells.items()  # a figure that no model has gets no column
    ]
    measured = [(heading, column) for heading, column in columns if any(column)]
    if len(measured) == 1:  # the file's size alone
        return None
    rows = [
        (name, *(column[number] or NONE for _, column in measured)) for number, (name, _) in enumerate(named(report))
    ]
    return Table("cost", ("model", *(heading for heading, _ in measured)), rows)


def environment_table(report: BenchReport) -> Table:
    """What was measured on, and when."""
    rows = [*report.environment.items(), ("data", with_tilde(report.data)), ("data SHA-256", report.data_sha256)]
    rows.append(("measured", report.created))
    return Table("environment", ("what", "value"), rows)


def result(report: BenchReport, model: ModelReport) -> str:
    """`fails`; `reference` for a sound one; `passes`; `not judged` where nothing was compared with the reference."""
    if model.failures:
        return "fails"
    if model is report.reference:
        return "reference"
    return "passes" if model.parity else "not judged"


def closeness_cells(closeness: Closeness | None) -> tuple[str, str, str, str]:
    """Cosine least, 1st percentile and mean; largest relative difference."""
    if closeness is None:
        return NONE, NONE, NONE, NONE
    cosines = (closeness.cosine_min, closeness.cosine_p1, closeness.cosine_mean)
    least, first, mean = (_finite(value, ".6f") for value in cosines)
    return least, first, mean, _finite(closeness.largest_relative, ".1e")


def milliseconds(value: float) -> str:
    """Three digits that say something: `7.47`, `51.1`, `1,204`."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def mebibytes(count: int) -> str:
    """Bytes as MiB."""
    return f"{count / 2**20:,.1f}"


def points(change: Change) -> str:
    """`-0.12 (-0.30…+0.05)`: a change in points of 100 and its interval."""
    return f"{_points(change.difference)} ({_points(change.low)}…{_points(change.high)})"


def _points(value: float) -> str:
    return f"{100 * value + 0.0:+.2f}".replace("-0.00", "+0.00")


def _share(value: float | None, change: Change | None) -> str:
    if value is None:
        return NONE
    own = f"{100 * value:.2f}"
    return f"{own} {points(change).replace(' ', chr(10), 1)}" if change else own


def _latency_cells(latency: Latency, full: bool) -> tuple[str, ...]:
    gpu = NONE if latency.gpu_ms is None else milliseconds(latency.gpu_ms)
    extra = (milliseconds(latency.p99_ms), gpu, _percent(latency.variation), f"{latency.runs:,}") if full else ()
    ratio = _finite(latency.ratio, ".2f")
    if latency.ratio_low != latency.ratio_high:  # the reference's is 1 without an interval
        ratio += f" {latency.ratio_low:.2f}–{latency.ratio_high:.2f}"
    return (
        milliseconds(latency.median_ms),
        milliseconds(latency.p90_ms),
        *extra,
        f"{latency.images_per_second:,.0f}",
        ratio,
    )


def _energy(model: ModelReport) -> str:
    if model.energy:
        return f"{model.energy.joules_per_embedding:.3g}"
    return "not\nmeasured" if model.cold_start else ""


def _percent(value: float | None) -> str:
    return "" if value is None else _finite(100 * value, ".0f")


def _count(value: float | None) -> str:
    return "" if value is None else _finite(value, ",.0f")


def _finite(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "not finite"


def _all(report: BenchReport) -> tuple[ModelReport, ...]:
    return (report.reference, *report.models)


_MARKS = {"passes": "✅", "fails": "❌", "partial": "⚠️"}


def markdown(report: BenchReport) -> str:
    """Verdict, failures, the terminal's tables, the models, and a line about the machine.

    What comes from files and paths is escaped: it links to nothing, mentions nobody and starts no HTML.
    """
    found = verdict(report)
    parts = [f"### {_MARKS[found.state]} pmm bench: {found.state}", escaped(found.sentence)]
    parts += [_bullets(_failures(report)), _bullets([f"⚠️ {escaped(warning)}" for warning in report.warnings])]
    parts += [table_text(table) for table in terminal_tables(report)]
    parts.append(table_text(model_table(report), folded=True))
    about = [f"{key} {value}" for key, value in report.environment.items()]
    parts.append(f"<sub>{escaped('; '.join([*about, report.created]))}</sub>")
    return "\n\n".join(part for part in parts if part) + "\n"


def table_text(table: Table, folded: bool = False) -> str:
    """A table under its title; `folded` behind a line that opens it."""
    head = "| " + " | ".join(_cell(column) for column in table.columns) + " |"
    rule = "| :--- |" + " ---: |" * (len(table.columns) - 1)
    rows = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in table.rows]
    body = "\n".join([head, rule, *rows])
    title = escaped(table.title[:1].upper() + table.title[1:])
    if folded:
        return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"
    return f"**{title}**\n\n{body}"


def escaped(text: str) -> str:
    r"""Text that Markdown shows as it is.

    Punctuation gets a backslash. `@name` and `#1` would still become a mention and a link, which GitHub looks for
    after rendering: a word joiner, which nobody sees, keeps them apart.
    """
    flat = re.sub(r"\s+", " ", text)
    return re.sub(r"(?<=[@#])(?=\w)", "\u2060", re.sub(r"([\\`*_{}\[\]<>|~&!#@$])", r"\\\1", flat))


def _failures(report: BenchReport) -> list[str]:
    lines = []
    for name, model in named(report):
        lines += [f"**{escaped(name)}** {escaped(failure)}" for failure in model.failures]
        if model.likely_cause:
            lines.append(f"**{escaped(name)}** likely cause: {escaped(model.likely_cause)}")
        if model.departure:
            lines.append(f"**{escaped(name)}** {escaped(model.departure.words)}")
    return lines


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _cell(text: str) -> str:
    return escaped(text.replace("\n", " "))
