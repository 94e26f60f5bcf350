"""`pmm visualize`: choose images, draw every kind of picture that the model allows, and write the files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pmm_edge.console import Report, silent
from pmm_edge.data.dataset import ReidDataset, queries_with_match, read
from pmm_edge.errors import DataError, PmmError
from pmm_edge.files import check_place, encode_json, written_whole
from pmm_edge.images import IMAGE_SUFFIXES, evenly
from pmm_edge.pictures import UnsuitableError
from pmm_edge.pictures.galleries import TOP, gallery_grid
from pmm_edge.pictures.overlap import Overlap, overlap
from pmm_edge.runs import data_of, resolve_checkpoint, run_of
from pmm_edge.runtime import load
from pmm_edge.runtime.embed_files import ImageList, find_images

Kind = Literal["cams", "galleries", "mixing"]
MOST = 100
OVERLAP_IMAGES = 256
"""Number of evenly spaced images that the overlap is measured on: a few seconds on a CPU."""


@dataclass(frozen=True, eq=False)
class Album:
    """The pictures that were written."""

    folder: Path
    files: dict[Kind, Path] = field(default_factory=dict)
    overlaps: list[tuple[Path, Overlap]] = field(default_factory=list)
    """For each checkpoint of the CAMs."""
    left_out: dict[Kind, str] = field(default_factory=dict)
    """Kinds that this model or these images do not allow, and why."""

    def to_json(self) -> dict[str, Any]:
        """Paths, overlaps and reasons."""
        return {"files": self.files, "overlap": self._overlap_json(), "left_out": self.left_out}

    def _overlap_json(self) -> list[dict[str, Any]]:
        return [{"model": path, "overlap": found} for path, found in self.overlaps]

    def tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Title, columns and rows of the overlap; empty for methods with a single stage."""
        pairs = list(dict.fromkeys(pair for _, found in self.overlaps for pair in found.pairs))
        rows = []
        for path, found in self.overlaps:
            values = [*map(found.pairs.get, pairs), found.mean, found.chance]
            shown = ["–" if value is None else f"{value:.3f}" for value in values]
            rows.append([path.resolve().parent.name, f"{found.images:,}", *shown])
        title = "overlap of the stages' attention; chance: between different images"
        return [(title, ["model", "images", *pairs, "mean", "chance"], rows)] if pairs else []


@dataclass(frozen=True)
class _Request:
    models: list[Path]
    source: Path
    layout: str | None
    images: ImageList
    count: int
    top: int
    seed: int
    true_class: bool
    device: str | None
    report: Report

    def draw(self, available: int) -> NDArray[np.intp]:
        """Random indices, ascending: nobody selects the images that look best."""
        return np.sort(np.random.default_rng(self.seed).permutation(available)[: self.count])

    def model_and_dataset(self) -> tuple[Path, ReidDataset]:
        """For pictures of one model that need identities; raises UnsuitableError."""
        if self.images.labels is None:
            raise UnsuitableError(
                f"{self.source} is not a data set, and these pictures need identities",
                "Name a data set with --data; --what cams accepts any images",
            )
        if len(self.models) != 1:
            raise UnsuitableError(f"these pictures need one model, not {len(self.models)}", "Name one model")
        return self.models[0], read(self.source, self.layout)


def visualize(
    models: Sequence[Path | str] | None = None,
    *,
    what: Kind | Literal["all"] = "all",
    data: Path | None = None,
    layout: str | None = None,
    images: int = 6,
    top: int = TOP,
    seed: int = 0,
    true_class: bool = False,
    out: Path | None = None,
    device: str | None = None,
    report: Report = silent,
) -> Album:
    """Write `cams.png` with `overlap.json`, `galleries.png` and `mixing.png`. Existing files are replaced.

    Args:
        models: one model or run folder, for `cams` also several checkpoints; default: the newest run.
        what: the kind of picture; `all` draws those that the model and the images allow.
        data: a data set, for `cams` also a folder or list of images or one image; default: the run's data set.
        layout: layout of the data set; None detects it.
        images: number of images, queries or anchors to draw; `top` is the number of hits per query.
        seed: selects the images and the negatives.
        true_class: explain the true class of training images instead of the predicted class of queries.
        out: folder to write; default: `pictures` in the run folder.
        device: as in `pmm_edge.load`.

    Raises UnsuitableError if the requested kind, or every kind, cannot be drawn; DataError if there are no images, or
    one cannot be read; ModelError if a file is not a model; OutputError if the folder cannot be written.
    """
    if not 1 <= images <= MOST or not 1 <= top <= MOST:
        raise PmmError(f"{images} images with {top} hits are out of range", f"Choose 1 to {MOST} of each")
    paths = [resolve_checkpoint(Path(path)) for path in models] if models else [resolve_checkpoint(None)]
    source, layout = data_of(paths[0], data, layout)
    one_image = source.is_file() and source.suffix.lower() in IMAGE_SUFFIXES
    found = ImageList("image", [source], [source.name]) if one_image else find_images(source, layout)
    album = Album(out or (run_of(paths[0]) or Path()) / "pictures")
    check_place(album.folder / "cams.png")
    request = _Request(paths, source, layout, found, images, top, seed, true_class, device, report)
    for kind in DRAWERS if what == "all" else (what,):
        try:
            picture, measured = DRAWERS[kind](request)
        except UnsuitableError as error:
            if what != "all" or (kind == "mixing" and not album.files):
                raise
            album.left_out[kind] = str(error)
            continue
        album.overlaps.extend(zip(paths, measured, strict=False))
        album.files[kind] = album.folder / f"{kind}.png"
        with written_whole(album.files[kind]) as temporary:
            picture.save(temporary, format="PNG")
    if album.overlaps:
        with written_whole(album.folder / "overlap.json") as temporary:
            temporary.write_text(encode_json(album._overlap_json()), encoding="utf-8")
    return album


Drawn = tuple[Image.Image, Sequence[Overlap]]


def _cams(request: _Request) -> Drawn:
    from pmm_edge.pictures.attention import attention_of, checkpoint_with_heads, draw_cams, training_classes

    checkpoints = [checkpoint_with_heads(path) for path in request.models]
    images, targets = request.images, None
    if not request.true_class:
        labels = images.labels
        rows = np.arange(len(images.paths)) if labels is None else np.flatnonzero(labels.split == "query")
        rows = rows[evenly(len(rows), OVERLAP_IMAGES)]
    elif images.labels is None:
        raise DataError(
            f"{request.source} is not a data set, so the true classes are unknown",
            "Leave --true-class out, or name the training data set with --data",
        )
    else:
        train = np.flatnonzero(images.labels.split == "train")
        pids = images.labels.pids[train]
        # All networks number the identities alike; each is checked.
        classes, *_ = [training_classes(pids, checkpoint.spec, str(request.source)) for checkpoint in checkpoints]
        known = np.flatnonzero(classes >= 0)
        known = known[evenly(len(known), OVERLAP_IMAGES)]
        rows, targets = train[known], classes[known]
    paths = [images.paths[row] for row in rows]
    found = [attention_of(each, paths, targets, device=request.device, report=request.report) for each in checkpoints]
    drawn = request.draw(len(paths))
    shown = [attention[drawn] for attention in found]
    picture = draw_cams([paths[at] for at in drawn], shown, request.models, true_class=request.true_class)
    return picture, [overlap(attention.maps, attention.stages) for attention in found]


def _galleries(request: _Request) -> Drawn:
    model, dataset = request.model_and_dataset()
    valid = queries_with_match(dataset)
    if not len(valid):
        raise UnsuitableError(
            f"no query of {request.source} has a match from another camera in the gallery",
            f"Inspect it with pmm data {request.source}",
        )
    queries = valid[request.draw(len(valid))]
    return gallery_grid(load(model, request.device), dataset, queries, top=request.top, report=request.report), []


def _mixing(request: _Request) -> Drawn:
    from pmm_edge.pictures.mixing_grid import mixing_grid

    model, dataset = request.model_and_dataset()
    return mixing_grid(model, dataset.train, count=request.count, seed=request.seed, device=request.device), []


DRAWERS: dict[Kind, Callable[[_Request], Drawn]] = {"cams": _cams, "galleries": _galleries, "mixing": _mixing}
