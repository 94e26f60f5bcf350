"""Errors that a user can act on: one line that says what is wrong, where, and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec

CHECKPOINT_MODULES = ("torch", "torchvision", "safetensors")
EXPORT_MODULES = (*CHECKPOINT_MODULES, "onnx", "onnxscript")
"""What loading and exporting a checkpoint import."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Start of a remedy, `Did you mean 'epochs'? `, or an empty string if no known name is similar."""
    near = get_close_matches(str(name), list(known), n=1)
    return f"Did you mean '{near[0]}'? " if near else ""


def install(extra: str = "") -> str:
    """The remedy for a missing package, `Run pip install '.[train]' in a checkout of pmm-edge`."""
    target = f"'.[{extra}]'" if extra else "."
    return f"Run pip install {target} in a checkout of pmm-edge"


def absent(*modules: str) -> str:
    """Say which modules are not installed, `torch, onnx not installed`, without importing them; empty if all are."""
    missing = ", ".join(module for module in modules if find_spec(module) is None)
    return missing and f"{missing} not installed"


class PmmError(Exception):
    """Wrong use or bad input. `problem` names the file or value; `remedy` says what to do.

    The command line prints both in one line and exits with `exit_code`.
    """

    exit_code = 2

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem, self.remedy = problem, remedy
        super().__init__(f"{problem}. {remedy}" if remedy else problem)


class DataError(PmmError):
    """A data set, an image or an image list cannot be used."""


class ModelError(PmmError):
    """A checkpoint or an exported model cannot be used."""


class OutputError(PmmError):
    """Results cannot be written."""


class CheckFailedError(PmmError):
    """The work completed and a check failed: a parity gate, or an export that differs from its checkpoint."""

    exit_code = 1


class PmmWarning(UserWarning):
    """Something unexpected that does not stop the work. The command line prints it in one line."""
