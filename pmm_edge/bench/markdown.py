"""A report as GitHub-flavoured Markdown, to be pasted into a pull request."""

from __future__ import annotations

import re

from pmm_edge.bench.figures import BenchReport
from pmm_edge.bench.tables import Table, model_table, terminal_tables
from pmm_edge.bench.verdict import named, verdict

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
