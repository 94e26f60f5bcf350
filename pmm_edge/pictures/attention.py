"""Grad-CAM of every stage of a trained network, on any images: where each head finds its evidence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pmm_edge.images import read_crops
from pmm_edge.model import Checkpoint, ReidNetwork, load_checkpoint
from pmm_edge.model.mixing import grad_cam
from pmm_edge.model.network import Head
from pmm_edge.model.pooling import average_pool, max_pool
from pmm_edge.pictures.unsuitable import UnsuitableError
from pmm_edge.progress import Report, silent
from pmm_edge.runtime.torch_backend import Preprocess, torch_device

BATCH = 32


@dataclass(frozen=True, eq=False)
class Attention:
    """The stages' maps of N images, and the class whose evidence each one shows."""

    stages: tuple[str, ...]
    """Such as I, II, III."""
    maps: NDArray[np.float32]
    """(N, S, h, w), ReLU applied, not rescaled."""
    classes: NDArray[np.int64]
    """(N, S), indices of training identities."""

    def __getitem__(self, rows: NDArray[np.intp]) -> Attention:
        return Attention(self.stages, self.maps[rows], self.classes[rows])


def stage_maps(network: ReidNetwork, images: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Grad-CAM of each stage as the network is at test time: nothing mixed, nothing dropped (paper figure 4).

    Each stage's map lies on the features that it pools: the backbone's for average heads, the extra bottleneck's for
    the others. PMM has three, BDB two (global, part), the baseline one.

    Args:
        network: of any method; its mode is put back.
        images: (N, 3, H, W), normalised.
        targets: (N,) int64, the class whose evidence is mapped; None takes the one that each stage itself predicts,
            as the paper's figure does.

    Returns:
        (N, S, h, w) float32 maps, and their classes (N, S) int64.
    """
    was_training = network.training
    network.eval()
    maps, classes = [], []
    for features, pooled, head in _seen_by_heads(network, images):
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
    """`stage_maps` of image files, read and normalised as the checkpoint's spec says.

    Args:
        paths: at least one.
        targets: (N,) classes; None for those that the stages predict.
        device: `cpu`, `cuda` or `cuda:N`; None takes a GPU where there is one.

    Raises:
        DataError: an image cannot be read.
        ModelError: the weights are not those of the spec, or the device does not exist.
    """
    place = torch_device(device)
    network, size = checkpoint.network().to(place), checkpoint.spec.input
    prepare = Preprocess(replace(size, form="uint8")).to(place)
    maps, classes = [], []
    what = f"attention of {checkpoint.spec.architecture}"
    report(what, 0, len(paths))
    for start in range(0, len(paths), BATCH):
        crops = torch.from_numpy(read_crops(paths[start : start + BATCH], size.height, size.width)).to(place)
        asked = None if targets is None else torch.from_numpy(targets[start : start + BATCH]).to(place)
        found, chosen = stage_maps(network, prepare(crops), asked)
        maps.append(found.cpu().numpy())
        classes.append(chosen.cpu().numpy())
        report(what, start + len(crops), len(paths))
    return Attention(tuple(network.stages), np.concatenate(maps), np.concatenate(classes))


def checkpoint_with_heads(path: Path) -> Checkpoint:
    """Read a checkpoint that has its classifiers, from which attention is computed.

    Raises:
        UnsuitableError: the file is an export.
        ModelError: it is missing, truncated or no checkpoint of ours.
    """
    if path.suffix in (".onnx", ".engine", ".safetensors"):
        raise UnsuitableError(
            f"{path} is an export without classifiers, and attention is a gradient of theirs",
            "Name the checkpoint that it was made from, best.pt of its run; pmm visualize galleries takes exports",
        )
    return load_checkpoint(path)


def _seen_by_heads(network: ReidNetwork, images: Tensor) -> Iterator[tuple[Tensor, Tensor, Head]]:
    """The map, the vector pooled from it, and the head that reads the vector; without a graph."""
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
