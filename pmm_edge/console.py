"""Terminal output: progress bars, tables, notes and JSON."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Protocol

from rich.console import Console
from rich.markup import escape

from pmm_edge.files import encode_json

INTERRUPTED = 130
"""Exit code of a program that Ctrl-C ended."""


class Report(Protocol):
    """Receives progress: `done` of `total` units of `what`, and an optional `detail` to show with it."""

    def __call__(self, what: str, done: int, total: int, detail: str = "") -> None: ...


def silent(what: str, done: int, total: int, detail: str = "") -> None:
    """Ignore progress."""


def about(addition: str, report: Report) -> Report:
    """Append `addition` to the name of the work, so that repeated work gets a bar of its own."""
    return lambda what, done, total, detail="": report(f"{what}, {addition}", done, total, detail)


@cache
def out() -> Console:
    """Standard output, for results. Text is not wrapped in a file or a pipe, and `:x:` in a path is not an emoji."""
    return Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 160)


@cache
def err() -> Console:
    """Standard error, for progress, notes and errors."""
    return Console(stderr=True, highlight=False, emoji=False)


@contextmanager
def progress() -> Iterator[Report]:
    """Show one progress bar for each `what` that is reported: done, total, time left and the detail."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    bars = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[detail]}", style="dim", markup=False),
        console=err(),
    )
    tasks: dict[str, TaskID] = {}

    def report(what: str, done: int, total: int, detail: str = "") -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total, detail=detail)
        bars.update(tasks[what], completed=done, total=total, detail=detail)

    with bars:
        yield report


def note(text: str) -> None:
    """Print a note on standard error; rich markup applies, so escape file names."""
    err().print(text, soft_wrap=True)


def print_line(text: str) -> None:
    """Print one line of a result; rich markup applies."""
    out().print(text, soft_wrap=True)


def print_plain(text: str) -> None:
    """Print text for programs unchanged: no wrapping, no markup."""
    sys.stdout.write(text)


def print_json(data: object) -> None:
    """Print a result for programs: one JSON document on standard output."""
    print_plain(encode_json(data))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a result for people; no markup applies. The first column names the row; the others are right-aligned."""
    from rich.table import Table

    print_line(f"[bold]{escape(title)}[/]")  # rich would wrap a path in the table's own title
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=number > 0)
    for row in rows:
        table.add_row(*map(escape, row))
    out().print(table)


def percent(fraction: float) -> str:
    """Format 0.8523 as `85.2`, as reID tables print Rank-1 and mAP."""
    return f"{100 * fraction:.1f}"
