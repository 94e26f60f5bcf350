"""Terminal output: progress bars, tables, notes and JSON."""

import errno
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

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


# Control characters and escape sequences, characters that reverse or break lines, and bytes that are not UTF-8.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    r"""Escape what a file name may contain and a terminal or a log must not: `\x1b`, `\n`, `\xe9` for a byte 0xE9.

    The characters in `keep` are not escaped.
    """

    def escaped(match: re.Match[str]) -> str:
        if "\udc80" <= match[0] <= "\udcff":
            return f"\\x{ord(match[0]) - 0xDC00:02x}"
        return match[0] if match[0] in keep else match[0].encode("unicode_escape").decode()

    return _UNSAFE.sub(escaped, text)


class _Stream(io.FileIO):
    """A standard stream that discards output after its reader, a pipe or a terminal, has gone."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            return memoryview(data).nbytes


def protect_streams() -> None:
    """Make sure that printing cannot end the program: neither a character that cannot be encoded nor a closed pipe."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
        elif isinstance(getattr(buffer := getattr(stream, "buffer", None), "raw", buffer), io.FileIO):
            stream.flush()
            buffer = io.BufferedWriter(_Stream(stream.fileno(), "w", closefd=False))
            by_line = stream.line_buffering or stream.write_through  # PYTHONUNBUFFERED
            setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=by_line))


class _Console(Console):
    @property
    def encoding(self) -> str:
        """What the stream can encode; rich assumes UTF-8, and would draw lines that become escapes."""
        return (getattr(self.file, "encoding", None) or "utf-8").lower()


@cache
def out() -> Console:
    """Standard output, for results. Text is not wrapped in a file or a pipe, and `:x:` in a path is not an emoji."""
    return _Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 160)


@cache
def err() -> Console:
    """Standard error, for progress, notes and errors."""
    return _Console(stderr=True, highlight=False, emoji=False)


@contextmanager
def progress() -> Iterator[Report]:
    """Show one progress bar for each `what` that is reported: done, total, time left and the detail.

    If Ctrl-C ends the block, say so.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
    from rich.table import Column

    bars = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),  # in a narrow terminal, the bar is what shrinks
        TimeRemainingColumn(elapsed_when_finished=True, table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[detail]}", style="dim", markup=False),
        console=err(),
    )
    tasks: dict[str, TaskID] = {}

    def report(what: str, done: int, total: int, detail: str = "") -> None:
        if what not in tasks:
            bars.start()  # not before: without a terminal, even empty bars end with an empty line
            tasks[what] = bars.add_task(printable(what), total=total, detail="")
        bars.update(tasks[what], completed=done, total=total, detail=printable(detail))

    try:
        try:
            yield report
        finally:
            if tasks:
                bars.stop()
    except KeyboardInterrupt:
        note("[yellow]interrupted:[/] no file is left half-written; repeat the command")
        raise


def note(text: str) -> None:
    """Print a note on standard error, in one line; rich markup applies, so escape file names."""
    err().print(printable(text), soft_wrap=True)


def print_line(text: str) -> None:
    """Print one line of a result; rich markup applies."""
    out().print(printable(text), soft_wrap=True)


def print_plain(text: str) -> None:
    """Print text for programs unchanged: no wrapping, no markup."""
    sys.stdout.write(text)


def print_json(data: object, indent: int = 2) -> None:
    """Print a result for programs: one JSON document on standard output, in ASCII, which every stream can encode."""
    text = encode_json(data, indent)
    print_plain(re.sub(r"[^\x00-\x7f]", lambda match: json.dumps(match[0])[1:-1], text))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a result for people; no markup applies. The first column names the row; the others are right-aligned.

    A cell may have several lines, except in the first column, which may hold any file name.
    """
    from rich.table import Table

    print_line(f"[bold]{escape(title)}[/]")  # rich would wrap a path in the table's own title
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
    for row in rows:
        table.add_row(*(escape(printable(cell, "\n" * (number > 0))) for number, cell in enumerate(row)))
    if rows:
        out().print(table)


def percent(fraction: float) -> str:
    """Format 0.8523 as `85.2`, as reID tables print Rank-1 and mAP."""
    return f"{100 * fraction:.1f}"
