"""How long-running work says how far it is, without knowing who shows it."""

from __future__ import annotations

from typing import Protocol


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
