"""How long-running work says how far it is, without knowing who shows it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table


class Report(Protocol):
    """Called as work goes on: `done` of `total` units of `what`, with a `detail` worth showing beside them."""

    def __call__(self, what: str, done: int, total: int, detail: str = "") -> None: ...


def silent(what: str, done: int, total: int, detail: str = "") -> None:
    """Show nothing."""


def about(addition: str, report: Report) -> Report:
    """Report the same work several times, each under a name of its own."""

    def told(what: str, done: int, total: int, detail: str = "") -> None:
        report(f"{what}, {addition}", done, total, detail)

    return told


INTERRUPTED = 130
"""The exit code that shells give for a program that Ctrl-C ended."""
_PIPED_WIDTH = None if sys.stdout.isatty() else 160  # nothing is cut in a file or a log

# `:x:` in a path is no emoji, in either.
out = Console(highlight=False, emoji=False, width=_PIPED_WIDTH)
"""Results: what a user may pipe into a file."""
err = Console(stderr=True, highlight=False, emoji=False)
"""Progress, notes and errors."""


@contextmanager
def progress() -> Iterator[Report]:
    """Show one bar for each `what` that is reported: done, total, time left and the detail."""
    bars = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[detail]}", style="dim", markup=False),
        console=err,
    )
    tasks: dict[str, TaskID] = {}

    def report(what: str, done: int, total: int, detail: str = "") -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total, detail=detail)
        bars.update(tasks[what], completed=done, total=total, detail=detail)

    with bars:
        yield report


def note(text: str) -> None:
    """Say something about the run, beside its results."""
    err.print(text, soft_wrap=True)


def print_plain(text: str) -> None:
    """Print what programs read, character by character: rich would wrap it, expand tabs and see markup in it."""
    sys.stdout.write(text)


def print_json(data: Mapping[str, Any]) -> None:
    """Print results for programs: one JSON object on standard output."""
    print_plain(json.dumps(data, indent=2) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print results for people. The first column names the row; the others are right-aligned."""
    out.print(title, style="bold", soft_wrap=True)  # the table's own title would break a path at the table's width
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=number > 0)
    for row in rows:
        table.add_row(*row)
    out.print(table)


def percent(fraction: float) -> str:
    """0.8523 as `85.2`, the way reID tables give Rank-1 and mAP."""
    return f"{100 * fraction:.1f}"
