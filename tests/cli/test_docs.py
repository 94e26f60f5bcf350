"""README.md, docs/ and the help texts name only commands, options, files and Python names that exist."""

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

from pmm_edge import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
BY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def command_lines(text: str) -> Iterator[str]:
    """The lines of code blocks that run `pmm` or a benchmark, without comments, as one line each."""
    for line in re.sub(r" *\\\n\s*", " ", text).splitlines():
        if found := re.match(r"(?:    )?(?:\$ )?(?:\S*/)?((?:pmm|torchrun|python benchmarks/\w+\.py)(?: .*|$))", line):
            yield re.sub(r".* -m pmm_edge", "pmm", found[1].split(" #")[0]).replace("...", "")


def parse(words: list[str]) -> None:
    """Parse the words after `pmm`; raises the usage error that a user would see."""
    command, *arguments = words
    found = COMMANDS[command]
    if command == "gallery":
        command, *arguments = arguments
        if "|" in command:
            return
        found = found.commands[command]
    with found.make_context(command, arguments):
        pass


@BY_PAGE
def test_command_lines_of_pages(page: Path) -> None:
    for line in command_lines(page.read_text("utf-8")):
        words = shlex.split(re.sub(r"[][]", "", line))
        if words[0] == "pmm":
            parse(words[1:])
            continue
        script = ROOT / words[1]
        sources = script.read_text("utf-8") + (script.parent / "compare_methods.py").read_text("utf-8")
        assert all(f'"{word}"' in sources for word in words if word.startswith("--")), line


@pytest.mark.parametrize(
    "command", [*COMMANDS.values(), *COMMANDS["gallery"].commands.values()], ids=lambda one: one.name
)
def test_examples_of_help_texts(command: Any) -> None:
    for example in re.findall(r"^ *- `pmm (.*?)`", command.help or "", re.MULTILINE):
        parse(shlex.split(example.split(" && ")[0]))


@BY_PAGE
def test_inline_commands_and_options(page: Path) -> None:
    """Text may leave out arguments, but names only options that exist."""
    options = {
        name: {flag for one in command.params for flag in (*one.opts, *one.secondary_opts)}
        for name, command in COMMANDS.items()
    }
    for command in COMMANDS["gallery"].commands.values():
        options["gallery"] |= {flag for one in command.params for flag in one.opts}
    text = FENCE.sub("", page.read_text("utf-8"))
    for code in re.findall(r"`(pmm [^`]*)`", text):
        command = code.split()[1]
        flags = re.findall(r"(?<!\S)--[a-z][a-z-]+", code)
        assert command in COMMANDS or command == "-h", code
        assert options.get(command, set()).issuperset(flags), code


@pytest.mark.torch
@BY_PAGE
def test_python_names(page: Path) -> None:
    text = page.read_text("utf-8")
    for module, names in re.findall(r"from (pmm_edge[\w.]*) import ([\w, ]+)", text):
        assert all(hasattr(import_module(module), name) for name in names.split(", ")), (module, names)
    called = re.findall(r"\bpmm_edge((?:\.\w+)+)\(", text) + re.findall(r"\bpmm(\.[a-z_]\w*)\b(?!\.)", text)
    for name in called:
        module, _, last = f"pmm_edge{name}".rpartition(".")
        assert hasattr(import_module(module), last), name


def test_links_of_the_readme() -> None:
    """Those of docs/ are checked by `make docs`."""
    for path, anchor in re.findall(r"blob/main/([^)#]+)#?([\w-]*)\)", PAGES[0].read_text("utf-8")):
        headings = re.findall(r"^#+ (.*)", (ROOT / path).read_text("utf-8"), re.MULTILINE)
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings], path
