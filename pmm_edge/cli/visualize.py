"""`pmm visualize`: pictures of what a network sees, and how little its stages overlap."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from pmm_edge.console import note, print_json, print_table, progress

_SHOWS = {
    "cams": "where each stage finds its evidence (Grad-CAM)",
    "galleries": "what is ranked nearest to each query, right and wrong",
    "mixing": "what stages II and III see in training",
}


def visualize(
    what: Annotated[
        Literal["cams", "galleries", "mixing", "all"],
        typer.Argument(
            help="cams: Grad-CAM of each stage beside the input. galleries: queries and their nearest images. mixing:"
            " what training replaces. all: those of them that the model and the images allow."
        ),
    ] = "all",
    models: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="MODEL",
            help="A checkpoint or its run folder; by default the newest run. galleries takes any .onnx or .engine,"
            " cams several checkpoints to compare side by side.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A data set; by default the run's own. For cams also any folder of images, a text file with one path"
            " a line, or an image."
        ),
    ] = None,
    images: Annotated[
        int, typer.Option(metavar="N", help="How many images, queries and anchors to draw, chosen by chance.")
    ] = 6,
    top: Annotated[int, typer.Option(metavar="K", help="How many hits to draw for a query.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the choice, and of the mixing's negatives.")] = 0,
    true_class: Annotated[
        bool,
        typer.Option(
            "--true-class",
            help="Draw cams for the true class, of training images. By default for the class that each stage predicts,"
            " of queries, as the paper's figures do.",
        ),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where to write; by default pictures/ in the run's folder.")
    ] = None,
    layout: Annotated[str | None, typer.Option(help="The data set's layout, where it is not recognised.")] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda or cuda:N, of .onnx files also tensorrt or tensorrt:N; by default a GPU where the engine"
            " can use one."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the files and the overlap as JSON.")] = False,
) -> None:
    """Draw what a network sees: attention of its stages, ranked galleries, the mixing of training.

    Writes PNG files, and overlap.json with how much the stages' maps overlap: 0 no place in common, 1 all of them.

    [dim]pmm visualize[/]

    [dim]pmm visualize cams --data crops/ --images 20[/]

    [dim]pmm visualize cams runs/baseline runs/bdb runs/pmm[/]

    [dim]pmm visualize galleries model.onnx --data market1501[/]
    """
    from pmm_edge.pictures.album import visualize as run

    with progress() as report:
        album = run(
            models,
            what=what,
            data=data,
            layout=layout,
            images=images,
            top=top,
            seed=seed,
            true_class=true_class,
            out=out,
            device=device,
            report=report,
        )
    if as_json:
        print_json(album.to_json())
        return
    rows = [(_SHOWS[kind], escape(path.name)) for kind, path in album.files.items()]
    print_table(f"pictures in {escape(str(album.folder))}", ("shows", "file"), rows)
    for table in album.tables():
        print_table(*table)
    for kind, reason in album.left_out.items():
        note(f"[yellow]no {kind}:[/] {escape(reason)}")
