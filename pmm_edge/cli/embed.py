"""`pmm embed`: embeddings of a folder, a list or a data set, in a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from pmm_edge.console import err, note, out, print_json, progress
from pmm_edge.errors import CheckFailedError

if TYPE_CHECKING:
    from pmm_edge.runtime.embed_files import EmbeddedFiles, ImageList

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
    from pmm_edge.runtime import load
    from pmm_edge.runtime.embed_files import check_embedding_file, embed_readable_files, find_images, save_embeddings

    check_embedding_file(output)
    found = find_images(images, layout)
    embedder = load(model, device)
    with progress() as report:
        embedded = embed_readable_files(embedder, found.paths, batch, report)
    readable = len(embedded.rows)
    if readable:
        names = [found.names[row] for row in embedded.rows]
        labels = found.labels[embedded.rows] if found.labels else None
        save_embeddings(output, embedder.spec, names, embedded.embeddings, labels)
    facts = {"model": str(model), "backend": embedder.backend, "device": embedder.device, "source": found.source}
    if as_json:
        print_json({**facts, "written": str(output) if readable else None, **_figures(found, embedded)})
    else:
        _show(found, embedded, f"{embedder.backend} {embedder.device}", output)
    if not readable:
        raise CheckFailedError(
            f"none of the {len(found.paths):,} images of {images} can be read", f"{output} was not written"
        )


def _figures(found: ImageList, embedded: EmbeddedFiles) -> dict[str, Any]:
    return {
        "rows": len(embedded.rows),
        "embedding_size": embedded.embeddings.shape[1],
        "skipped": [{"path": str(found.paths[row]), "reason": reason} for row, reason in embedded.bad],
        "seconds": embedded.seconds,
        "images_per_second": len(embedded.rows) / embedded.seconds,
        "model_share": embedded.model_seconds / embedded.seconds,
    }


def _show(found: ImageList, embedded: EmbeddedFiles, engine: str, output: Path) -> None:
    for row, reason in embedded.bad[:_BAD_SHOWN]:
        _warn(f"{found.paths[row]}: {reason}")
    if len(embedded.bad) > _BAD_SHOWN:
        _warn(f"and {len(embedded.bad) - _BAD_SHOWN:,} more; --json names them all")
    figures = _figures(found, embedded)
    if not figures["rows"]:
        return
    skipped = f", {len(embedded.bad):,} skipped" if embedded.bad else ""
    shape = f"{figures['rows']:,} × {figures['embedding_size']:,}"
    out.print(f"{escape(str(output))}: {shape} float32 of {escape(found.source)}{skipped}", soft_wrap=True)
    rate, share = figures["images_per_second"], figures["model_share"]
    note(f"[dim]{rate:,.1f} images/s end to end in {engine}; the network took {share:.0%} of the time[/]")


def _warn(text: str) -> None:
    err.print(f"[red]skipped:[/] {escape(text)}", soft_wrap=True)
