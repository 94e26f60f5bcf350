"""What the page is made of: tables, cards, charts, pictures, each as HTML with everything escaped."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path

from PIL import Image

from pmm_edge.bench.html.pictures import png, thumbnail
from pmm_edge.bench.html.plots import Plot
from pmm_edge.bench.report import BenchReport, FirstHit, ModelReport
from pmm_edge.bench.tables import Table, milliseconds, points, result

SIGNS = {
    "passes": "✓",
    "fails": "✗",
    "not judged": "◌",
    "partial": "◐",
    "reference": "◆",
    "holds": "✓",
    "broken": "✗",
}
"""A sign for each state, so that none is told by its colour alone."""


def card_html(report: BenchReport, name: str, model: ModelReport) -> str:
    """The four figures that decide, with what was allowed."""
    state = result(report, model)
    facts: list[tuple[str, str, str]] = []
    if model.parity:
        facts.append(("Least cosine", f"{model.parity.whole.cosine_min:.6f}", f"{model.gates.min_cosine:g} allowed"))
    if model.retrieval:
        change = model.retrieval_change
        note = f"{points(change.mAP).split(' ')[0]} points" if change else ""
        facts.append(("mAP", f"{100 * model.retrieval.mAP:.2f} %", note))
    timed = sorted((own for own in model.latency if own.scope == "model"), key=lambda own: own.batch)
    if timed:
        note = "" if state == "reference" else f"{timed[0].ratio:.2f} × reference"
        facts.append((f"Batch of {timed[0].batch}", f"{milliseconds(timed[0].median_ms)} ms", note))
    facts.append(("File", f"{model.file_bytes / 2**20:,.1f} MiB", ""))
    rows = "".join(
        f"<div><dt>{escape(term)}</dt><dd>{escape(value)}</dd>{_note(note)}</div>" for term, value, note in facts
    )
    kind = escape(f"{model.precision}, {model.backend} {model.device}")
    return f'<li class="card"><h3>{escape(name)}</h3><p class="kind">{kind}</p>{_badge(state)}<dl>{rows}</dl></li>'


def hit_html(hit: FirstHit, folder: Path) -> str:
    """A query, what the reference finds first and what the model does, as pictures from inside `folder`."""
    sides = (
        ("query", "Query", hit.query, None),
        ("hit", "Reference", hit.reference, hit.reference_right),
        ("hit", "Model", hit.model, hit.model_right),
    )
    figures = []
    for kind, label, path, right in sides:
        mark = "" if right is None else "right" if right else "wrong"
        said = "" if right is None else f'<span class="mark {mark}">{"✓" if right else "✗"} {mark}</span>'
        figures.append(
            f'<figure class="{kind} {mark}">{_thumbnail(path, label, folder)}'
            f"<figcaption>{label} {said}<code>{escape(os.path.basename(path))}</code></figcaption></figure>"  # noqa: PTH119
        )
    return f"<li>{''.join(figures)}</li>"


def _thumbnail(path: str, label: str, folder: Path) -> str:
    found = thumbnail(path, folder)
    if found is None:
        return '<div class="gone">no picture</div>'
    uri, width, height = found
    alt = f"{label}: {os.path.basename(path)}"  # noqa: PTH119
    return f'<img src="{uri}" width="{width}" height="{height}" alt="{escape(alt)}">'


def picture_html(title: str, caption: str, image: Image.Image | bytes) -> str:
    """A picture of any size; a wide one scrolls in its box."""
    return (
        f'<figure class="picture"><h3>{escape(title)}</h3><div class="scroll" tabindex="0" role="region"'
        f' aria-label="{escape(title)}"><img src="{png(image)}" alt="{escape(title)}"></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def plots_html(*plots: Plot | None, beside: str = "") -> str:
    """Charts side by side, each with its figures as a table; `beside` is HTML that stands with them."""
    figures = "".join(
        f'<figure class="plot"><h3>{escape(plot.title)}</h3>{plot.svg}{plot.legend}<figcaption>{escape(plot.caption)}'
        f"</figcaption><details><summary>The figures as a table</summary>{table_html(plot.table)}</details></figure>"
        for plot in plots
        if plot
    )
    return f'<div class="plots">{figures}{beside}</div>' if figures or beside else ""


def table_html(table: Table, words: bool = False) -> str:
    """In a box of its own that scrolls sideways; `words` where the cells are no figures."""
    head = "".join(f'<th scope="col">{_broken(column)}</th>' for column in table.columns)
    rows = "".join(
        f'<tr><th scope="row">{_broken(row[0])}</th>{"".join(f"<td>{_cell(cell)}</td>" for cell in row[1:])}</tr>'
        for row in table.rows
    )
    title = escape(table.title[:1].upper() + table.title[1:])
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{title}"><table{" class=words" if words else ""}>'
        f"<caption><span>{title}</span></caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    return _badge(text) if text in SIGNS else _broken(text)


def _badge(state: str) -> str:
    return (
        f'<span class="badge {state.replace(" ", "-")}"><span aria-hidden="true">{SIGNS[state]}</span> {state}</span>'
    )


def _note(text: str) -> str:
    return f'<dd class="note">{escape(text)}</dd>' if text else ""


def _broken(text: str) -> str:
    return escape(text).replace("\n", "<br>")
