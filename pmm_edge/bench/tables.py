"""Everything that people read of a bench: verdict, sentences, tables for terminal and HTML, and Markdown."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from pmm_edge.bench.report import BenchReport, Environment, Latency, ModelReport, Scope
from pmm_edge.bench.sentences import describe_cause, describe_departure, describe_failure, describe_warning
from pmm_edge.files import with_tilde

NOT_MEASURED = "–"


class Verdict(NamedTuple):
    """The result in one word and one sentence."""

    state: Literal["passes", "fails", "partial"]
    sentence: str


class Table(NamedTuple):
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
        moved = max(abs(one.mAP.difference) for one in changes)
        found += f": mAP changes by at most {100 * moved:.2f} points on {changes[0].queries:,} queries"
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
    rows = []
    for name, model in named(report):
        whole = model.parity.whole if model.parity else None
        cosines = (_cell(getattr(whole, f"cosine_{which}", None), ".6f") for which in ("min", "p1", "mean"))
        relative = _cell(whole.largest_relative if whole else None, ".1e")
        rows.append((name, *cosines, relative, result(report, model)))
    columns = ("model", "cosine\nmin", "cosine\n1 %", "cosine\nmean", "largest\nrelative", "result")
    return Table(f"Parity on {report.images:,} images of {with_tilde(report.data)}", columns, rows)


def stage_table(report: BenchReport) -> Table | None:
    """Cosine, minimum and mean, of each stage's slice of the embedding; None if no embedding has stages."""
    found = {name: model.parity.stages if model.parity else {} for name, model in named(report)[1:]}
    stages = list(dict.fromkeys(stage for own in found.values() for stage in own))
    rows = []
    for name, own in found.items():
        pairs = [(own[stage].cosine_min, own[stage].cosine_mean) if stage in own else None for stage in stages]
        rows.append((name, *("\n".join(_cell(one, ".6f") for one in pair or (None,)) for pair in pairs)))
    return Table("Cosine of each stage, minimum and mean", ("model", *stages), rows) if stages else None


def invariant_table(report: BenchReport) -> Table | None:
    """Which invariants hold; None if none was checked."""
    found = {name: {one.name: one.held for one in model.invariants} for name, model in named(report)}
    checked = list(dict.fromkeys(invariant for held in found.values() for invariant in held))
    words = {True: "holds", False: "broken", None: NOT_MEASURED}
    rows = [(name, *(words[held.get(invariant)] for invariant in checked)) for name, held in found.items()]
    columns = ("model", *(invariant.value.replace(" ", "\n") for invariant in checked))
    return Table("Invariants", columns, rows) if checked else None


def retrieval_table(report: BenchReport) -> Table | None:
    """mAP, Rank-1 and mINP, each with the change and its interval; None if retrieval was not evaluated."""
    if not any(model.retrieval for _, model in named(report)):
        return None
    rows, title = [], "Retrieval in %, with the change in points and its 95 % interval"
    for name, model in named(report):
        cells = []
        for metric in ("mAP", "rank1", "mINP"):
            value, change = getattr(model.retrieval, metric, None), getattr(model.retrieval_change, metric, None)
            cells.append(_cell(value and 100 * value, ".2f"))
            if change:
                cells[-1] += f" {points(change.difference)}\n({points(change.low)}…{points(change.high)})"
        rows.append((name, *cells))
    if changes := [model.retrieval_change for model in report.models if model.retrieval_change]:
        title += f", {changes[0].queries:,} queries"
    return Table(title, ("model", "mAP", "Rank-1", "mINP"), rows)


def latency_table(report: BenchReport, scope: Scope, full: bool = False) -> Table | None:
    """Time per batch and its ratio to the reference, by batch size; None if not measured.

    `full` adds p99, GPU time, variation and the number of runs, which do not fit a terminal.
    """
    timed = [(name, latency) for name, model in named(report) for latency in model.latency if latency.scope == scope]
    rows = []
    for name, one in sorted(timed, key=lambda entry: (entry[1].batch, entry[1].cuda_graph)):
        ratio = f"{one.ratio:.2f}"
        if one.ratio_low != one.ratio_high:  # the reference's ratio to itself has no interval
            ratio += f" {one.ratio_low:.2f}–{one.ratio_high:.2f}"
        gpu = NOT_MEASURED if one.gpu_ms is None else milliseconds(one.gpu_ms)
        extra = (milliseconds(one.p99_ms), gpu, f"{100 * one.variation:.0f}", f"{one.runs:,}") if full else ()
        times = milliseconds(one.median_ms), milliseconds(one.p90_ms)
        label = f"{name}, CUDA graph" if one.cuda_graph else name
        rows.append((label, str(one.batch), *times, *extra, f"{one.images_per_second:,.0f}", ratio))
    extra = ("p99\nms", "GPU\nms", "variation\n%", "runs") if full else ()
    columns = ("model", "batch\nsize", "median\nms", "p90\nms", *extra, "images\nper s", "ratio")
    what = "model only" if scope == "model" else "from image files"
    return Table(f"Latency per batch, {what}; ratio to the reference, 95 % interval", columns, rows) if rows else None


def cost_table(report: BenchReport) -> Table | None:
    """File size, cold start, memory and energy; None if neither cold start nor energy was measured."""
    rows = []
    for name, model in named(report):
        start, energy = model.cold_start, model.energy
        first = milliseconds(start.first_embedding_ms) if start else NOT_MEASURED
        memory = [_cell(getattr(start, name, None), ",.0f") for name in ("peak_memory_mib", "gpu_memory_mib")]
        joules = _cell(energy.joules_per_embedding if energy else None, ".3g")
        rows.append((name, mebibytes(model.file_bytes), first, *memory, joules))
    columns = ("model", "file\nMiB", "first\nembed. ms", "memory\nMiB", "GPU mem.\nMiB", "J per\nembed.")
    measured = any(model.cold_start or model.energy for _, model in named(report))
    return Table("Size, cold start, memory, energy (–: not measured)", columns, rows) if measured else None


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
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def mebibytes(count: int) -> str:
    """Format a number of bytes in MiB."""
    return f"{count / 2**20:,.1f}"


def points(value: float) -> str:
    """Format a fraction in points of 100 with its sign, such as `-0.12`."""
    return f"{100 * value + 0.0:+.2f}".replace("-0.00", "+0.00")


def _cell(value: float | None, form: str) -> str:
    return NOT_MEASURED if value is None else format(value, form) if math.isfinite(value) else "not finite"


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
