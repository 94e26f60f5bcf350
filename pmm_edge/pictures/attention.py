"""The error of a kind of picture that this model or these images do not allow, where another kind can be drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from pmm_edge.console import Report, silent
from pmm_edge.data.dataset import DISTRACTOR_PID
from pmm_edge.errors import PmmError
from pmm_edge.images import read_crop, read_crops
from pmm_edge.model import Checkpoint, ReidNetwork, load_checkpoint
from pmm_edge.model.mixing import grad_cam
from pmm_edge.model.network import Head, average_pool, max_pool
from pmm_edge.pictures.grid import Cell, enlargement, grid
from pmm_edge.runtime.torch_backend import Preprocess, torch_device
from pmm_edge.spec import InputSpec, ModelSpec


class UnsuitableError(PmmError):
    """Asked for every kind of picture, those that raise this are left out and the reason is told."""


def training_classes(pids: NDArray[np.int64], spec: ModelSpec, data: str) -> NDArray[np.int64]:
    """The class of each training image: identities numbered from 0 in their order, as training numbers them.

    Args:
        pids: (N,) of the whole training set.
        data: the data set, for messages.

    Returns:
        (N,) int64; -1 for junk and distractors, which no training uses.

    Raises:
        UnsuitableError: the network was not trained on as many people.
    """
    people = np.unique(pids[pids > DISTRACTOR_PID])
    if len(people) != spec.num_classes:
        raise UnsuitableError(
            f"the network knows {spec.num_classes:,} people, the training set of {data} shows {len(people):,}",
            "The classes of images are known for the data set that it was trained on: name that one with --data",
        )
    return np.where(pids > DISTRACTOR_PID, np.searchsorted(people, pids), -1)


_STOPS = (0.0, 0.25, 0.5, 0.75, 1.0)
_COLOURS = np.array([(30, 10, 70), (120, 28, 109), (206, 66, 58), (250, 153, 20), (252, 246, 130)], dtype=np.float64)
"""Dark violet, red, orange, light yellow: lightness rises all the way, so it reads without colour as well."""
_STRONGEST = 0.72
"""Opacity of the colour where the map is highest."""


def overlay(photo: Image.Image, cam: NDArray[np.float32]) -> Image.Image:
    """Lay a map over a photograph turned grey. The map's own maximum is the brightest colour.

    Args:
        cam: (h, w), not negative; spread smoothly over the photograph. A map of nothing but 0 colours nothing.
    """
    peak = float(cam.max())
    small = Image.fromarray((cam / peak if peak > 0 else cam).astype(np.float32))  # mode F
    heat = np.asarray(small.resize(photo.size, Image.Resampling.BILINEAR), dtype=np.float64)
    colour = np.stack([np.interp(heat, _STOPS, channel) for channel in _COLOURS.T], axis=2)
    opacity = _STRONGEST * np.sqrt(heat)[..., None]
    grey = np.asarray(photo.convert("L"), dtype=np.float64)[..., None]
    mixed = (1 - opacity) * grey + opacity * colour
    return Image.fromarray(mixed.round().astype(np.uint8))


@dataclass(frozen=True, eq=False)
class Overlap:
    """The overlap of a network's stages on N images, in 0..1. Fewer than two stages have no pair and no figure."""

    stages: tuple[str, ...]
    """Such as I, II, III."""
    per_image: NDArray[np.float64]
    """(N, pairs); NaN where one of the two maps is empty."""
    chance: float | None
    """The mean over the same pairs, but with the second map of another image: what overlaps in any case, because
    people stand in the middle of their crops. None for a single image."""
    empty: int
    """Images with a map that is 0 everywhere: no evidence for the class."""

    @property
    def images(self) -> int:
        return len(self.per_image)

    @property
    def pairs(self) -> tuple[str, ...]:
        """I-II, I-III, II-III: the columns of `per_image`."""
        return tuple(f"{first}-{second}" for first, second in combinations(self.stages, 2))

    @property
    def pair_means(self) -> dict[str, float | None]:
        """The mean over the images, for each pair."""
        return {pair: _mean(column) for pair, column in zip(self.pairs, self.per_image.T, strict=True)}

    @property
    def mean(self) -> float | None:
        """The mean of the pairs' means; None where there is no pair or no map."""
        means = list(self.pair_means.values())
        known = [value for value in means if value is not None]
        return float(np.mean(known)) if known and len(known) == len(means) else None

    def to_json(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "pairs": self.pair_means,
            "mean": self.mean,
            "chance": self.chance,
            "empty": self.empty,
        }


def overlap(maps: ArrayLike, stages: tuple[str, ...]) -> Overlap:
    """Histogram intersection of each pair of stages: the share of their attention that lies in the same places.

    With p = a / sum(a) and q = b / sum(b), it is sum over positions of min(p, q) = 1 - |p - q|_1 / 2: 1 for maps
    that are equal up to a factor, 0 for maps with no position in common (Swain and Ballard, Color Indexing, 1991).
    It has no threshold to choose, and does not depend on how strong a map is, only on where it is strong.

    Args:
        maps: (N, S, h, w), not negative, one for each stage; N >= 1.
        stages: the S names.
    """
    shares, filled = _shares(np.asarray(maps, dtype=np.float64))
    pairs = list(combinations(range(len(stages)), 2))
    # Half of the images away: neighbours in a data set are often the same person.
    moved = np.roll(np.arange(len(shares)), -(len(shares) // 2))
    same = [_intersection(shares[:, first], shares[:, second]) for first, second in pairs]
    other = [_intersection(shares[:, first], shares[moved, second]) for first, second in pairs]
    return Overlap(
        stages,
        np.stack(same, axis=1) if pairs else np.empty((len(shares), 0)),
        _mean(np.stack(other)) if pairs and len(shares) > 1 else None,
        int((~filled).any(axis=1).sum()),
    )


def _shares(maps: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(N, S, h, w) -> (N, S, h * w) that sum to 1, NaN for an empty map; (N, S) whether it is not empty."""
    flat = maps.reshape(*maps.shape[:2], -1)
    sums = flat.sum(axis=2, keepdims=True)
    return np.divide(flat, sums, out=np.full_like(flat, np.nan), where=sums > 0), sums[..., 0] > 0


def _intersection(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    shared: NDArray[np.float64] = np.minimum(first, second).sum(axis=1)
    return shared


def _mean(values: NDArray[np.float64]) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


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
