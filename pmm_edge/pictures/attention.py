"""Attention of a network's stages: Grad-CAM maps, drawn over the images (paper figure 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path

import matplotlib
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
from pmm_edge.model.network import average_pool, max_pool
from pmm_edge.pictures import UnsuitableError
from pmm_edge.pictures.grid import Cell, enlargement, grid
from pmm_edge.runtime.torch_backend import Preprocess, torch_device
from pmm_edge.spec import ModelSpec

BATCH = 32
METHODS = {"pmm": "PMM", "bdb": "BDB", "baseline": "Baseline"}
COLUMNS = 8
"""Approximate number of pictures in a row."""
OPACITY = 0.72
"""Opacity at the maximum of a map."""


@dataclass(frozen=True, eq=False)
class Attention:
    """Grad-CAM maps of the stages of one network for N images."""

    spec: ModelSpec
    maps: NDArray[np.float32]
    """(N, S, h, w) for the S stages, ReLU applied, not rescaled."""
    classes: NDArray[np.int64]
    """(N, S), the class whose evidence each map shows."""

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the S stages, such as I, II, III."""
        return tuple(self.spec.stages)

    def __getitem__(self, rows: NDArray[np.intp]) -> Attention:
        return replace(self, maps=self.maps[rows], classes=self.classes[rows])


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
    with torch.no_grad():
        features = network.backbone(images)
        inputs = [(features, average_pool(features), head) for head in network.average_heads]
        if network.max_heads:
            features = network.bottleneck(features)
            inputs += [(features, max_pool(features), head) for head in network.max_heads]
    maps, classes = [], []
    for features, pooled, head in inputs:
        with torch.enable_grad():
            logits = head(pooled.requires_grad_())[1]
        chosen = logits.argmax(dim=1) if targets is None else targets
        maps.append(grad_cam(features, pooled, logits, chosen))
        classes.append(chosen)
    network.train(was_training)
    return torch.stack(maps, dim=1), torch.stack(classes, dim=1)


def attention_of(
    checkpoint: Checkpoint,
    paths: Sequence[Path],
    targets: NDArray[np.int64] | None = None,
    *,
    device: str | None = None,
    report: Report = silent,
) -> Attention:
    """Compute `stage_maps` of one or more image files, preprocessed as the checkpoint's spec says.

    `targets` are (N,) classes, None for the predicted ones. `device` is `cpu`, `cuda` or `cuda:N`; None uses a GPU if
    there is one.

    Raises DataError if an image cannot be read, and ModelError if the weights do not match the spec or the device does
    not exist.
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
    return Attention(checkpoint.spec, np.concatenate(maps), np.concatenate(classes))


def checkpoint_with_heads(path: Path) -> Checkpoint:
    """Load a checkpoint with classifiers, which Grad-CAM needs.

    Raises UnsuitableError if the file is an export, and ModelError if it is missing or not a checkpoint.
    """
    if path.suffix in (".onnx", ".engine", ".safetensors"):
        raise UnsuitableError(
            f"{path} is an export without classifiers, and Grad-CAM needs their gradient",
            "Name the checkpoint it was exported from; --what galleries accepts exports",
        )
    return load_checkpoint(path)


def training_classes(pids: NDArray[np.int64], spec: ModelSpec, data: str) -> NDArray[np.int64]:
    """Class of each training image: identities numbered from 0 in ascending order, as in training.

    `pids` are those of the whole training set of the data set `data`. Returns (N,) int64; -1 for junk and distractors.
    Raises UnsuitableError if the network was trained on another number of identities.
    """
    people = np.unique(pids[pids > DISTRACTOR_PID])
    if len(people) != spec.num_classes:
        raise UnsuitableError(
            f"the network has {spec.num_classes:,} classes, the training set of {data} {len(people):,} identities",
            "Name the data set it was trained on with --data",
        )
    return np.where(pids > DISTRACTOR_PID, np.searchsorted(people, pids), -1)


def overlay(photo: Image.Image, cam: NDArray[np.float32]) -> Image.Image:
    """Draw a map (h, w) over the image in gray; its maximum gets the brightest color, and zeros add no color."""
    peak = float(cam.max())
    small = Image.fromarray((cam / peak if peak > 0 else cam).astype(np.float32))
    heat = np.asarray(small.resize(photo.size, Image.Resampling.BILINEAR))
    color = 255 * matplotlib.colormaps["inferno"](heat)[..., :3]  # lightness increases: readable without color
    opacity = OPACITY * np.sqrt(heat)[..., None]
    gray = np.asarray(photo.convert("L"), dtype=np.float64)[..., None]
    return Image.fromarray(((1 - opacity) * gray + opacity * color).round().astype(np.uint8))


def cam_grid(checkpoints: Path | Sequence[Path], paths: Sequence[Path], *, device: str | None = None) -> Image.Image:
    """Draw the Grad-CAM maps of each image for the classes that the stages predict.

    Takes one checkpoint, or several to compare, such as PMM, BDB and the baseline. Raises what `checkpoint_with_heads`
    and `attention_of` raise.
    """
    files = [checkpoints] if isinstance(checkpoints, Path) else list(checkpoints)
    return draw_cams(paths, [attention_of(checkpoint_with_heads(file), paths, device=device) for file in files], files)


def draw_cams(
    paths: Sequence[Path], networks: Sequence[Attention], checkpoints: Sequence[Path], *, true_class: bool = False
) -> Image.Image:
    """Draw maps of the same images for one or more networks; images are enlarged to the first one's multiple.

    `checkpoints` are the files of the networks, whose folders tell networks of one method apart. `true_class` is for
    the note. Raises DataError if an image cannot be read.
    """
    names = [METHODS[found.spec.architecture] for found in networks]
    if len(set(names)) < len(names):
        names = [f"{name} {path.resolve().parent.name}" for name, path in zip(names, checkpoints, strict=True)]
    size = networks[0].spec.input
    factor = enlargement(size.height)
    images = []
    for row, path in enumerate(paths):
        photo = Image.fromarray(read_crop(path, factor * size.height, factor * size.width))
        cells = [Cell(photo, path.name)]
        for found in networks:
            for cam, chosen in zip(found.maps[row], found.classes[row], strict=True):
                cells.append(Cell(overlay(photo, cam), f"class {chosen}" if cam.any() else "no evidence"))
        images.append(cells)
    compared = len(networks) > 1
    heads = ["input"]
    for found, name in zip(networks, names, strict=True):
        heads += [f"{name}\n{stage}" if compared else f"stage {stage}" for stage in found.stages]
    group = len(heads)  # columns per image
    groups = min(len(paths), max(1, COLUMNS // group))
    starts = [0, *accumulate([1, *(len(found.stages) for found in networks[:-1])])] if compared else [0]
    return grid(
        [list(chain(*images[start : start + groups])) for start in range(0, len(images), groups)],
        heads * groups,
        title=f"{', '.join(names)}: Grad-CAM of each stage",
        notes=[
            f"Evidence for {'the true class' if true_class else 'the class that each stage predicts'}, named below each"
            " map. Each map is scaled to its own maximum (yellow): compare where maps are bright, not how bright."
        ],
        wide_before=[start + at for start in range(0, group * groups, group) for at in starts if start + at],
    )
