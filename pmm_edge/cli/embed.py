"""`pmm embed`: embeddings of a folder, a list or a data set, in a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from pmm_edge.console import err, note, out, print_json, progress

if TYPE_CHECKING:
    from pmm_edge.runtime.embed_files import EmbeddedFiles

_BAD_SHOWN = 20


def embed(
    model: Annotated[Path, typer.Argument(help="A .onnx file of pmm export, or what else pmm eval takes.")],
    images: Annotated[
        Path,
        typer.Argument(
            help="A data set's folder, any folder of images (with those in it), or a text file with one path a line,"
            " relative to the file's folder."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE.npz|.parquet", help="File to write; Parquet needs pyarrow."),
    ] = Path("embeddings.npz"),
    layout: Annotated[str | None, typer.Option(help="The data set's layout, where it is not recognised.")] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            help="Images that are embedded at once; by default 64, or what an engine's or a static batch's size wants."
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda or cuda:N, of a .onnx also tensorrt or tensorrt:N; by default a GPU where the engine"
            " can use one."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written and skipped as JSON.")] = False,
) -> None:
    """Embed images into a file: one row an image, of a data set with its identity, camera and split.

    Images that cannot be read are named and skipped; exit code 1, and no file, where none can be read. Rows are in
    the order of the sorted paths, of the list, or of query, gallery and train.

    A .npz holds the arrays embeddings, paths, spec (JSON), and of a data set pids, camids and split; a .parquet the
    columns path, embedding, pid, camid and split, with the spec in its metadata.

    [dim]pmm embed model.onnx crops/ -o embeddings.npz[/]

    [dim]pmm embed model.onnx market1501 -o market.parquet[/]
    """
    from pmm_edge.runtime import embed_files

    with progress() as report:
        embedded = embed_files(
            model, images, output, layout=layout, device=device, batch=batch, skip_bad=True, report=report
        )
    facts = {"model": str(model), "backend": embedded.backend, "device": embedded.device}
    if as_json:
        print_json({**facts, "source": embedded.images.source, "written": str(output), **_figures(embedded)})
    else:
        _show(embedded, output)


def _figures(embedded: EmbeddedFiles) -> dict[str, Any]:
    return {
        "rows": len(embedded.embeddings),
        "embedding_size": embedded.embeddings.shape[1],
        "skipped": [{"path": str(image.path), "reason": image.reason} for image in embedded.skipped],
        "seconds": embedded.seconds,
        "images_per_second": len(embedded.embeddings) / embedded.seconds,
        "model_share": embedded.model_seconds / embedded.seconds,
    }


def _show(embedded: EmbeddedFiles, output: Path) -> None:
    for image in embedded.skipped[:_BAD_SHOWN]:
        _warn(f"{image.path}: {image.reason}")
    if len(embedded.skipped) > _BAD_SHOWN:
        _warn(f"and {len(embedded.skipped) - _BAD_SHOWN:,} more; --json names them all")
    skipped = f", {len(embedded.skipped):,} skipped" if embedded.skipped else ""
    figures = _figures(embedded)
    shape = f"{figures['rows']:,} × {figures['embedding_size']:,}"
    out().print(f"{escape(str(output))}: {shape} float32 of {escape(embedded.images.source)}{skipped}", soft_wrap=True)
    rate, share = figures["images_per_second"], figures["model_share"]
    engine = f"{embedded.backend} {embedded.device}"
    note(f"[dim]{rate:,.1f} images/s end to end in {engine}; the network took {share:.0%} of the time[/]")


def _warn(text: str) -> None:
    err().print(f"[red]skipped:[/] {escape(text)}", soft_wrap=True)
