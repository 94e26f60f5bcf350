"""Everything that people read of a bench: verdict, sentences, tables for terminal and HTML, and Markdown."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pmm_edge.bench.report import BenchReport, Change, Closeness, Environment, Latency, ModelReport, Scope
from pmm_edge.bench.sentences import describe_cause, describe_departure, describe_failure, describe_warning
from pmm_edge.files import with_tilde

NOT_MEASURED = "–"


@dataclass(frozen=True)
class Verdict:
    """The result in one word and one sentence."""

    state: Literal["passes", "fails", "partial"]
    sentence: str


@dataclass(frozen=True)
class Table:
    """Rows of text under columns. The first cell names the row; a newline is a line break."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def verdict(report: BenchReport) -> Verdict:
    """Say whether all models passed; if not, the first failure and how many more there are."""
    failures = [f"{name} {describe_failure(failure)}" for name, model in named(report) for failure in model.failures]
    failed = f"{failures[0]} (and {len(failures) - 1} more)" if len(failures) > 1 else "".join(failures)
    if not report.complete:
        return Verdict("partial", f"The bench was interrupted: {failed or 'no failure so far'}.")
    if failures:
        return Verdict("fails", f"{failed}.")
    found = f"All {len(report.models)} models pass" if len(report.models) > 1 else "The model passes"
    changes = [model.retrieval_change for model in report.models if model.retrieval_change]
    cosines = [model.parity.whole.cosine_min for model in report.models if model.parity]
    if changes:
        moved, hits = max(abs(one.mAP.difference) for one in changes), max(len(one.first_hits) for one in changes)
        found += f": mAP changes by at most {100 * moved:.2f} points, the first match of at most {hits:,} of"
        found += f" {changes[0].queries:,} queries"
    elif cosines:
        found += f": the minimum cosine is {min(cosines):.6f}"
    return Verdict("passes", f"{found}.")


def named(report: BenchReport) -> list[tuple[str, ModelReport]]:
    """Return reference and models with their display names: the file name, or the path where names are equal."""
    models = (report.reference, *report.models)
    shared = Counter(Path(model.path).name for model in models)
    found = [Path(model.path).name if shared[Path(model.path).name] == 1 else model.path for model in models]
    unique = [name if found.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(found)]
    return list(zip(unique, models, strict=True))


def failure_lines(model: ModelReport) -> list[str]:
    """One sentence for each failure of a model, then its likely cause and the layer where it starts."""
    lines = [describe_failure(failure) for failure in model.failures]
    if model.likely_cause:
        lines.append(f"likely cause: {describe_cause(model.likely_cause)}")
    if model.departure:
        lines.append(describe_departure(model.departure))
    return lines


def terminal_tables(report: BenchReport) -> list[Table]:
    """Return the tables for a terminal of 80 columns; invariants only if one is broken."""
    broken = any(not invariant.held for _, model in named(report) for invariant in model.invariants)
    found = [
        parity_table(report),
        invariant_table(report) if broken else None,
        retrieval_table(report),
        latency_table(report, "model"),
        latency_table(report, "end to end"),
        cost_table(report),
    ]
    return [table for table in found if table]


def model_table(report: BenchReport) -> Table:
    """What each model is and where it runs."""
    rows = [
        (
            name,
            model.precision,
            f"{model.backend} {model.device}",
            mebibytes(model.file_bytes),
            f"{model.embedding_size:,}",
            _cell(model.gflops, ".2f"),
            _cell(model.parameters and model.parameters / 1e6, ".2f"),
            result(report, model),
        )
        for name, model in named(report)
    ]
    sizes = ("file\nMiB", "embedding\nsize", "GFLOPs\nper image", "parameters\nmillion")
    return Table("Models", ("model", "precision", "runs on", *sizes, "result"), rows)


def parity_table(report: BenchReport) -> Table:
    """Cosine similarity of each model's embeddings to the reference's, and the largest difference."""
    rows = [
        (name, *_closeness(model.parity.whole if model.parity else None), result(report, model))
        for name, model in named(report)
    ]
    columns = ("model", "cosine\nmin", "cosine\n1 %", "cosine\nmean", "largest\nrelative", "result")
    return Table(f"Parity on {report.images:,} images of {with_tilde(report.data)}", columns, rows)


def stage_table(report: BenchReport) -> Table | None:
    """Cosine, minimum and mean, of each stage's slice of the embedding; None if no embedding has stages."""
    stages = list(dict.fromkeys(stage for model in report.models if model.parity for stage in model.parity.stages))
    if not stages:
        return None
    rows = []
    for name, model in named(report)[1:]:
        cells = [_closeness(model.parity.stages.get(stage) if model.parity else None) for stage in stages]
        rows.append((name, *(NOT_MEASURED if low == NOT_MEASURED else f"{low}\n{mean}" for low, _, mean, _ in cells)))
    return Table("Cosine of each stage, minimum and mean", ("model", *stages), rows)


def invariant_table(report: BenchReport) -> Table | None:
    """Which invariants hold; None if none was checked."""
    checked = list(dict.fromkeys(invariant.name for _, model in named(report) for invariant in model.invariants))
    rows = []
    for name, model in named(report):
        held = {invariant.name: "holds" if invariant.held else "broken" for invariant in model.invariants}
        rows.append((name, *(held.get(invariant, NOT_MEASURED) for invariant in checked)))
    columns = ("model", *(name.value.replace(" ", "\n") for name in checked))
    return Table("Invariants", columns, rows) if checked else None


def retrieval_table(report: BenchReport) -> Table | None:
    """mAP, Rank-1 and mINP, each with the change and its interval; None if retrieval was not evaluated."""
    if not any(model.retrieval for _, model in named(report)):
        return None
    rows = []
    for name, model in named(report):
        own, change = model.retrieval, model.retrieval_change
        pairs = [(getattr(own, metric, None), getattr(change, metric, None)) for metric in ("mAP", "rank1", "mINP")]
        rows.append(
            (name, *(_metric(*pair) for pair in pairs), _cell(len(change.first_hits) if change else None, ",d"))
        )
    queries = next((model.retrieval_change.queries for model in report.models if model.retrieval_change), None)
    title = "Retrieval in %, with the change in points and its 95 % interval"
    columns = ("model", "mAP", "Rank-1", "mINP", "changed\nmatches")
    return Table(f"{title}, {queries:,} queries" if queries else title, columns, rows)


def latency_table(report: BenchReport, scope: Scope, full: bool = False) -> Table | None:
    """Time per batch and its ratio to the reference; None if not measured.

    `full` adds p99, GPU time, variation and the number of runs, which do not fit a terminal.
    """
    timed = [
        (latency.batch, latency.cuda_graph, number, name, latency)
        for number, (name, model) in enumerate(named(report))
        for latency in model.latency
        if latency.scope == scope
    ]
    rows = [
        (f"{name}, CUDA graph" if cuda_graph else name, str(batch), *_latency(latency, full))
        for batch, cuda_graph, _, name, latency in sorted(timed, key=lambda entry: entry[:3])
    ]
    extra = ("p99\nms", "GPU\nms", "variation\n%", "runs") if full else ()
    columns = ("model", "batch\nsize", "median\nms", "p90\nms", *extra, "images\nper s", "ratio")
    what = "model only" if scope == "model" else "from image files"
    return Table(f"Latency per batch, {what}; ratio to the reference, 95 % interval", columns, rows) if rows else None


def cost_table(report: BenchReport) -> Table | None:
    """File size, cold start, memory and energy: only the columns that were measured; None if there are none.

    Where a cold start was measured, missing energy is stated: many machines have no meter.
    """
    rows = []
    for name, model in named(report):
        start = model.cold_start
        first = milliseconds(start.first_embedding_ms) if start else NOT_MEASURED
        memory = [_cell(getattr(start, peak, None), ",.0f") for peak in ("peak_memory_mib", "peak_gpu_memory_mib")]
        energy = (
            f"{model.energy.joules_per_embedding:.3g}" if model.energy else "not\nmeasured" if start else NOT_MEASURED
        )
        rows.append((name, mebibytes(model.file_bytes), first, *memory, energy))
    columns = ("model", "file\nMiB", "first\nembed. ms", "memory\nMiB", "GPU mem.\nMiB", "J per\nembed.")
    kept = [number for number in range(len(columns)) if {row[number] for row in rows} != {NOT_MEASURED}]
    if len(kept) == 2:  # only name and file size
        return None
    picked = [tuple(row[number] for number in kept) for row in (columns, *rows)]
    return Table("Size, cold start, memory, energy", picked[0], picked[1:])


def environment_table(report: BenchReport) -> Table:
    """The machine, the data and the time."""
    rows = [*environment_rows(report.environment), ("data", with_tilde(report.data))]
    rows += [("data SHA-256", report.data_sha256), ("measured", report.created)]
    return Table("Environment", ("", "value"), rows)


def environment_rows(environment: Environment) -> list[tuple[str, str]]:
    """Name and value of each part of the environment that is known."""
    e = environment
    clocks = [f"{e.cpu_clocks.min_mhz} to {e.cpu_clocks.max_mhz} MHz"] if e.cpu_clocks else []
    clocks += [f"governor {', '.join(e.governors)}"] if e.governors else []
    gpu_clocks = f"{e.gpu_clocks.min_mhz} to {e.gpu_clocks.max_mhz} MHz" if e.gpu_clocks else ""
    threads = [f"{name}={value}" for name, value in e.thread_settings.items()]
    threads += [f"{backend} {count or 'default'}" for backend, count in e.threads.items()]
    rows = {
        "processor": e.cpu,
        "instruction set": e.instruction_set,
        "board": e.board,
        "cores": f"{e.cores}" if e.usable_cores == e.cores else f"{e.usable_cores:g} of {e.cores}",
        "threads": ", ".join(threads),
        "load before": None if e.load is None else f"{e.load:.2f}",
        "CPU clocks": ", ".join([*clocks, *(["locked"] if e.clocks_locked else [])]),
        "Jetson Linux": e.l4t,
        "power mode": e.power_mode,
        "GPU": e.gpu and (f"{e.gpu}, driver {e.driver}" if e.driver else e.gpu),
        "GPU clocks": f"{gpu_clocks or 'not measured'}, maximum {e.gpu_max_mhz} MHz" if e.gpu_max_mhz else gpu_clocks,
        "system": e.os,
        "Python": e.python,
        **e.versions,
    }
    return [(name, value) for name, value in rows.items() if value]


def result(report: BenchReport, model: ModelReport) -> str:
    """`fails`, `reference`, `passes`, or `not judged` if nothing was compared with the reference."""
    if model.failures:
        return "fails"
    if model is report.reference:
        return "reference"
    return "passes" if model.parity else "not judged"


def fastest(model: ModelReport, scope: Scope) -> list[Latency]:
    """Return the timings of a scope by batch size; of those with and without CUDA graph, the faster one."""
    best: dict[int, Latency] = {}
    for latency in sorted(model.latency, key=lambda one: -one.median_ms):
        if latency.scope == scope:
            best[latency.batch] = latency
    return [best[batch] for batch in sorted(best)]


def milliseconds(value: float) -> str:
    """Format with three significant digits or more: `7.47`, `51.1`, `1,204`."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def mebibytes(count: int) -> str:
    """Format a number of bytes in MiB."""
    return f"{count / 2**20:,.1f}"


def points(value: float) -> str:
    """Format a fraction in points of 100 with its sign, such as `-0.12`."""
    return f"{100 * value + 0.0:+.2f}".replace("-0.00", "+0.00")


def _metric(value: float | None, change: Change | None) -> str:
    if value is None or change is None:
        return _cell(value and 100 * value, ".2f")
    return f"{100 * value:.2f} {points(change.difference)}\n({points(change.low)}…{points(change.high)})"


def _closeness(closeness: Closeness | None) -> tuple[str, str, str, str]:
    if closeness is None:
        return (NOT_MEASURED,) * 4
    cosines = (closeness.cosine_min, closeness.cosine_p1, closeness.cosine_mean)
    low, first, mean = (_finite(value, ".6f") for value in cosines)
    return low, first, mean, _cell(closeness.largest_relative, ".1e")


def _latency(latency: Latency, full: bool) -> tuple[str, ...]:
    ratio = _finite(latency.ratio, ".2f")
    if latency.ratio_low != latency.ratio_high:  # the reference's ratio to itself has no interval
        ratio += f" {latency.ratio_low:.2f}–{latency.ratio_high:.2f}"
    gpu = NOT_MEASURED if latency.gpu_ms is None else milliseconds(latency.gpu_ms)
    variation = _finite(100 * latency.variation, ".0f")
    extra = (milliseconds(latency.p99_ms), gpu, variation, f"{latency.runs:,}") if full else ()
    times = milliseconds(latency.median_ms), milliseconds(latency.p90_ms)
    return (*times, *extra, f"{latency.images_per_second:,.0f}", ratio)


def _cell(value: float | None, form: str) -> str:
    return NOT_MEASURED if value is None else _finite(value, form)


def _finite(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "not finite"


_MARKS = {"passes": "✅", "fails": "❌", "partial": "⚠️"}


def markdown(report: BenchReport) -> str:
    """Render verdict, failures, warnings and tables for a GitHub comment; text from files and paths is escaped."""
    found = verdict(report)
    lines = [f"- **{escaped(name)}** {escaped(line)}" for name, model in named(report) for line in failure_lines(model)]
    lines += [f"- ⚠️ {escaped(describe_warning(warning))}" for warning in report.warnings]
    parts = [f"### {_MARKS[found.state]} pmm bench: {found.state}", escaped(found.sentence), "\n".join(lines)]
    parts += [f"**{escaped(table.title)}**\n\n{_markdown_rows(table)}" for table in terminal_tables(report)]
    parts.append(f"<details><summary>Models</summary>\n\n{_markdown_rows(model_table(report))}\n\n</details>")
    about = [*environment_rows(report.environment), ("measured", report.created)]
    parts.append(f"<sub>{escaped('; '.join(f'{name} {value}' for name, value in about))}</sub>")
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_rows(table: Table) -> str:
    head, *rows = ["| " + " | ".join(escaped(cell) for cell in row) + " |" for row in (table.columns, *table.rows)]
    return "\n".join([head, "| :--- |" + " ---: |" * (len(table.columns) - 1), *rows])


def escaped(text: str) -> str:
    """Escape text for Markdown: on one line, without markup, mentions and issue links.

    GitHub looks for `@name` and `#1` after rendering; an invisible word joiner keeps them from becoming links.
    """
    flat = re.sub(r"\s+", " ", text)
    return re.sub(r"(?<=[@#])(?=\w)", "\u2060", re.sub(r"([\\`*_{}\[\]<>|~&!#@$])", r"\\\1", flat))
