"""The command line. Each command parses, calls one function and renders what it returns."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape

from pmm_edge import __version__
from pmm_edge.cli.bench import bench
from pmm_edge.cli.data import data
from pmm_edge.cli.doctor import doctor
from pmm_edge.cli.embed import embed
from pmm_edge.cli.eval import evaluate
from pmm_edge.cli.export import export
from pmm_edge.cli.synth import synth
from pmm_edge.cli.train import train
from pmm_edge.cli.verify import verify
from pmm_edge.cli.visualize import visualize
from pmm_edge.console import err, note
from pmm_edge.errors import PmmError, PmmWarning

app = typer.Typer(
    name="pmm",
    help="Train person re-identification networks, export them for edge devices, and prove that the export retrieves"
    " the same people.\n\n"
    "The journey is [bold]pmm train[/], [bold]pmm export[/], [bold]pmm bench[/]. Each does the sensible thing without"
    " arguments: it goes on from what the one before it made.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"pmm-edge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with every error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of every command."""


app.command()(train)
app.command()(export)
app.command()(bench)
app.command()(verify)
app.command("eval")(evaluate)
app.command()(embed)
app.command()(visualize)
app.command()(synth)
app.command()(data)
app.command()(doctor)


def main() -> None:
    """Run `pmm`. A user's error is one line on standard error, a traceback only with `--debug`."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            app()
    except PmmError as error:
        _end(error, str(error), error.exit_code)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _end(error, f"{where}{error.strerror or error}", 2)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("pmm_edge"):
            raise
        remedy = "Training and export need the extra: pip install 'pmm-edge[train]'"
        _end(error, f"this command needs {error.name}, which is not installed. {remedy}", 2)


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **_: Any) -> None:
    """Our own warnings are a note, without the line of our source; others are shown as Python does."""
    if issubclass(category, PmmWarning):
        note(f"[yellow]warning:[/] {escape(str(message))}")
    else:
        filename, line = where[:2]
        sys.stderr.write(warnings.formatwarning(message, category, filename, line))


def _end(error: Exception, text: str, exit_code: int) -> NoReturn:
    """Say what is wrong in one line, of several processes that meet the same error once, and exit."""
    if "--debug" in sys.argv:
        raise error
    if _first_to_say(text):
        err().print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True)
    sys.exit(exit_code)


def _first_to_say(text: str) -> bool:
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    try:
        from pmm_edge.trainer.distributed import first_to_report
    except ModuleNotFoundError:  # torch, which is what the error is about
        return True
    return first_to_report(text)
