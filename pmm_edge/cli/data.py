"""`pmm data`: say what a data set holds and what looks wrong with it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from pmm_edge.console import out, print_json, print_table, progress
from pmm_edge.data.checks import Analysis, BadImage, analyze, unreadable
from pmm_edge.data.dataset import ReidDataset, read
from pmm_edge.errors import CheckFailedError

_BAD_SHOWN = 20
_COLUMNS = ("", "identities", "cameras", "images", "distractors", "junk")


def data(
    folder: Annotated[Path, typer.Argument(metavar="DATA", help="The data set's folder.")],
    layout: Annotated[
        str | None,
        typer.Option(
            help="market1501, dukemtmc-reid, cuhk03-np-detected, cuhk03-np-labeled, msmt17-v1, msmt17-v2 or"
            " market-layout. Recognised by itself where it is not given."
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Decode every image; exit code 1 if one cannot be read.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print counts and warnings as JSON.")] = False,
) -> None:
    """Count identities, images and cameras of a data set, and warn of what looks wrong.

    Images are counted as papers do: distractors (0000) are in, junk (-1) is not.

    [dim]pmm data /data/Market-1501-v15.09.15[/]

    [dim]pmm data /data/CUHK03-NP --layout cuhk03-np-labeled --verify[/]
    """
    dataset = read(folder, layout)
    analysis = analyze(dataset)
    bad = _verified(dataset) if verify else None
    if as_json:
        print_json(_facts(dataset, analysis, bad))
    else:
        _show(dataset, analysis, bad)
    if bad:
        total = sum(map(len, dataset.splits.values()))
        raise CheckFailedError(f"{len(bad):,} of {total:,} images cannot be read", "Fetch them again or remove them")


def _verified(dataset: ReidDataset) -> list[BadImage]:
    paths = [path for split in dataset.splits.values() for path in split.paths]
    with progress() as report:
        return unreadable(paths, report=report)


def _facts(dataset: ReidDataset, analysis: Analysis, bad: list[BadImage] | None) -> dict[str, Any]:
    return {
        "name": dataset.name,
        "folder": str(dataset.root),
        "layout": dataset.layout,
        "splits": {name: asdict(counts) for name, counts in analysis.splits.items()},
        "expected": asdict(analysis.known) if analysis.known else None,
        "warnings": [asdict(warning) for warning in analysis.warnings],
        "unreadable": None if bad is None else [{"path": str(image.path), "reason": image.reason} for image in bad],
    }


def _show(dataset: ReidDataset, analysis: Analysis, bad: list[BadImage] | None) -> None:
    rows = [
        [name, *(f"{value:,}" for value in (c.identities, c.cameras, c.images, c.distractors, c.junk))]
        for name, c in analysis.splits.items()
    ]
    print_table(f"{escape(str(dataset.root))} · {dataset.layout}", _COLUMNS, rows)
    for warning in analysis.warnings:
        _say("[yellow]warning:[/]", warning.text)
    for image in (bad or [])[:_BAD_SHOWN]:
        _say("[red]unreadable:[/]", f"{image.path}: {image.reason}")
    if bad and len(bad) > _BAD_SHOWN:
        _say("[red]unreadable:[/]", f"and {len(bad) - _BAD_SHOWN:,} more; --json names them all")
    if not analysis.warnings and not bad:
        _say("[green]ok:[/]", "nothing looks wrong" + ("" if bad is None else ", and every image can be read"))


def _say(label: str, text: str) -> None:
    out().print(f"{label} {escape(text)}", soft_wrap=True)
