"""The commands of `pmm gallery`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

import pmm_edge
from pmm_edge import render
from pmm_edge.cli_options import Device, Json, Layout, arg, opt, out_opt
from pmm_edge.console import note, print_json, print_line, progress
from pmm_edge.files import check_output
from pmm_edge.spec import Distance

gallery_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Keep embeddings with identity, camera and time; search and delete them.\n\nA GALLERY is a folder, or the URL"
    " of a Qdrant collection, `http://HOST:6333/COLLECTION`. It holds embeddings of one model and refuses those of"
    " another. Needs `pip install '.[gallery]'`. docs/gallery.md explains the figures, docs/responsible-use.md what"
    " storing images of people requires.",
)
_gallery = arg(..., "Folder, or http://HOST:6333/COLLECTION.", "GALLERY")
Embeds = Annotated[Path | None, typer.Option(help="Model that embeds images; not needed for files of pmm embed.")]


@gallery_app.command("add")
def gallery_add(
    gallery: str = _gallery,
    source: str = arg(..., "Images as for pmm embed, or a .npz or .parquet file that it wrote.", "SOURCE"),
    model: Embeds = None,
    pid: int | None = opt(None, "Identity of all rows. Default: that of the data set, or unknown."),
    camera: str | None = opt(None, "Camera of all rows. Default: that of the data set."),
    time: str | None = opt(None, "When the images were taken, such as 2026-11-27T08:00. Default: now."),
    layout: Layout = None,
    split: Literal["query", "gallery", "train"] | None = opt(None, "Add only this part of a data set."),
    distance: Distance | None = opt(None, "Distance of a new gallery. Default: that of the model, Euclidean."),
    dtype: Literal["float32", "float16"] | None = opt(None, "Vectors of a new folder; float16 halves its size."),
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Add images or embeddings; the first call creates the gallery.

    Rows whose source is in the gallery are left out, so repeat an interrupted command: nothing is lost or doubled.

    - `pmm gallery add people crops/ --model model.onnx --camera lobby`
    - `pmm gallery add people embeddings.npz`
    """
    with progress() as report:
        opened = pmm_edge.open_gallery(gallery, model, distance=distance, dtype=dtype, device=device)
        done = opened.add(source, pids=pid, cameras=camera, times=time, layout=layout, split=split, report=report)
    print_json(done) if as_json else render.show_added(done, gallery)


@gallery_app.command("search")
def gallery_search(
    gallery: str = _gallery,
    query: Path = arg(..., "Image, folder or list of images, or a .npz or .parquet file of pmm embed.", "QUERY"),
    model: Embeds = None,
    top: int = opt(10, "Number of rows per query.", min=1),
    camera: list[str] | None = opt(None, "Search only this camera; may be repeated."),
    since: str | None = opt(None, "Search only rows from this time on, such as 2026-11-27T08:00."),
    before: str | None = opt(None, "Search only rows before this time."),
    fmr: float | None = opt(None, "False-match rate of the threshold. Default: 0.001, as far as calibrated."),
    exact: bool = opt(False, "Compare every row instead of using the index.", "--exact"),
    out: Path | None = out_opt(
        None, "Draw the rows whose sources are image files, of up to 100 queries.", "FILE.png|.jpg"
    ),
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Find the rows nearest to a query, and say which of them show the same person.

    With a calibrated model (pmm calibrate), rows within the threshold are the same person; if there are none, the
    verdict is nobody. The false-match rate applies to every row that is searched.

    - `pmm gallery search people query.jpg --model model.onnx --camera lobby --since 2026-11-27`
    """
    if out:
        check_output(out, (".png", ".jpg"))
    with progress() as report:
        opened = pmm_edge.open_gallery(gallery, model, device=device)
        found = opened.search(
            query, top=top, cameras=camera or None, since=since, before=before, fmr=fmr, exact=exact, report=report
        )
    if out:
        from pmm_edge.pictures.galleries import draw_search

        draw_search(found, out)
    print_json(list(map(render.search_facts, found))) if as_json else render.show_search(found)
    render.show_written(out)


@gallery_app.command("delete")
def gallery_delete(
    gallery: str = _gallery,
    pid: list[int] | None = opt(None, "Identity to delete; may be repeated."),
    source: list[str] | None = opt(None, "Source to delete, as pmm gallery search prints it; may be repeated."),
    older_than: str | None = opt(None, "Delete rows that are older, such as 30d, 12h or 90m.", metavar="AGE"),
    as_json: Json = False,
) -> None:
    """Delete the rows that meet all conditions, from the files as well, and check that none is left.

    - `pmm gallery delete people --pid 7`
    - `pmm gallery delete people --older-than 30d`
    """
    with progress() as report:
        opened = pmm_edge.open_gallery(gallery)
        count = opened.delete(pids=pid or None, sources=source or None, older_than=older_than, report=report)
    facts = {"deleted": count, "rows": opened.info().rows}
    print_json(facts) if as_json else print_line(f"deleted {count:,} rows; {facts['rows']:,} are left")
    if source and not count:
        note("[yellow]no row meets the conditions:[/] name a source exactly as pmm gallery search --json prints it")


@gallery_app.command("info")
def gallery_info(
    gallery: str = _gallery,
    check: bool = opt(False, "Also read all vectors and verify their checksums.", "--check"),
    as_json: Json = False,
) -> None:
    """Describe a gallery: rows, identities, cameras, times, model and index."""
    found = pmm_edge.open_gallery(gallery).info(check)
    print_json(found) if as_json else render.show_gallery(found)
