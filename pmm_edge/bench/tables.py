"""Everything that people read of a bench: sentences made from its fields, tables, and Markdown."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pmm_edge.bench import report as bench
from pmm_edge.bench.report import FailureKind, InvariantName, WarningKind
from pmm_edge.console import printable
from pmm_edge.errors import install
from pmm_edge.files import with_tilde
from pmm_edge.spec import FLOAT16_MAX

NOT_MEASURED = "–"


class Table(NamedTuple):
    """Rows of text under columns. The first cell names the row; a newline is a line break."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


# Sentences

_FAILURES = {
    FailureKind.COSINE: "has cosine {value:.6f} on {image}, below the minimum of {limit:g}",
    FailureKind.MEAN_COSINE: "has mean cosine {value:.6f}, below the minimum of {limit:g}",
    FailureKind.LENGTH: "changes the length of the embedding of {image} by a factor of {value:.4g}, and at most"
    " {limit:.4g} or its inverse is allowed; this changes distances and every threshold on them",
    FailureKind.MAP_DROP: "loses {value:.2f} points of mAP{interval}; the maximum is {limit:g}",
    FailureKind.FALSE_MATCHES: "has {value:.2f} times the false-match rate of the reference at the {decision.distance}"
    " threshold for a rate of {decision.nominal:g} (95 % interval {decision.fmr_ratio_low:.2f} to"
    " {decision.fmr_ratio_high:.2f}); at most a factor of {limit:g} or its inverse is allowed",
    FailureKind.TRUE_MATCHES: "loses {value:.2f} points of true-match rate{interval} at the {decision.distance}"
    " threshold for a false-match rate of {decision.nominal:g}; the maximum is {limit:g}",
    FailureKind.PRECISION: "declares another precision than it has: {percent:.0f} % of its weights are of the declared"
    " type, most are {detail}",
    FailureKind.EMBEDDING_SIZE: "outputs {value:.0f} values per embedding, the reference {limit:.0f}",
    FailureKind.CANNOT_RUN: "cannot be run: {detail}",
    FailureKind.INVARIANT: "breaks the invariant '{invariant.name.value}': {broken}",
}
_BROKEN = dict.fromkeys(
    InvariantName, "{found} in row {row} of a batch of {batch}{where} ({image}); tolerance {tolerance}"
) | {
    InvariantName.FINITE: "NaN or infinity for {images:,} images, first for {image}",
    InvariantName.DISTINCT: "the embeddings of {images:,} images are equal or all zeros, first that of {image}",
    InvariantName.UNIT_LENGTH: "length {value:.4g} instead of 1 on {image}, tolerance {tolerance}",
}
_WARNINGS = {
    WarningKind.NO_IDENTITIES: "retrieval is not evaluated: the images have no identities",
    WarningKind.LIMITED: "retrieval is not evaluated: it needs all {total:,} images, and {count:,} were used",
    WarningKind.UNREADABLE: "cannot read image {model}: {detail}; all figures are without it",
    WarningKind.PRECISION_NOT_CHECKED: "the declared precisions were not checked, because the onnx package"
    f" is missing. {install('train')}",
    WarningKind.REFERENCE_BROKEN: "the reference {name} fails its own checks, so that no model was compared with it",
    WarningKind.SAME_FILE: "{name} is the same file as the reference, so that the comparison shows nothing",
    WarningKind.NO_THRESHOLDS: "decisions are not checked: {name} has no thresholds. Run pmm calibrate on the"
    " checkpoint and export it again",
    WarningKind.OTHER_RATES: "the threshold for a false-match rate of {limit:g} ({detail}) has a rate of {value:.2g} on"
    " these images, outside the interval of its calibration; run pmm calibrate on images of your cameras",
    WarningKind.NOT_MEASURED: "{about}{detail}",
    WarningKind.BUSY: "the machine was busy before the measurement: load {value:.1f}, at most {limit:.1f} is quiet;"
    " stop other processes (see top) and measure again",
    WarningKind.NOISY: "{count} of {total} timings are noisy: the standard deviation reaches {percent:.0f} % of the"
    " mean (quiet machines stay below {limit_percent:.0f} %); stop other processes and lock the clocks (jetson_clocks,"
    " or cpupower frequency-set -g performance). On a VM, other tenants add noise",
    WarningKind.THROTTLED: "the processor slowed down {count} times during the timings; cool it or lock lower clocks",
}


def describe_failure(failure: bench.Failure) -> str:
    """Describe a failed gate; the sentence follows the model's name."""
    value, change, invariant, broken = failure.value or 0.0, failure.change, failure.invariant, ""
    interval = f" (95 % interval {-100 * change.high:.2f} to {-100 * change.low:.2f})" if change else ""
    if invariant:
        found = "NaN or infinity" if invariant.value is None else f"a difference of {invariant.value:.2g}"
        where = f" next to {invariant.neighbors}" if invariant.neighbors else ""
        broken = _BROKEN[invariant.name].format(**vars(invariant), found=found, where=where)
    fields = vars(failure) | {"value": value, "percent": 100 * value, "interval": interval, "broken": broken}
    return _FAILURES[failure.kind].format(**fields)


def describe_warning(warning: bench.BenchWarning) -> str:
    """Describe a warning and what to do about it."""
    name, value, limit = Path(warning.model).name, warning.value or 0.0, warning.limit or 0.0
    fields = vars(warning) | {"value": value, "limit": limit, "percent": 100 * value, "limit_percent": 100 * limit}
    fields |= {"name": name, "about": f"{name}: " if name else ""}
    return _WARNINGS[warning.kind].format(**fields)


def explanations(model: bench.ModelReport) -> list[str]:
    """Why a model fails, as far as it is known: the likely mistake, and the node where the difference starts."""
    found, likely = [], model.likely_cause
    if likely:
        order = f" ({', '.join(likely.stages)})" if likely.stages else ""
        found.append(f"likely cause: {likely.cause.value}{order}")
    return [*found, _describe_departure(model.departure)] if model.departure else found


def _describe_departure(departure: bench.Departure) -> str:
    what = f"{departure.operator} '{departure.layer or departure.node}'"
    figures = f"output cosine {departure.cosine:.4f}, inputs {departure.before:.4f}"
    why, own, reference = "", departure.value_range, departure.reference_range
    if own is None:
        largest = max(map(abs, reference or (0.0,)))
        why = ": the output holds NaN or infinity"
        if departure.dtype == "float16" and largest > FLOAT16_MAX:
            why = f": the reference reaches {largest:.4g}, which exceeds the range of float16 ({FLOAT16_MAX:.0f})"
    elif departure.operator == "DequantizeLinear" and reference:
        why = f": INT8 represents {own[0]:.3g} to {own[1]:.3g}, the reference has {reference[0]:.3g} to"
        why += f" {reference[1]:.3g}; calibrate on real crops"
    elif departure.weights_cosine is not None and departure.weights_cosine < 0.99:  # INT8 explains a smaller difference
        why = f": its weights differ from the reference (cosine {departure.weights_cosine:.4f})"
    if departure.gradual:
        return f"no single node is at fault, the difference accumulates; {what} loses most ({figures}){why}"
    return f"departs at {what} ({figures}){why}"


def failure_lines(model: bench.ModelReport) -> list[str]:
    """One sentence for each failure of a model, then what explains them."""
    return [*map(describe_failure, model.failures), *explanations(model)]


def verdict(report: bench.BenchReport) -> tuple[str, str]:
    """Return `passes`, `fails` or `partial`, and a sentence with the first failure and how many more there are."""
    failures = [f"{name} {describe_failure(failure)}" for name, model in named(report) for failure in model.failures]
    failed = f"{failures[0]} (and {len(failures) - 1} more)" if len(failures) > 1 else "".join(failures)
    if not report.complete:
        return "partial", f"The bench was interrupted: {failed or 'no failure so far'}."
    if failures:
        return "fails", f"{failed}."
    found = f"All {len(report.models)} models pass" if len(report.models) > 1 else "The model passes"
    if changes := [model.retrieval_change for model in report.models if model.retrieval_change]:
        moved = max(abs(change.mAP.difference) for change in changes)
        found += f": mAP changes by at most {100 * moved:.2f} points on {changes[0].queries:,} queries"
    elif cosines := [model.parity.whole.cosine_min for model in report.models if model.parity]:
        found += f": the minimum cosine is {min(cosines):.6f}"
    return "passes", f"{found}."


def result(report: bench.BenchReport, model: bench.ModelReport) -> str:
    """`fails`, `reference`, `passes`, or `not judged` if nothing was compared with the reference."""
    if model.failures:
        return "fails"
    return "reference" if model is report.reference else "passes" if model.parity else "not judged"


def named(report: bench.BenchReport) -> list[tuple[str, bench.ModelReport]]:
    """Return reference and models with their display names: the file name, or the path where names are equal."""
    models = (report.reference, *report.models)
    shared = Counter(Path(model.path).name for model in models)
    found = [Path(model.path).name if shared[Path(model.path).name] == 1 else model.path for model in models]
    unique = [name if found.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(found)]
    return list(zip(map(printable, unique), models, strict=True))


# Tables of at most 80 columns


def all_tables(report: bench.BenchReport) -> list[Table]:
    """Return the tables of what was measured."""
    latencies = (latency_table(report, scope) for scope in ("model", "end to end"))
    accuracy = parity_table(report), retrieval_table(report), decisions_table(report)
    return [table for table in (*accuracy, *latencies, cost_table(report)) if table]


def parity_table(report: bench.BenchReport) -> Table:
    """Cosine similarity of each model's embeddings to the reference's, and the largest difference."""
    rows = []
    for name, model in named(report):
        parity = model.parity
        stage = min((one.cosine_min for one in parity.stages.values()), default=None) if parity else None
        cosines = (parity.whole.cosine_min, stage, parity.whole.cosine_mean) if parity else (None, None, None)
        relative = _cell(parity.whole.largest_relative if parity else None, ".1e")
        rows.append((name, *(_cell(one, ".6f") for one in cosines), relative, result(report, model)))
    columns = ("model", "cosine\nmin", "min of\nany stage", "cosine\nmean", "largest\nrelative", "result")
    return Table(f"Parity on {report.images:,} images of {with_tilde(report.data)}", columns, rows)


def retrieval_table(report: bench.BenchReport) -> Table | None:
    """Retrieval with changes and their intervals, and mAP by cosine distance; None if it was not evaluated."""
    rows, title = [], "Retrieval in %, with the change in points and its 95 % interval"
    for name, model in named(report):
        cells = []
        for metric in ("mAP", "rank1", "mINP"):
            value, change = getattr(model.retrieval, metric, None), getattr(model.retrieval_change, metric, None)
            cells.append(_cell(value and 100 * value, ".2f"))
            if change:
                cells[-1] += f" {points(change.difference)}\n({points(change.low)}…{points(change.high)})"
        by_cosine = getattr(model.retrieval_cosine, "mAP", None)
        rows.append((name, *cells, _cell(by_cosine and 100 * by_cosine, ".2f")))
        if model.retrieval_change and model is report.models[0]:
            title += f", {model.retrieval_change.queries:,} queries"
    measured = any(model.retrieval for _, model in named(report))
    return Table(title, ("model", "mAP", "Rank-1", "mINP", "mAP by\ncosine"), rows) if measured else None


def decisions_table(report: bench.BenchReport) -> Table | None:
    """Rates of false and true matches at the thresholds of each model; None if no model has thresholds."""
    rows, title = [], ""
    for name, model in named(report):
        if not (found := model.decisions):
            continue
        other = "" if found.same_images else ", other images"
        title = title or f"Matches at the thresholds calibrated on {found.dataset}{other}"
        for one in found.thresholds:
            fmr = f"{one.fmr:.1e} ×{one.fmr_ratio:.2f}"
            tmr = f"{100 * one.tmr:.2f} {points(one.tmr_change.difference)}"
            if one.changed:
                fmr += f"\n({one.fmr_ratio_low:.2f}…{one.fmr_ratio_high:.2f})"
                tmr += f"\n({points(one.tmr_change.low)}…{points(one.tmr_change.high)})"
            rows.append((name, f"{one.distance} {one.nominal:g}", fmr, tmr, f"{one.changed:,}"))
    columns = ("model", "threshold for\na rate of", "false-match\nrate, ratio", "true-match\nrate, %", "changed\npairs")
    return Table(title, columns, rows) if rows else None


def changed_pairs_table(report: bench.BenchReport) -> Table | None:
    """The pairs that change sides by most; None if there are none."""
    rows = []
    for name, model in named(report):
        for one in model.decisions.thresholds if model.decisions else ():
            for pair in one.worst:
                images = with_tilde(pair.query_image), with_tilde(pair.gallery_image)
                distances = (f"{value:.4g}" for value in (one.threshold, pair.reference_distance, pair.distance))
                person = "same" if pair.same_person else "other"
                rows.append((name, f"{one.distance}, {one.nominal:g}", *images, person, *distances))
    columns = ("model", "threshold for rate", "query", "gallery", "person", "threshold", "reference", "model")
    return Table("Pairs that change sides, farthest from the threshold first", columns, rows) if rows else None


def latency_table(report: bench.BenchReport, scope: bench.Scope) -> Table | None:
    """Time per batch and its ratio to the reference, by batch size; None if not measured."""
    timed = [(name, latency) for name, model in named(report) for latency in model.latency if latency.scope == scope]
    rows = []
    for name, one in sorted(timed, key=lambda entry: (entry[1].batch, entry[1].cuda_graph)):
        ratio = f"{one.ratio:.2f}"
        if one.ratio_low != one.ratio_high:  # the reference's ratio to itself has no interval
            ratio += f" {one.ratio_low:.2f}–{one.ratio_high:.2f}"
        label = f"{name}, CUDA graph" if one.cuda_graph else name
        times = milliseconds(one.median_ms), milliseconds(one.p90_ms)
        rows.append((label, str(one.batch), *times, f"{one.images_per_second:,.0f}", ratio))
    columns = ("model", "batch\nsize", "median\nms", "p90\nms", "images\nper s", "ratio")
    what = "model only" if scope == "model" else "from image files"
    return Table(f"Latency per batch, {what}; ratio to the reference, 95 % interval", columns, rows) if rows else None


def cost_table(report: bench.BenchReport) -> Table | None:
    """File size, cold start, memory and energy; None if neither cold start nor energy was measured."""
    rows = []
    for name, model in named(report):
        start, energy = model.cold_start, model.energy
        first = milliseconds(start.first_embedding_ms) if start else NOT_MEASURED
        memory = _cell(start.peak_memory_mib if start else None, ",.0f")
        joules = _cell(energy.joules_per_embedding if energy else None, ".3g")
        rows.append((name, f"{model.file_bytes / 2**20:,.1f}", first, memory, joules))
    columns = ("model", "file\nMiB", "first\nembed. ms", "memory\nMiB", "J per\nembed.")
    measured = any(model.cold_start or model.energy for _, model in named(report))
    return Table("Size, cold start, memory, energy (–: not measured)", columns, rows) if measured else None


def environment_rows(report: bench.BenchReport) -> list[tuple[str, str]]:
    """Name and value of each part of the environment that is known."""
    e = report.environment
    clocks = [f"{e.cpu_clocks.min_mhz} to {e.cpu_clocks.max_mhz} MHz"] if e.cpu_clocks else []
    clocks += [f"governor {', '.join(e.governors)}"] if e.governors else []
    gpu_clocks = [f"{e.gpu_clocks.min_mhz} to {e.gpu_clocks.max_mhz} MHz"] if e.gpu_clocks else []
    gpu_clocks += [f"maximum {e.gpu_max_mhz} MHz"] if e.gpu_max_mhz else []
    threads = [f"{name}={value}" for name, value in e.thread_settings.items()]
    threads += [f"{backend} {count or 'default'}" for backend, count in e.threads.items()]
    rows = {
        "processor": e.cpu,
        "instruction set": e.instruction_set,
        "board": e.board,
        "cores": f"{e.usable_cores:g} of {e.cores}",
        "threads": ", ".join(threads),
        "load before": None if e.load is None else f"{e.load:.2f}",
        "CPU clocks": ", ".join([*clocks, *(["locked"] if e.clocks_locked else [])]),
        "Jetson Linux": e.l4t,
        "power mode": e.power_mode,
        "GPU": e.gpu and (f"{e.gpu}, driver {e.driver}" if e.driver else e.gpu),
        "GPU clocks": ", ".join(gpu_clocks),
        "system": e.os,
        "Python": e.python,
        **e.versions,
    }
    return [(name, value) for name, value in rows.items() if value]


def fastest(model: bench.ModelReport, scope: bench.Scope) -> list[bench.Latency]:
    """Return the timings of a scope by batch size; of those with and without CUDA graph, the faster one."""
    timed = [latency for latency in model.latency if latency.scope == scope]
    best = {latency.batch: latency for latency in sorted(timed, key=lambda one: -one.median_ms)}
    return [best[batch] for batch in sorted(best)]


def milliseconds(value: float) -> str:
    """Format with three significant digits or more: `7.47`, `51.1`, `1,204`."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def points(value: float) -> str:
    """Format a fraction in points of 100 with its sign, such as `-0.12`."""
    return f"{100 * value + 0.0:+.2f}".replace("-0.00", "+0.00")


def _cell(value: float | None, form: str) -> str:
    return NOT_MEASURED if value is None else format(value, form) if math.isfinite(value) else "not finite"


# Markdown

_MARKS = {"passes": "✅", "fails": "❌", "partial": "⚠️"}


def markdown(report: bench.BenchReport) -> str:
    """Render verdict, failures, warnings and tables for a GitHub comment; text from files and paths is escaped."""
    state, sentence = verdict(report)
    lines = [f"- **{escaped(name)}** {escaped(line)}" for name, model in named(report) for line in failure_lines(model)]
    lines += [f"- ⚠️ {escaped(describe_warning(warning))}" for warning in report.warnings]
    parts = [f"### {_MARKS[state]} pmm bench: {state}", escaped(sentence), "\n".join(lines)]
    for title, columns, rows in all_tables(report):
        head, *body = ["| " + " | ".join(map(escaped, row)) + " |" for row in (columns, *rows)]
        parts.append("\n".join([f"**{escaped(title)}**\n", head, "| :--- |" + " ---: |" * (len(columns) - 1), *body]))
    about = [*environment_rows(report), ("measured", report.created)]
    parts.append(f"<sub>{escaped('; '.join(f'{name} {value}' for name, value in about))}</sub>")
    return "\n\n".join(part for part in parts if part) + "\n"


def escaped(text: str) -> str:
    """Escape text for Markdown: on one line, without markup, mentions and issue links.

    GitHub looks for `@name` and `#1` after rendering; an invisible word joiner keeps them from becoming links.
    """
    flat = re.sub(r"\s+", " ", text)
    return re.sub(r"(?<=[@#])(?=\w)", "\u2060", re.sub(r"([\\`*_{}\[\]<>|~&!#@$])", r"\\\1", flat))
