"""`pmm doctor`: what works on this machine, and what each command still needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from pmm_edge.console import out, print_json, print_plain
from pmm_edge.errors import CheckFailedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pmm_edge.doctor import Diagnosis

_COLOURS = {True: "green", False: "red", None: "default"}


def doctor(
    commands: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="COMMAND",
            help="Commands that must work here: train, export, trt (that is export --trt), bench, embed, eval,"
            " visualize, verify, data, synth.",
        ),
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Print Markdown to paste into an issue, as when piped.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what is installed, what really works, and what each command still needs.

    ONNX Runtime's providers are tried in a session, TensorRT and the driver are loaded, each in a process of its own:
    being listed does not mean to work. torch is not imported. Nothing that is printed names a home folder.

    Exit code 0, unless a command that is named cannot work here: then 1, for CI and for scripts that set up machines.

    [dim]pmm doctor[/]

    [dim]pmm doctor --text | xclip[/]

    [dim]pmm doctor embed trt && ./start.sh[/]
    """
    from pmm_edge.doctor import as_markdown, check_commands, examine

    check_commands(commands or [])
    diagnosis = examine()
    if as_json:
        print_json(diagnosis.to_json())
    elif text or not out().is_terminal:
        print_plain(as_markdown(diagnosis) + "\n")
    else:
        _show(diagnosis)
    _require(diagnosis, commands or [])


def _show(diagnosis: Diagnosis) -> None:
    for section in diagnosis.sections:
        _print(
            section.title,
            [(finding.name, finding.value, finding.remedy, finding.good) for finding in section.findings],
        )
    _print(
        "Commands",
        [
            (item.command, item.words, "; ".join(item.remedies), item.usable if not item.limits else None)
            for item in diagnosis.commands
        ],
    )
    out().print("[dim]for an issue: pmm doctor --text[/]")


def _print(title: str, rows: Sequence[tuple[str, str, str, bool | None]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value, remedy, good in rows:
        colour = _COLOURS[good]
        cell = f"[{colour}]{escape(value)}[/]" + (f"\n[dim]{escape(remedy)}[/]" if remedy else "")
        table.add_row(escape(name), cell)
    out().print(table)
    out().print()


def _require(diagnosis: Diagnosis, commands: Sequence[str]) -> None:
    for item in diagnosis.commands:
        if item.command in commands and not item.usable:
            problem = f"{item.command} cannot work here: {'; '.join(item.missing)}"
            raise CheckFailedError(problem, "; ".join(item.remedies))
