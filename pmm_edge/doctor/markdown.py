"""The diagnosis as Markdown, to be pasted into an issue."""

from __future__ import annotations

from collections.abc import Iterable

from pmm_edge.doctor.examination import Diagnosis
from pmm_edge.doctor.findings import Finding

MARKS = {True: "ok", False: "wrong", None: ""}


def as_markdown(diagnosis: Diagnosis) -> str:
    """One table for each section, and one for the commands."""
    parts = [
        _table(section.title, ((finding.name, _value(finding)) for finding in section.findings))
        for section in diagnosis.sections
    ]
    commands = (
        (f"pmm {_command(item.command)}", "; ".join([item.words, *item.remedies])) for item in diagnosis.commands
    )
    return "\n".join([*parts, _table("Commands", commands)])


def _command(name: str) -> str:
    return "export --trt" if name == "trt" else name


def _value(finding: Finding) -> str:
    mark = f"**{MARKS[finding.good]}**" if finding.good is False else MARKS[finding.good]
    return ". ".join(part for part in (f"{mark}: {finding.value}" if mark else finding.value, finding.remedy) if part)


def _table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    lines = [f"| {title} | |", "| --- | --- |"]
    lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """What a package or a driver says of itself is text, not markup."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", r"\|").replace("`", "'")
    return text.replace("@", "@\N{ZERO WIDTH SPACE}")
