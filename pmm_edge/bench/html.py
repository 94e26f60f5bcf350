"""The report as one HTML file without scripts and external resources: `templates/report.html.j2` and its data."""

from importlib.util import find_spec
from pathlib import Path

import jinja2

from pmm_edge.bench import tables
from pmm_edge.bench.charts import COLORS, DARK_COLORS, charts
from pmm_edge.bench.report import BenchReport, ModelReport
from pmm_edge.console import printable
from pmm_edge.errors import install
from pmm_edge.files import with_tilde, written_whole

_SIGNS = {"passes": "✓", "fails": "✗", "not judged": "◌", "partial": "◐", "reference": "◆"}
"""A sign for each state, so that color is never the only difference."""


def write_html(report: BenchReport, path: Path) -> None:
    """Write the report as one HTML file; raises OutputError."""
    text = render(report)
    with written_whole(path) as temporary:
        temporary.write_text(printable(text, keep="\n"), encoding="utf-8")


def render(report: BenchReport) -> str:
    """Return the page; jinja2 escapes every text of the report."""
    rows = [*tables.environment_rows(report), ("data", with_tilde(report.data))]
    rows += [("data SHA-256", report.data_sha256), ("measured", report.created)]
    latencies = [tables.latency_table(report, scope) for scope in ("model", "end to end")]
    sections = (
        ("parity", "Parity", [tables.parity_table(report)]),
        ("retrieval", "Retrieval", [tables.retrieval_table(report)]),
        ("decisions", "Decisions", [tables.decisions_table(report), tables.changed_pairs_table(report)]),
        ("speed", "Speed, memory, energy", [*latencies, tables.cost_table(report)]),
        ("environment", "Environment", [tables.Table("Environment", ("", "value"), rows)]),
    )
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pmm_edge.bench"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.j2").render(
        report=report,
        reference=Path(report.reference.path).name,
        verdict=tables.verdict(report),
        signs=_SIGNS,
        colors=COLORS,
        dark_colors=DARK_COLORS,
        models=[
            (name, model, tables.result(report, model), tables.failure_lines(model), _facts(report, model))
            for name, model in tables.named(report)
        ],
        warnings=[tables.describe_warning(warning) for warning in report.warnings],
        sections=[(name, title, list(filter(None, found))) for name, title, found in sections if any(found)],
        charts=charts(report),
        install=None if find_spec("matplotlib") else install("train"),
    )


def _facts(report: BenchReport, model: ModelReport) -> list[tuple[str, str, str]]:
    """The numbers that decide, each with its limit or its comparison to the reference."""
    facts = []
    if model.parity:
        facts.append(("Minimum cosine", f"{model.parity.whole.cosine_min:.6f}", f"limit {model.gates.min_cosine:g}"))
    if model.invariants:
        facts.append(("Invariants", f"{sum(one.held for one in model.invariants)} of {len(model.invariants)} hold", ""))
    if model.retrieval:
        change = model.retrieval_change
        note = f"{tables.points(change.mAP.difference)} points" if change else ""
        facts.append(("mAP", f"{100 * model.retrieval.mAP:.2f} %", note))
    if timed := tables.fastest(model, "model"):
        note = "" if model is report.reference else f"{timed[0].ratio:.2f} × reference"
        facts.append((f"Batch size {timed[0].batch}", f"{tables.milliseconds(timed[0].median_ms)} ms", note))
    if model.gflops and model.parameters:
        facts.append(("GFLOPs", f"{model.gflops:.2f}", f"{model.parameters / 1e6:.2f} million parameters"))
    return [*facts, ("File", f"{model.file_bytes / 2**20:,.1f} MiB", "")]
