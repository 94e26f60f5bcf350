"""Attention of a network's stages: Grad-CAM maps, drawn over the images (paper figure 4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pmm_edge.console import Report, silent
from pmm_edge.data.dataset import DISTRACTOR_PID
from pmm_edge.images import read_crop, read_crops
from pmm_edge.model import Checkpoint, ReidNetwork, load_checkpoint
from pmm_edge.model.mixing import grad_cam
from pmm_edge.model.network import Head, average_pool, max_pool
from pmm_edge.pictures import UnsuitableError
from pmm_edge.pictures.grid import Cell, enlargement, grid
from pmm_edge.runtime.torch_backend import Preprocess, torch_device
from pmm_edge.spec import InputSpec, ModelSpec

BATCH = 32
METHODS = {"pmm": "PMM", "bdb": "BDB", "baseline": "Baseline"}
COLUMNS = 8
"""Approximate number of pictures in a row."""
STOPS = (0.0, 0.25, 0.5, 0.75, 1.0)
COLORS = np.array([(30, 10, 70), (120, 28, 109), (206, 66, 58), (250, 153, 20), (252, 246, 130)], dtype=np.float64)
"""Color map from dark violet to light yellow; lightness increases throughout, so it is readable without color."""
OPACITY = 0.72
"""Opacity at the maximum of a map."""


@dataclass(frozen=True, eq=False)
class Attention:
    """Grad-CAM maps of the stages for N images."""

    stages: tuple[str, ...]
    """Names of the S stages, such as I, II, III."""
    maps: NDArray[np.float32]
    """(N, S, h, w), ReLU applied, not rescaled."""
    classes: NDArray[np.int64]
    """(N, S), the class whose evidence each map shows."""

    def __getitem__(self, rows: NDArray[np.intp]) -> Attention:
        return Attention(self.stages, self.maps[rows], self.classes[rows])


def stage_maps(network: ReidNetwork, images: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Grad-CAM of each stage in evaluation mode: nothing is mixed or dropped.

    Each map lies on the features that its stage pools: the backbone's for average pooling, the extra bottleneck's for
    max pooling. PMM has three stages, BDB two, the baseline one.

    Args:
        network: any method; its training mode is restored.
        images: (N, 3, H, W) float32, normalized.
        targets: (N,) int64, the class to explain; None takes the class that each stage predicts, as in the paper.

    Returns:
        (N, S, h, w) float32 maps and (N, S) int64 classes.
    """
    was_training = network.training
    network.eval()
    maps, classes = [], []
    for features, pooled, head in _head_inputs(network, images):
        with torch.enable_grad():
            logits = head(pooled.requires_grad_())[1]
        chosen = logits.argmax(dim=1) if targets is None else targets
        maps.append(grad_cam(features, pooled, logits, chosen))
        classes.append(chosen)
    network.train(was_training)
    return torch.stack(maps, dim=1), torch.stack(classes, dim=1)


def _head_inputs(network: ReidNetwork, images: Tensor) -> Iterator[tuple[Tensor, Tensor, Head]]:
    """The feature map, the pooled vector and the head that reads it, for each stage."""
    with torch.no_grad():
        features = network.backbone(images)
        average = average_pool(features)
    for head in network.average_heads:
        yield features, average, head
    if network.max_heads:
        with torch.no_grad():
            features = network.bottleneck(features)
            maximum = max_pool(features)
        for head in network.max_heads:
            yield features, maximum, head


def attention_of(
    checkpoint: Checkpoint,
    paths: Sequence[Path],
    targets: NDArray[np.int64] | None = None,
    *,
    device: str | None = None,
    report: Report = silent,
) -> Attention:
    """Compute `stage_maps` of image files, preprocessed as the checkpoint's spec says.

    Args:
        checkpoint: with classifiers.
        paths: at least one.
        targets: (N,) classes; None for the predicted ones.
        device: `cpu`, `cuda` or `cuda:N`; None uses a GPU if there is one.
        report: progress.

    Raises:
        DataError: an image cannot be read.
        ModelError: the weights do not match the spec, or the device does not exist.
    """
    place = torch_device(device)
    network, size = checkpoint.network().to(place), checkpoint.spec.input
    prepare = Preprocess(replace(size, form="uint8")).to(place)
    maps, classes = [], []
    what = f"attention of {checkpoint.spec.architecture}"
    report(what, 0, len(paths))
    for start in range(0, len(paths), BATCH):
        crops = torch.from_numpy(read_crops(paths[start : start + BATCH], size.height, size.width)).to(place)
        chosen = None if targets is None else torch.from_numpy(targets[start : start + BATCH]).to(place)
        found, explained = stage_maps(network, prepare(crops), chosen)
        maps.append(found.cpu().numpy())
        classes.append(explained.cpu().numpy())
        report(what, start + len(crops), len(paths))
    return Attention(tuple(network.stages), np.concatenate(maps), np.concatenate(classes))


def checkpoint_with_heads(path: Path) -> Checkpoint:
    """Load a checkpoint with classifiers, which Grad-CAM needs.

    Raises:
        UnsuitableError: the file is an export.
        ModelError: it is missing, truncated or not a checkpoint.
    """
    if path.suffix in (".onnx", ".engine", ".safetensors"):
        raise UnsuitableError(
            f"{path} is an export without classifiers, and Grad-CAM needs their gradient",
            "Name the checkpoint it was exported from; --what galleries accepts exports",
        )
    return load_checkpoint(path)


def training_classes(pids: NDArray[np.int64], spec: ModelSpec, data: str) -> NDArray[np.int64]:
    """Class of each training image: identities numbered from 0 in ascending order, as in training.

    Args:
        pids: (N,) of the whole training set.
        spec: the spec of the checkpoint.
        data: the data set, for messages.

    Returns:
        (N,) int64; -1 for junk and distractors.

    Raises:
        UnsuitableError: the network was trained on another number of identities.
    """
    people = np.unique(pids[pids > DISTRACTOR_PID])
    if len(people) != spec.num_classes:
        raise UnsuitableError(
            f"the network has {spec.num_classes:,} classes, the training set of {data} {len(people):,} identities",
            "Name the data set it was trained on with --data",
        )
    return np.where(pids > DISTRACTOR_PID, np.searchsorted(people, pids), -1)


def overlay(photo: Image.Image, cam: NDArray[np.float32]) -> Image.Image:
    """Draw a map over the image in gray; the map's own maximum gets the brightest color.

    Args:
        photo: the image.
        cam: (h, w), not negative; a map of zeros adds no color.
    """
    peak = float(cam.max())
    small = Image.fromarray((cam / peak if peak > 0 else cam).astype(np.float32))
    heat = np.asarray(small.resize(photo.size, Image.Resampling.BILINEAR), dtype=np.float64)
    color = np.stack([np.interp(heat, STOPS, channel) for channel in COLORS.T], axis=2)
    opacity = OPACITY * np.sqrt(heat)[..., None]
    gray = np.asarray(photo.convert("L"), dtype=np.float64)[..., None]
    return Image.fromarray(((1 - opacity) * gray + opacity * color).round().astype(np.uint8))


def cam_grid(checkpoints: Path | Sequence[Path], paths: Sequence[Path], *, device: str | None = None) -> Image.Image:
    """Draw the Grad-CAM maps of each image for the classes that the stages predict.

    Args:
        checkpoints: one, or several to compare, such as PMM, BDB and the baseline.
        paths: image files, at least one.
        device: as in `attention_of`.

    Raises:
        DataError: an image cannot be read.
        ModelError: a file is not a checkpoint.
        UnsuitableError: a file is an export.
    """
    files = [checkpoints] if isinstance(checkpoints, Path) else list(checkpoints)
    read = [checkpoint_with_heads(path) for path in files]
    found = [attention_of(checkpoint, paths, device=device) for checkpoint in read]
    return draw_cams(paths, read[0].spec.input, found, names_of([checkpoint.spec for checkpoint in read], files))


def names_of(specs: Sequence[ModelSpec], paths: Sequence[Path]) -> list[str]:
    """Names of the methods, followed by the folder if a method appears twice."""
    methods = [METHODS[spec.architecture] for spec in specs]
    if len(set(methods)) == len(methods):
        return methods
    return [f"{method} {path.resolve().parent.name}" for method, path in zip(methods, paths, strict=True)]


def draw_cams(
    paths: Sequence[Path],
    size: InputSpec,
    networks: Sequence[Attention],
    names: Sequence[str],
    *,
    true_class: bool = False,
) -> Image.Image:
    """Draw maps of the same images for one or more networks.

    Args:
        paths: the N images.
        size: the input size; images are enlarged by a whole factor.
        networks: maps of each network.
        names: name of each network.
        true_class: whether the maps explain the true class, for the note.

    Raises:
        DataError: an image cannot be read.
    """
    factor = enlargement(size.height)
    counts = [len(found.stages) for found in networks]
    group = 1 + sum(counts)  # columns per image
    groups = min(len(paths), max(1, COLUMNS // group))
    images = []
    for row, path in enumerate(paths):
        photo = Image.fromarray(read_crop(path, factor * size.height, factor * size.width))
        cells = [Cell(photo, path.name)]
        for found in networks:
            for cam, chosen in zip(found.maps[row], found.classes[row], strict=True):
                cells.append(Cell(overlay(photo, cam), f"class {chosen}" if cam.any() else "no evidence"))
        images.append(cells)
    compared = len(networks) > 1
    heads = [
        f"{name}\n{stage}" if compared else f"stage {stage}"
        for found, name in zip(networks, names, strict=True)
        for stage in found.stages
    ]
    starts = [0, *accumulate([1, *counts[:-1]])] if compared else [0]
    return grid(
        [list(chain(*images[start : start + groups])) for start in range(0, len(images), groups)],
        ["input", *heads] * groups,
        title=f"{', '.join(names)}: Grad-CAM of each stage",
        notes=[
            f"Evidence for {'the true class' if true_class else 'the class that each stage predicts'}, named below each"
            " map. Each map is scaled to its own maximum (yellow): compare where maps are bright, not how bright."
        ],
        wide_before=[start + at for start in range(0, group * groups, group) for at in starts if start + at],
    )
