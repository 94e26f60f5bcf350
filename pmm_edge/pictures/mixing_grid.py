"""A-Hard-Mix: what stages II and III see in training, projected onto the pixels (paper section 2.2)."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pmm_edge.data.dataset import Split
from pmm_edge.data.loader import Crops, identity_batches
from pmm_edge.errors import PmmWarning
from pmm_edge.images import Pixels
from pmm_edge.model import PMM, ReidNetwork
from pmm_edge.model.backbone import STRIDE
from pmm_edge.model.mixing import spread, top_blocks
from pmm_edge.pictures import UnsuitableError
from pmm_edge.pictures.attention import checkpoint_with_heads, overlay
from pmm_edge.pictures.grid import Cell, enlargement, grid
from pmm_edge.runtime.torch_backend import Preprocess, torch_device
from pmm_edge.spec import InputSpec
from pmm_edge.trainer.step import class_indices

PEOPLE, IMAGES_EACH = 8, 4
"""Identities and images per identity of the batch, as in training; more identities if more are drawn."""
BLOCK = "#ffd60a"


@dataclass(frozen=True, eq=False)
class Mixing:
    """One training batch of B images, and what it becomes for stages II and III (the axis of size 2)."""

    crops: Pixels
    """(B, H, W, 3) RGB anchors."""
    classes: NDArray[np.int64]
    """(B,)."""
    negatives: NDArray[np.int64]
    """(2, B), index of the image that each anchor was mixed with."""
    cams: NDArray[np.float32]
    """(2, B, h, w), Grad-CAM of the previous stage, which selects the blocks."""
    masks: NDArray[np.bool_]
    """(2, B, h, w), True where features were replaced."""
    seen: Pixels
    """(2, B, H, W, 3), the anchor with the negative's pixels in the blocks; a position has STRIDE x STRIDE."""
    block_size: tuple[int, int]


def mixing_grid(path: Path, train: Split, *, count: int = 6, seed: int = 0, device: str | None = None) -> Image.Image:
    """Draw the mixing of one batch, one row for each of `count` identities.

    `path` is a PMM checkpoint trained with A-Hard-Mix, `train` its training set; `seed` selects the batch and the
    negatives; `device` is as in `attention_of`.

    Replaces unreadable images as training does. Raises UnsuitableError if the network does not mix features, was
    trained on other data, or is an export; DataError if no image of an identity can be read; ModelError if the file is
    not a checkpoint.
    """
    checkpoint = checkpoint_with_heads(path)
    size, (used, classes) = checkpoint.spec.input, class_indices(train)
    if (people := len(np.unique(classes))) != checkpoint.spec.num_classes:
        problem = f"the network has {checkpoint.spec.num_classes:,} classes, the training set {people:,} identities"
        raise UnsuitableError(problem, "Name the data set it was trained on with --data")
    batch = identity_batches(classes, max(PEOPLE, count), IMAGES_EACH, np.random.default_rng(seed))[0]
    paths = [train.paths[row] for row in used]
    source = Crops(paths, size.height, size.width, cache_bytes=0, pids=train.pids[used])
    crops = source.batch(batch)
    for text in source.count_unreadable(source.take_unreadable(), len(used)):
        warnings.warn(text, PmmWarning, stacklevel=2)
    found = mixed_batch(checkpoint.network(), crops, classes[batch], size, seed, device)
    return draw_mixing(found, range(0, len(batch), IMAGES_EACH)[:count])


def mixed_batch(
    network: ReidNetwork,
    crops: Pixels,
    classes: NDArray[np.int64],
    size: InputSpec,
    seed: int,
    device: str | None = None,
) -> Mixing:
    """Run the training forward pass of a PMM on a batch, without augmentation. The network is not changed.

    `crops` are (B, H, W, 3) uint8 RGB at network size, of two or more `classes` (B,); `seed` is for the negatives.
    Raises UnsuitableError if the network was not trained with A-Hard-Mix.
    """
    if not isinstance(network, PMM) or network.mix != "a-hard-mix":
        what = f"a PMM with --mix {network.mix}" if isinstance(network, PMM) else f"a {type(network).__name__}"
        raise UnsuitableError(
            f"the network is {what}, whose training does not mix features by attention",
            "Name a PMM checkpoint trained with A-Hard-Mix; --what cams accepts any method",
        )
    place = torch_device(device)
    trained = copy.deepcopy(network).to(place).train()  # a copy: this updates the running statistics
    images = Preprocess(replace(size, form="uint8")).to(place)(torch.from_numpy(crops).to(place))
    with torch.no_grad():  # Grad-CAM needs no gradient of the backbone
        features = trained.backbone(images)
    generator = torch.Generator(place).manual_seed(seed)
    pids = torch.from_numpy(classes).to(place)
    stages = trained.train_stages(features.requires_grad_(), pids, None, generator)[:2]
    cams = torch.stack([stage.cam for stage in stages])  # type: ignore[misc]  # of stages I and II
    masks = torch.stack([top_blocks(cam, trained.block_size, trained.mix_blocks)[:, 0] for cam in cams]).cpu()
    negatives = torch.stack([stage.negatives for stage in stages]).cpu().numpy()  # type: ignore[misc]
    pixels = spread(masks, (STRIDE, STRIDE))[..., : size.height, : size.width, None].numpy()
    seen = np.where(pixels, crops[negatives], crops)
    return Mixing(crops, classes, negatives, cams.float().cpu().numpy(), masks.numpy(), seen, trained.block_size)


def draw_mixing(found: Mixing, rows: Sequence[int]) -> Image.Image:
    """Draw one row per anchor: the anchor and, for each mixing, the map, the negative and the mixed image."""
    factor, (high, wide) = enlargement(found.crops.shape[1]), found.block_size
    count, step = int(found.masks[0, 0].sum()) // (high * wide), factor * STRIDE

    def enlarged(pixels: Pixels) -> Image.Image:
        picture = Image.fromarray(pixels)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)

    lines = []
    for row in rows:
        anchor = enlarged(found.crops[row])
        lines.append([Cell(anchor, f"class {found.classes[row]}")])
        for cams, negatives, masks, seen in zip(found.cams, found.negatives, found.masks, found.seen, strict=True):
            negative = negatives[row]
            for picture, caption in (
                (overlay(anchor, cams[row]), ""),
                (enlarged(found.crops[negative]), f"class {found.classes[negative]}"),
                (enlarged(seen[row]), ""),
            ):
                draw = ImageDraw.Draw(picture)
                for y, x in np.argwhere(masks[row, ::high, ::wide]).tolist():  # outline the replaced blocks
                    left, top = x * wide * step, y * high * step
                    right = min(left + wide * step, picture.width) - 1
                    bottom = min(top + high * step, picture.height) - 1
                    draw.rectangle((left, top, right, bottom), outline="black", width=5)
                    draw.rectangle((left + 1, top + 1, right - 1, bottom - 1), outline=BLOCK, width=3)
                lines[-1].append(Cell(picture, caption))
    blocks = "the most salient block" if count == 1 else f"the {count} most salient blocks"
    first = ("Grad-CAM\nof stage I", "negative", "input of\nstage II")
    second = ("Grad-CAM\nof stage II", "negative", "input of\nstage III")
    return grid(
        lines,
        ["anchor", *first, *second],
        title="A-Hard-Mix: each stage loses what the previous stage looked at",
        note=f"Outlined: {blocks} of the true class's Grad-CAM, replaced by the same blocks of a negative (another"
        " identity); the anchor keeps its label. Features are mixed: each position is drawn on its"
        f" {STRIDE} x {STRIDE} pixels, although its receptive field is larger.",
        wide_before=[1, 4],
    )
