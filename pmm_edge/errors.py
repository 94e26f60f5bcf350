"""Errors that a user can act on: one line that says what is wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The beginning of a remedy, `Did you mean 'epochs'? `, where a known name is near; else nothing."""
    near = get_close_matches(str(name), list(known), n=1)
    return f"Did you mean '{near[0]}'? " if near else ""


class PmmError(Exception):
    """Wrong use or bad input. `problem` names the file or value; `remedy` says what to do about it.

    The command line prints both in one line and exits with `exit_code`.
    """

    exit_code = 2

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{problem}. {remedy}" if remedy else problem)


class DataError(PmmError):
    """A data set, an image or a list of them that cannot be used."""


class ModelError(PmmError):
    """A checkpoint or an exported model that cannot be used."""


class OutputError(PmmError):
    """A place where results cannot be written."""


class PmmWarning(UserWarning):
    """What is not as the user would expect, and does not stop the work. The command line prints it as one line."""


class CheckFailedError(PmmError):
    """Everything ran, and the answer is no: a parity gate failed, an export departs from its source."""

    exit_code = 1
