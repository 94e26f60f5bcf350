"""`pmm synth`: draw a synthetic data set."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from pmm_edge.console import note, print_json, print_table, progress
from pmm_edge.data.synthetic import SyntheticConfig, contact_sheet, count_images, make_synthetic
from pmm_edge.files import check_output, written_whole

SHEET_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}
_DEFAULT = SyntheticConfig()


def synth(
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist yet, or be empty.")],
    train_identities: Annotated[
        int, typer.Option("--train-identities", help="People in bounding_box_train, 2 to 4000.")
    ] = _DEFAULT.train_identities,
    test_identities: Annotated[
        int, typer.Option("--test-identities", help="Other people, in query and bounding_box_test, 1 to 4000.")
    ] = _DEFAULT.test_identities,
    cameras: Annotated[
        int, typer.Option(help="Cameras, 2 to 9. Each person passes at least half of them.")
    ] = _DEFAULT.cameras,
    images: Annotated[int, typer.Option(help="Images of a person in each camera, 2 to 32.")] = _DEFAULT.images,
    group_size: Annotated[
        int,
        typer.Option(
            "--group-size",
            help="People who wear the same upper and lower garment and differ in hair, hat, shoes, logo and bag."
            " 1 to 8; 1: everybody has their own clothes.",
        ),
    ] = _DEFAULT.group_size,
    height: Annotated[int, typer.Option(help="Image height in pixels, 32 to 512.")] = _DEFAULT.height,
    width: Annotated[int, typer.Option(help="Image width in pixels, 16 to 512.")] = _DEFAULT.width,
    distractors: Annotated[
        float, typer.Option(help="Images of strangers and clutter (0000) for each gallery image of a person.")
    ] = _DEFAULT.distractors,
    junk: Annotated[
        float, typer.Option(help="Badly cut images (-1) for each gallery image of a person.")
    ] = _DEFAULT.junk,
    seed: Annotated[int, typer.Option(help="The same seed draws the same bytes.")] = _DEFAULT.seed,
    workers: Annotated[
        int | None, typer.Option(help="Processes that draw; by default one for each usable core.", min=1)
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="Also write a contact sheet here (.jpg or .png): people × cameras.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Draw a synthetic reID data set, in the layout of Market-1501.

    People walk past cameras that differ in viewpoint, background, colour cast, exposure and blur. Several wear
    the same clothes: only hair, hat, shoes, logo and bag tell them apart. Nothing is downloaded, and what
    reads Market-1501 reads this.

    [dim]pmm synth data/synthetic[/]

    [dim]pmm synth data/small --train-identities 20 --test-identities 10 --sheet small.jpg[/]
    """
    config = SyntheticConfig(
        train_identities=train_identities,
        test_identities=test_identities,
        cameras=cameras,
        images=images,
        group_size=group_size,
        height=height,
        width=width,
        seed=seed,
        distractors=distractors,
        junk=junk,
    )
    if sheet:
        check_output(sheet, [*SHEET_FORMATS])
    start = time.perf_counter()
    with progress() as report:
        make_synthetic(out, config, workers=workers, report=report)
    seconds = time.perf_counter() - start
    if sheet:
        with written_whole(sheet) as temporary:
            contact_sheet(config).save(temporary, SHEET_FORMATS[sheet.suffix.lower()], quality=88)
    counts = count_images(config)
    if as_json:
        sheet_path = str(sheet) if sheet else None
        print_json({"folder": str(out), "images": counts, "sheet": sheet_path, "config": asdict(config)})
        return
    print_table(escape(str(out)), ("images", "count"), [(name, f"{count:,}") for name, count in counts.items()])
    recipe = escape(str(out / "synthetic.json"))
    note(f"[dim]{sum(counts.values()):,} images in {seconds:.1f} s; what made them is in {recipe}[/]")
