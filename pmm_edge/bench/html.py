"""The report as one HTML file without scripts and external resources: `templates/report.html.j2` and its data."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from PIL import Image

from pmm_edge.bench import tables
from pmm_edge.bench.charts import COLORS, DARK_COLORS, charts
from pmm_edge.bench.report import BenchReport, ModelReport
from pmm_edge.bench.sentences import describe_warning
from pmm_edge.errors import install
from pmm_edge.files import written_whole

_SIGNS = {"passes": "✓", "fails": "✗", "not judged": "◌", "partial": "◐", "reference": "◆", "holds": "✓", "broken": "✗"}
"""A sign for each state, so that color is never the only difference."""
_SECTIONS = (
    ("models", "Models"),
    ("parity", "Parity"),
    ("retrieval", "Retrieval"),
    ("speed", "Speed, memory, energy"),
    ("pictures", "What the network sees"),
    ("environment", "Environment"),
)


class Picture(NamedTuple):
    """A picture for the report, such as a grid of Grad-CAM maps."""

    title: str
    caption: str
    image: Image.Image


def write_html(report: BenchReport, path: Path, pictures: Sequence[Picture] = ()) -> None:
    """Write the report as one HTML file; raises OutputError."""
    text = render(report, pictures)
    with written_whole(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "replace"))  # paths that are not UTF-8 get question marks


def render(report: BenchReport, pictures: Sequence[Picture] = ()) -> str:
    """Return the page; jinja2 escapes every text of the report."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pmm_edge.bench"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    named = tables.named(report)
    found = {
        "models": tables.model_table(report),
        "parity": tables.parity_table(report),
        "stages": tables.stage_table(report),
        "invariants": tables.invariant_table(report),
        "retrieval": tables.retrieval_table(report),
        "latency": tables.latency_table(report, "model", full=True),
        "end_to_end": tables.latency_table(report, "end to end", full=True),
        "cost": tables.cost_table(report),
        "environment": tables.environment_table(report),
    }
    empty = {
        "retrieval": not found["retrieval"],
        "speed": not (found["latency"] or found["end_to_end"] or found["cost"]),
        "pictures": not pictures,
    }
    failures = [(name, tables.failure_lines(model)) for name, model in named]
    return environment.get_template("report.html.j2").render(
        signs=_SIGNS,
        light_colors=_variables(COLORS),
        dark_colors=_variables(DARK_COLORS),
        reference=Path(report.reference.path).name,
        created=report.created.replace("T", " ").replace("+00:00", " UTC"),
        images=report.images,
        verdict=tables.verdict(report),
        failures=[(name, lines) for name, lines in failures if lines],
        warnings=[describe_warning(warning) for warning in report.warnings],
        sections=[section for section in _SECTIONS if not empty.get(section[0])],
        cards=[_card(report, name, model) for name, model in named],
        tables=found,
        charts=charts(report),
        can_draw=find_spec("matplotlib") is not None,
        install=install("train"),
        pictures=[(one.title, one.caption, _data_uri(one.image, "PNG")) for one in pictures],
    )


def _variables(colors: Sequence[str]) -> str:
    return " ".join(f"--s{number}: {color};" for number, color in enumerate(colors))


def _card(report: BenchReport, name: str, model: ModelReport) -> dict[str, Any]:
    """The numbers that decide, each with its limit or its comparison to the reference."""
    facts = []
    if model.parity:
        facts.append(("Minimum cosine", f"{model.parity.whole.cosine_min:.6f}", f"limit {model.gates.min_cosine:g}"))
    if model.retrieval:
        change = model.retrieval_change
        note = f"{tables.points(change.mAP.difference)} points" if change else ""
        facts.append(("mAP", f"{100 * model.retrieval.mAP:.2f} %", note))
    if timed := tables.fastest(model, "model"):
        note = "" if model is report.reference else f"{timed[0].ratio:.2f} × reference"
        facts.append((f"Batch size {timed[0].batch}", f"{tables.milliseconds(timed[0].median_ms)} ms", note))
    facts.append(("File", f"{tables.mebibytes(model.file_bytes)} MiB", ""))
    kind = f"{model.precision}, {model.backend} {model.device}"
    return {"name": name, "kind": kind, "state": tables.result(report, model), "facts": facts}


def _data_uri(image: Image.Image, format_: str) -> str:
    content = io.BytesIO()
    image.save(content, format_, quality=80, optimize=True)
    return f"data:image/{format_.lower()};base64,{base64.b64encode(content.getvalue()).decode('ascii')}"
