"""Attention of a network's stages: Grad-CAM maps, drawn over the images (paper figure 4), and how far they overlap."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from pmm_edge.console import Report, silent
from pmm_edge.images import read_crop, readable_crops
from pmm_edge.model import Checkpoint, ReidNetwork, load_checkpoint
from pmm_edge.model.mixing import grad_cam
from pmm_edge.pictures import UnsuitableError
from pmm_edge.pictures.grid import Cell, enlargement, grid
from pmm_edge.runtime.certificate import open_model
from pmm_edge.runtime.torch_backend import Preprocess, torch_device
from pmm_edge.spec import ModelSpec

BATCH = 32
COLUMNS = 8
"""Approximate number of pictures in a row."""
OPACITY = 0.72
"""Opacity at the maximum of a map."""


@dataclass(frozen=True, eq=False)
class Attention:
    """Grad-CAM of the S stages of one network for N image files."""

    spec: ModelSpec
    paths: Sequence[Path]
    maps: NDArray[np.float32]
    """(N, S, h, w), ReLU applied, not rescaled."""
    stages: tuple[str, ...]
    """Names of the stages."""
    classes: NDArray[np.int64]
    """(N, S), the class that each stage predicts, whose evidence the map shows."""


def stage_maps(network: ReidNetwork, images: Tensor) -> tuple[Tensor, Tensor]:
    """Grad-CAM of each stage for the class that it predicts, in evaluation mode: nothing is mixed or dropped.

    Each map lies on the features that its stage pools: the backbone's for average pooling, the extra bottleneck's for
    max pooling. A stage that pools a part of the map only, as in PCB, has its evidence in that part. PMM has three
    stages, BDB two, the baseline one, PCB six. `images` are (N, 3, H, W) float32, normalized. Returns (N, S, h, w)
    float32 maps and (N, S) int64 classes; the training mode of the network is restored.
    """
    was_training = network.training
    network.eval()
    with torch.no_grad():
        inputs = network.pooled(network.backbone(images))
    maps, classes = [], []
    for features, pooled, head, region in inputs:
        with torch.enable_grad():
            logits = head(pooled.requires_grad_())[1]
        classes.append(logits.argmax(dim=1))
        cam = grad_cam(features, pooled, logits, classes[-1])
        maps.append(cam if region is None else cam * region)
    network.train(was_training)
    return torch.stack(maps, dim=1), torch.stack(classes, dim=1)


def attention_of(
    checkpoint: Path, paths: Sequence[Path], *, device: str | None = None, report: Report = silent
) -> Attention:
    """Compute `stage_maps` of one or more image files, preprocessed as the checkpoint's spec says.

    `device` is `cpu`, `cuda` or `cuda:N`; None uses a GPU if there is one. Skips unreadable images with a warning.
    Raises what `checkpoint_with_heads` raises, DataError if no image can be read, ModelError for an unknown device.
    """
    loaded, place = checkpoint_with_heads(checkpoint), torch_device(device)
    network, size = loaded.network().to(place), loaded.spec.input
    prepare = Preprocess(replace(size, form="uint8")).to(place)
    maps, classes = [], []
    crops, rows = readable_crops(paths, size.height, size.width, "the picture")
    what = f"attention of {loaded.spec.architecture}"
    report(what, 0, len(crops))
    for start in range(0, len(crops), BATCH):
        batch = torch.from_numpy(crops[start : start + BATCH]).to(place)
        found, predicted = stage_maps(network, prepare(batch))
        maps.append(found.cpu().numpy())
        classes.append(predicted.cpu().numpy())
        report(what, start + len(batch), len(crops))
    return Attention(
        loaded.spec, [paths[row] for row in rows], np.concatenate(maps), tuple(network.stages), np.concatenate(classes)
    )


def checkpoint_with_heads(path: Path) -> Checkpoint:
    """Load a checkpoint with classifiers, which Grad-CAM needs.

    Raises UnsuitableError if the file is an export, and ModelError if it is missing or not a checkpoint.
    """
    if path.suffix in (".onnx", ".engine", ".safetensors"):
        raise UnsuitableError(
            f"{path} is an export without classifiers, and Grad-CAM needs their gradient",
            "Name the checkpoint it was exported from; --what galleries accepts exports",
        )
    return load_checkpoint(path, open_model(path).content)


def overlay(photo: Image.Image, cam: NDArray[np.float32]) -> Image.Image:
    """Draw a map (h, w) over the image in gray; its maximum gets the brightest color, and zeros add no color."""
    peak = float(cam.max())
    small = Image.fromarray((cam / peak if peak > 0 else cam).astype(np.float32))
    heat = np.asarray(small.resize(photo.size, Image.Resampling.BILINEAR))
    color = 255 * matplotlib.colormaps["inferno"](heat)[..., :3]  # lightness increases: readable without color
    opacity = OPACITY * np.sqrt(heat)[..., None]
    gray = np.asarray(photo.convert("L"), dtype=np.float64)[..., None]
    return Image.fromarray(((1 - opacity) * gray + opacity * color).round().astype(np.uint8))


def cam_grid(found: Attention, rows: Sequence[int] | NDArray[np.intp]) -> Image.Image:
    """Draw some of the images, each followed by the map of each stage; raise DataError if one cannot be read."""
    size, stages = found.spec.input, found.stages
    factor, columns = enlargement(size.height), 1 + len(stages)
    abreast = min(len(rows), max(1, COLUMNS // columns))
    lines: list[list[Cell]] = []
    for number, row in enumerate(rows):
        path = found.paths[row]
        photo = Image.fromarray(read_crop(path, factor * size.height, factor * size.width))
        if number % abreast == 0:
            lines.append([])
        lines[-1].append(Cell(photo, path.name))
        for cam, predicted in zip(found.maps[row], found.classes[row], strict=True):
            lines[-1].append(Cell(overlay(photo, cam), f"class {predicted}" if cam.any() else "no evidence"))
    return grid(
        lines,
        ["input", *(f"stage {stage}" for stage in stages)] * abreast,
        title=f"Grad-CAM of each stage of {found.spec.architecture}",
        note="Evidence for the class that each stage predicts, named below each map. Each map is scaled to its own"
        " maximum (yellow): compare where maps are bright, not how bright.",
        wide_before=range(columns, columns * abreast, columns),
    )


@dataclass(frozen=True)
class Overlap:
    """Overlap of the stages' attention on N images, in 0..1.

    `pairs` is the mean over the images for each pair of stages, such as I-II; None if every map of the pair is empty.
    `mean` is the mean over the pairs; None for fewer than two stages or if a pair is None. `chance` takes the second
    map from another image: the overlap to expect, because people stand in the middle of their crops. `empty` counts the
    images with a map that is zero everywhere, that is, without evidence for the class.
    """

    images: int
    pairs: dict[str, float | None]
    mean: float | None
    chance: float | None
    empty: int


def overlap(maps: ArrayLike, stages: tuple[str, ...]) -> Overlap:
    """Histogram intersection of each pair of stages: the share of their attention that lies in the same places.

    With p = a / sum(a) and q = b / sum(b), it is the sum over positions of min(p, q) = 1 - |p - q|_1 / 2: 1 for maps
    that are equal up to a factor, 0 for disjoint maps (Swain and Ballard, Color Indexing, 1991). It needs no threshold
    and does not depend on the strength of a map.

    `maps` are (N, S, h, w), not negative, of N >= 1 images; `stages` names the S stages.
    """
    array = np.asarray(maps, dtype=np.float64)
    flat = array.reshape(*array.shape[:2], -1)
    sums = flat.sum(axis=2, keepdims=True)
    shares = np.divide(flat, sums, out=np.full_like(flat, np.nan), where=sums > 0)
    moved = np.roll(np.arange(len(shares)), -(len(shares) // 2))  # neighbors in a data set often show the same person
    pairs: dict[str, float | None] = {}
    chances = []
    for first, second in combinations(range(len(stages)), 2):
        same = np.minimum(shares[:, first], shares[:, second]).sum(axis=1)
        pairs[f"{stages[first]}-{stages[second]}"] = _mean(same)
        chances.append(np.minimum(shares[:, first], shares[moved, second]).sum(axis=1))
    known = [value for value in pairs.values() if value is not None]
    mean = float(np.mean(known)) if known and len(known) == len(pairs) else None
    chance = _mean(np.stack(chances)) if chances and len(shares) > 1 else None
    return Overlap(len(shares), pairs, mean, chance, int((sums[..., 0] <= 0).any(axis=1).sum()))


def _mean(values: NDArray[np.float64]) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None
