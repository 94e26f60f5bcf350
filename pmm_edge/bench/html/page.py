"""The page: its sections in their order, each a function of the report; one without figures is left out."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from pmm_edge.bench.html.parts import SIGNS, card_html, hit_html, picture_html, plots_html, table_html
from pmm_edge.bench.html.plots import accuracy_plot, cmc_plot, cosine_plot, latency_plot
from pmm_edge.bench.report import BenchReport
from pmm_edge.bench.tables import (
    NONE,
    cost_table,
    environment_table,
    invariant_table,
    latency_table,
    model_table,
    named,
    parity_table,
    retrieval_table,
    stage_table,
    stream_table,
    verdict,
)
from pmm_edge.files import written_whole

SHOWN_HITS = 12
"""Of a model's queries whose first hit changed: as many are shown as pictures."""
_WORDS = {"passes": "Passes", "fails": "Fails", "partial": "Partial", "reference": "Reference"}
# Nothing is fetched, whatever stands in the page: the browser holds this as well.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


class Picture(NamedTuple):
    """A picture that somebody else made, such as a grid of Grad-CAM maps."""

    title: str
    caption: str
    image: Image.Image | bytes
    """A picture, or the bytes of a PNG file."""


def write_html(report: BenchReport, path: Path, pictures: Sequence[tuple[str, str, Image.Image | bytes]] = ()) -> None:
    """Write the report as one HTML file.

    Args:
        report: of `pmm bench`, or of `read_report`.
        path: the file.
        pictures: a title, a caption and a picture each, shown in a part of their own.

    Raises:
        OutputError: the file cannot be written.
        ValueError: a picture's bytes are those of no PNG file.
    """
    text = html(report, pictures)
    with written_whole(path) as temporary:  # a path of undecodable bytes has no UTF-8; it gets question marks
        temporary.write_bytes(text.encode("utf-8", "replace"))


def html(report: BenchReport, pictures: Sequence[tuple[str, str, Image.Image | bytes]] = ()) -> str:
    """The page as text. What comes from the report is escaped everywhere."""
    sections = [
        ("models", "Models", _models(report)),
        ("parity", "Parity", _parity(report)),
        ("retrieval", "Retrieval", _retrieval(report)),
        ("first-hits", "Queries whose first hit changed", _first_hits(report)),
        ("speed", "Speed", _speed(report)),
        ("cost", "Throughput and cost", _cost(report)),
        ("pictures", "What the network sees", "".join(picture_html(*picture) for picture in pictures)),
        ("environment", "Environment", table_html(environment_table(report), words=True)),
    ]
    shown = [section for section in sections if section[2]]
    links = "".join(f'<li><a href="#{anchor}">{title}</a></li>' for anchor, title, _ in shown)
    body = "".join(
        f'<section id="{anchor}" aria-labelledby="{anchor}-h"><h2 id="{anchor}-h">{title}</h2>{content}</section>'
        for anchor, title, content in shown
    )
    found = verdict(report)
    style = files("pmm_edge.bench.html").joinpath("style.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_WORDS[found.state]}: pmm bench of {escape(Path(report.reference.path).name)}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the figures</a>
<header>
<p class="made">pmm bench · {escape(_moment(report.created))} · {report.images:,} images</p>
<h1>Does the export retrieve the same people?</h1>
<p class="verdict {found.state}"><span class="sign" aria-hidden="true">{SIGNS[found.state]}</span>
<span><strong>{_WORDS[found.state]}.</strong> {escape(found.sentence)}</span></p>
{_failures(report)}{_warnings(report)}
<nav aria-label="Parts of this report"><ul>{links}</ul></nav>
</header>
<main id="main">{body}</main>
<footer><p>Written by <code>pmm bench</code> from the figures of <code>bench.json</code>. An en dash ({NONE}) stands
for a figure that was not measured.</p></footer>
</body>
</html>
"""


def _failures(report: BenchReport) -> str:
    """Every gate that failed, what may be the cause, and where in the graph it begins."""
    parts = []
    for name, model in named(report):
        lines = [escape(failure) for failure in model.failures]
        if model.likely_cause:
            lines.append(f"<strong>Likely cause:</strong> {escape(model.likely_cause)}")
        if model.departure:
            lines.append(f"<strong>Where it begins:</strong> {escape(model.departure.words)}")
        if lines:
            items = "".join(f"<li>{line}</li>" for line in lines)
            parts.append(f"<div><h3>{escape(name)}</h3><ul>{items}</ul></div>")
    if not parts:
        return ""
    head = '<h2 id="failed-h">What failed</h2>'
    return f'<section class="notice bad" aria-labelledby="failed-h">{head}{"".join(parts)}</section>'


def _warnings(report: BenchReport) -> str:
    if not report.warnings:
        return ""
    items = "".join(f"<li>{escape(warning)}</li>" for warning in report.warnings)
    head = '<h2 id="warned-h">What makes these figures worth less</h2>'
    return f'<section class="notice" aria-labelledby="warned-h">{head}<ul>{items}</ul></section>'


def _models(report: BenchReport) -> str:
    cards = "".join(card_html(report, name, model) for name, model in named(report))
    return f'<ul class="cards">{cards}</ul>{table_html(model_table(report))}'


def _parity(report: BenchReport) -> str:
    plot, stages, invariants = cosine_plot(report), stage_table(report), invariant_table(report)
    parts = [table_html(parity_table(report)), plots_html(plot, beside=table_html(stages) if stages else "")]
    if invariants:
        parts.append(table_html(invariants))
    broken = [
        f"<li>{escape(name)}: {escape(invariant.name)}: {escape(invariant.detail)}</li>"
        for name, model in named(report)
        for invariant in model.invariants
        if not invariant.held
    ]
    return "".join([*parts, f"<ul>{''.join(broken)}</ul>" if broken else ""])


def _retrieval(report: BenchReport) -> str:
    table = retrieval_table(report)
    return table_html(table) + plots_html(cmc_plot(report), accuracy_plot(report)) if table else ""


def _speed(report: BenchReport) -> str:
    tables = (latency_table(report, "model", full=True), latency_table(report, "end to end", full=True))
    plots = (latency_plot(report, "model"), latency_plot(report, "end to end"))
    return plots_html(*plots) + "".join(table_html(table) for table in tables if table)


def _cost(report: BenchReport) -> str:
    return "".join(table_html(table) for table in (stream_table(report), cost_table(report)) if table)


def _first_hits(report: BenchReport) -> str:
    """For each model its changed queries, those that became wrong first; the first of them as pictures."""
    parts = []
    folder = Path(report.data) if Path(report.data).is_dir() else Path(report.data).parent
    for name, model in named(report):
        if not model.retrieval_change or not (hits := model.retrieval_change.first_hits):
            continue
        worse = sum(hit.reference_right and not hit.model_right for hit in hits)
        better = sum(hit.model_right and not hit.reference_right for hit in hits)
        said = (
            f"{len(hits):,} of {model.retrieval_change.queries:,} queries: {worse:,} became wrong, {better:,} became"
            f" right, {len(hits) - worse - better:,} stayed as right or wrong as they were."
        )
        if len(hits) > SHOWN_HITS:
            said += f" The first {SHOWN_HITS} are shown; bench.json names all."
        cards = "".join(hit_html(hit, folder) for hit in hits[:SHOWN_HITS])
        parts.append(f'<h3>{escape(name)}</h3><p>{said}</p><ul class="hits">{cards}</ul>')
    return "".join(parts)


def _moment(created: str) -> str:
    return created.replace("T", " ").replace("+00:00", " UTC")
