"""Inputs and, beside each, where every stage of one network or of several finds its evidence (figures 1 and 4)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from pathlib import Path

from PIL import Image

from pmm_edge.images import read_crop
from pmm_edge.pictures.attention import Attention, attention_of, checkpoint_with_heads
from pmm_edge.pictures.grid import Cell, enlargement, grid
from pmm_edge.pictures.heat import overlay
from pmm_edge.spec import InputSpec, ModelSpec

_METHODS = {"pmm": "PMM", "bdb": "BDB", "baseline": "Baseline"}
_ACROSS = 8
"""Pictures in a row, about."""
_PREDICTED = "each stage's own predicted class"
_TRUE = "the true class"


def cam_grid(
    checkpoints: Path | Sequence[Path],
    paths: Sequence[Path],
    *,
    device: str | None = None,
) -> Image.Image:
    """Draw the stages' Grad-CAM maps, each for the class that it predicts, beside each image.

    Args:
        checkpoints: one of `pmm train`, or several to compare, such as of PMM, BDB and the baseline.
        paths: image files, at least one.

    Raises:
        DataError: an image cannot be read.
        ModelError, UnsuitableError: a file is no checkpoint.
    """
    files = [checkpoints] if isinstance(checkpoints, Path) else list(checkpoints)
    read = [checkpoint_with_heads(path) for path in files]
    found = [attention_of(checkpoint, paths, device=device) for checkpoint in read]
    photos = [photo_of(path, read[0].spec.input) for path in paths]
    names = names_of([checkpoint.spec for checkpoint in read], files)
    return draw_cams(photos, [path.name for path in paths], found, names)


def names_of(specs: Sequence[ModelSpec], paths: Sequence[Path]) -> list[str]:
    """The methods; with the names of their folders where one method comes twice."""
    methods = [_METHODS[spec.architecture] for spec in specs]
    if len(set(methods)) == len(methods):
        return methods
    return [f"{method} {path.resolve().parent.name}" for method, path in zip(methods, paths, strict=True)]


def photo_of(path: Path, size: InputSpec) -> Image.Image:
    """An image as large as one can look at, a whole number of times the network's input.

    Raises:
        DataError: it cannot be read.
    """
    factor = enlargement(size.height)
    return Image.fromarray(read_crop(path, factor * size.height, factor * size.width))


def draw_cams(
    photos: Sequence[Image.Image],
    captions: Sequence[str],
    networks: Sequence[Attention],
    names: Sequence[str],
    *,
    true_class: bool = False,
) -> Image.Image:
    """Draw maps that are already computed, of the same images for each network.

    Args:
        photos, captions: N of each.
        networks, names: one or more.
        true_class: whether the maps are of the images' true classes, for the text under them.
    """
    compared = len(networks) > 1
    counts = [len(found.stages) for found in networks]
    group = 1 + sum(counts)  # columns for an image; as many images side by side as fit
    groups = min(len(photos), max(1, _ACROSS // group))
    images = [
        [Cell(photo, caption), *(_stage(photo, found, row, s) for found in networks for s in range(len(found.stages)))]
        for row, (photo, caption) in enumerate(zip(photos, captions, strict=True))
    ]
    heads = ["input"]
    for found, name in zip(networks, names, strict=True):
        heads += [_head(name, stage, compared) for stage in found.stages]
    apart = [0, *accumulate([1, *counts[:-1]])] if compared else [0]
    return grid(
        [list(chain(*images[start : start + groups])) for start in range(0, len(images), groups)],
        heads * groups,
        title=f"{' · '.join(names)}: where each stage finds its evidence",
        notes=[
            f"Grad-CAM for {_TRUE if true_class else _PREDICTED}, written under the map. Bright yellow is each map's"
            " own maximum, grey is none: maps compare by where they are bright, not by how bright."
        ],
        wide_before=[start + column for start in range(0, group * groups, group) for column in apart if start + column],
    )


def _stage(photo: Image.Image, found: Attention, row: int, stage: int) -> Cell:
    cam = found.maps[row, stage]
    caption = f"class {found.classes[row, stage]}" if cam.any() else "no evidence"
    return Cell(overlay(photo, cam), caption)


def _head(name: str, stage: str, compared: bool) -> str:
    if not compared:
        return f"stage {stage}"
    return f"{name}\n{stage}" if " " in name else f"{name} {stage}"  # with its folder a name fills the line
