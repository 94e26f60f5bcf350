"""All pictures of a network in a folder: which images they show, and the files that hold them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pmm_edge.console import Report, silent
from pmm_edge.data.dataset import ReidDataset, queries_with_match, read
from pmm_edge.errors import DataError, OutputError, PmmError
from pmm_edge.files import written_whole
from pmm_edge.images import IMAGE_SUFFIXES, evenly
from pmm_edge.pictures.attention import Overlap, UnsuitableError, overlap
from pmm_edge.pictures.galleries import TOP, gallery_grid
from pmm_edge.runtime import load
from pmm_edge.runtime.embed_files import ImageList, find_images
from pmm_edge.spec import ModelSpec

Kind = Literal["cams", "galleries", "mixing"]
KINDS: tuple[Kind, ...] = get_args(Kind)
COUNT, MOST = 6, 100
OVERLAP_IMAGES = 256
"""The overlap is measured on so many images, spread evenly over the source: a few seconds on a CPU."""
OVERLAP_FILE = "overlap.json"


@dataclass(frozen=True)
class Request:
    """What to draw pictures of."""

    models: tuple[Path, ...]
    """One model; for cams also several checkpoints, to compare."""
    source: Path
    """A data set; for cams also any folder of images, a list of them, or an image."""
    layout: str | None = None
    """The data set's, where it is not recognised."""
    count: int = COUNT
    """Images, queries and anchors drawn."""
    top: int = TOP
    """Hits drawn for a query."""
    seed: int = 0
    """Of which images are drawn, and of the mixing's negatives."""
    true_class: bool = False
    """Attention for the true class, on training images, instead of the predicted one."""
    device: str | None = None


@dataclass(frozen=True, eq=False)
class Album:
    """What was written, measured, and left out."""

    files: dict[Kind, Path]
    overlaps: list[tuple[Path, Overlap]]
    """For each model of the cams."""
    left_out: dict[Kind, str]
    """Kinds that this model or these images do not allow, and why."""

    def to_json(self) -> dict[str, Any]:
        return {
            "files": {kind: str(path) for kind, path in self.files.items()},
            "overlap": [{"model": str(path), **found.to_json()} for path, found in self.overlaps],
            "left_out": dict(self.left_out),
        }


def write_album(request: Request, folder: Path, kinds: Sequence[Kind] | None = None, report: Report = silent) -> Album:
    """Write `cams.png`, `galleries.png` and `mixing.png`, and with cams `overlap.json`: how little the stages overlap.

    Each file is written as soon as it is drawn; older ones of the same name are replaced.

    Args:
        kinds: what to draw; None for all that the model and the images allow.

    Raises:
        UnsuitableError: a kind was asked for by name that cannot be drawn, or none can be.
        DataError: there are no images, or one of them cannot be read.
        ModelError: a file is no model.
        OutputError: the folder cannot be written.
    """
    if not 1 <= request.count <= MOST or not 1 <= request.top <= MOST:
        raise PmmError(f"{request.count} images, {request.top} hits cannot be drawn", f"Choose 1 to {MOST} of each")
    images = _images(request)
    _make(folder)
    files: dict[Kind, Path] = {}
    overlaps: list[tuple[Path, Overlap]] = []
    left_out: dict[Kind, str] = {}
    for kind in kinds or KINDS:
        try:
            picture, measured = _DRAWN_BY[kind](request, images, report)
        except UnsuitableError as error:
            if kinds or (kind == KINDS[-1] and not files):
                raise
            left_out[kind] = str(error)
            continue
        overlaps += zip(request.models, measured, strict=False)
        files[kind] = folder / f"{kind}.png"
        with written_whole(files[kind]) as temporary:
            picture.save(temporary, format="PNG")
    album = Album(files, overlaps, left_out)
    if overlaps:
        with written_whole(folder / OVERLAP_FILE) as temporary:
            temporary.write_text(json.dumps(album.to_json()["overlap"], indent=2) + "\n", encoding="utf-8")
    return album


Drawn = tuple[Image.Image, Sequence[Overlap]]


def _cams(request: Request, images: ImageList, report: Report) -> Drawn:
    from pmm_edge.pictures.attention import attention_of, checkpoint_with_heads, draw_cams, names_of, photo_of

    checkpoints = [checkpoint_with_heads(path) for path in request.models]
    rows, targets = _rows_for_cams(request, images, [checkpoint.spec for checkpoint in checkpoints])
    spread = evenly(len(rows), OVERLAP_IMAGES)
    paths, targets = [images.paths[rows[at]] for at in spread], None if targets is None else targets[spread]
    found = [attention_of(each, paths, targets, device=request.device, report=report) for each in checkpoints]
    drawn = _drawn(len(paths), request)
    shown = [paths[at] for at in drawn]
    picture = draw_cams(
        [photo_of(path, checkpoints[0].spec.input) for path in shown],
        [path.name for path in shown],
        [attention[drawn] for attention in found],
        names_of([checkpoint.spec for checkpoint in checkpoints], request.models),
        true_class=request.true_class,
    )
    return picture, [overlap(attention.maps, attention.stages) for attention in found]


def _rows_for_cams(
    request: Request, images: ImageList, specs: Sequence[ModelSpec]
) -> tuple[NDArray[np.intp], NDArray[np.int64] | None]:
    """Of which images attention is drawn and measured, and their true classes where these are asked for.

    Without labels all; of a data set the queries; for the true class the training images.
    """
    from pmm_edge.pictures.attention import training_classes

    labels = images.labels
    if not request.true_class:
        return np.arange(len(images.paths)) if labels is None else np.flatnonzero(labels.split == "query"), None
    if labels is None:
        raise DataError(
            f"{request.source} is no data set: who is on its images is not known",
            "Leave --true-class out, or name the data set of the training with --data",
        )
    train = np.flatnonzero(labels.split == "train")
    for spec in specs:  # all of them are numbered in the same way, or refused
        classes = training_classes(labels.pids[train], spec, str(request.source))
    return train[classes >= 0], classes[classes >= 0]


def _galleries(request: Request, images: ImageList, report: Report) -> Drawn:
    dataset = _dataset(request, images, "galleries")
    model = _one_model(request, "galleries")
    valid = queries_with_match(dataset)
    if not len(valid):
        raise UnsuitableError(
            f"no query of {request.source} has a match in the gallery from another camera",
            "pmm data says what the data set holds",
        )
    embedder = load(model, request.device)
    queries = valid[_drawn(len(valid), request)]
    return gallery_grid(embedder, dataset, queries, top=request.top, report=report), []


def _mixing(request: Request, images: ImageList, report: Report) -> Drawn:
    from pmm_edge.pictures.mixing_grid import mixing_grid

    dataset = _dataset(request, images, "the mixing")
    model = _one_model(request, "the mixing")
    picture = mixing_grid(
        model, dataset.train, count=request.count, seed=request.seed, device=request.device, report=report
    )
    return picture, []


_DRAWN_BY: dict[Kind, Callable[[Request, ImageList, Report], Drawn]] = {
    "cams": _cams,
    "galleries": _galleries,
    "mixing": _mixing,
}


def _drawn(available: int, request: Request) -> NDArray[np.intp]:
    """Which are drawn: by chance, so that nobody picks the pretty ones; the same for the same seed."""
    chosen = np.random.default_rng(request.seed).permutation(available)[: request.count]
    return np.sort(chosen)


def _images(request: Request) -> ImageList:
    source = request.source
    if source.is_file() and source.suffix.lower() in IMAGE_SUFFIXES:
        return ImageList("image", [source], [source.name])
    return find_images(source, request.layout)


def _dataset(request: Request, images: ImageList, what: str) -> ReidDataset:
    if images.labels is None:
        raise UnsuitableError(
            f"{request.source} is no data set: {what} must know who is on each image",
            "Name a data set with --data; pmm visualize cams takes any images",
        )
    return read(request.source, request.layout)


def _one_model(request: Request, what: str) -> Path:
    if len(request.models) != 1:
        raise UnsuitableError(f"{what} are drawn of one model, {len(request.models)} were named", "Name one")
    return request.models[0]


def _make(folder: Path) -> None:
    """Refuse a folder that cannot be written before work of minutes, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}", "Choose another folder with --out") from error
