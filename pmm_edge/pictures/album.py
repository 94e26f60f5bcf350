"""`pmm visualize`: choose images, draw every kind of picture that the model allows, and write the files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pmm_edge.console import Report, silent
from pmm_edge.data.dataset import ReidDataset, queries_with_match
from pmm_edge.errors import PmmError
from pmm_edge.files import check_place, encode_json, written_whole
from pmm_edge.images import evenly
from pmm_edge.pictures import UnsuitableError
from pmm_edge.pictures.galleries import MOST, TOP, gallery_grid
from pmm_edge.runs import data_of, resolve_checkpoint, run_of
from pmm_edge.runtime import load
from pmm_edge.runtime.listing import find_images

if TYPE_CHECKING:
    from pmm_edge.pictures.attention import Overlap

Kind = Literal["cams", "galleries", "mixing"]
OVERLAP_IMAGES = 256
"""Number of evenly spaced images that the overlap is measured on: a few seconds on a CPU."""


@dataclass
class Album:
    """The pictures that were written, and why the model or the images do not allow the kinds that were left out."""

    folder: Path
    files: dict[Kind, Path] = field(default_factory=dict)
    overlap: Overlap | None = None
    left_out: dict[Kind, str] = field(default_factory=dict)


def visualize(
    model: Path | str | None = None,
    *,
    what: Kind | Literal["all"] = "all",
    data: Path | None = None,
    layout: str | None = None,
    images: int = 6,
    top: int = TOP,
    seed: int = 0,
    out: Path | None = None,
    device: str | None = None,
    report: Report = silent,
) -> Album:
    """Write `cams.png` with `overlap.json`, `galleries.png` and `mixing.png`. Existing files are replaced.

    Args:
        model: a model or a run folder; default: the newest run.
        what: the kind of picture; `all` draws those that the model and the images allow.
        data: a data set, for `cams` also a folder or list of images or one image; default: the run's data set.
        layout: layout of the data set; None detects it.
        images: number of images, queries or anchors to draw; `top` is the number of hits per query.
        seed: selects the images and the negatives.
        out: folder to write; default: `pictures` in the run folder. `device` is as in `pmm_edge.load`.

    Skips unreadable images with a warning. Raises UnsuitableError if the kind, or every kind, cannot be drawn;
    DataError if no image can be read; ModelError if a file is not a model; OutputError if the folder cannot be written.
    """
    if not 1 <= images <= MOST or not 1 <= top <= MOST:
        raise PmmError(f"{images} images with {top} hits are out of range", f"Choose 1 to {MOST} of each")
    path = resolve_checkpoint(Path(model) if model else None)
    source, layout = data_of(path, data, layout)
    found = find_images(source, layout)
    album = Album(out or (run_of(path) or Path()) / "pictures")
    check_place(album.folder / "cams.png")

    def drawn(available: int) -> NDArray[np.intp]:
        """Random rows, ascending: nobody selects the images that look best."""
        return np.sort(np.random.default_rng(seed).permutation(available)[:images])

    def dataset() -> ReidDataset:
        if found.dataset is None:
            problem = f"{source} is not a data set, and these pictures need identities"
            raise UnsuitableError(problem, "Name a data set with --data; --what cams accepts any images")
        return found.dataset

    def cams() -> Image.Image:
        from pmm_edge.pictures.attention import attention_of, cam_grid, overlap

        paths = found.dataset.query.paths if found.dataset else found.paths
        paths = [paths[row] for row in evenly(len(paths), OVERLAP_IMAGES)]
        attention = attention_of(path, paths, device=device, report=report)
        album.overlap = overlap(attention.maps, attention.stages)
        return cam_grid(attention, drawn(len(attention.paths)))

    def galleries() -> Image.Image:
        valid = queries_with_match(labeled := dataset())
        if not len(valid):
            problem = f"no query of {source} has a match from another camera in the gallery"
            raise UnsuitableError(problem, f"Inspect it with pmm data {source}")
        return gallery_grid(load(path, device), labeled, valid[drawn(len(valid))], top=top, report=report)

    def mixing() -> Image.Image:
        from pmm_edge.pictures.mixing_grid import mixing_grid

        return mixing_grid(path, dataset().train, count=images, seed=seed, device=device)

    drawers = {"cams": cams, "galleries": galleries, "mixing": mixing}
    kinds: tuple[Kind, ...] = ("cams", "galleries", "mixing") if what == "all" else (what,)
    for kind in kinds:
        try:
            picture = drawers[kind]()
        except UnsuitableError as error:
            if kind == kinds[-1] and not album.files:
                raise
            album.left_out[kind] = str(error)
            continue
        album.files[kind] = album.folder / f"{kind}.png"
        with written_whole(album.files[kind]) as temporary:
            picture.save(temporary, format="PNG")
    if album.overlap:
        with written_whole(album.folder / "overlap.json") as temporary:
            temporary.write_text(encode_json(album.overlap), encoding="utf-8")
    return album
