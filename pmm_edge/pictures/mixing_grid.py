"""A-Hard-Mix: what stages II and III see in training, projected onto the pixels (paper section 2.2)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pmm_edge.data.dataset import Split
from pmm_edge.data.loader import identity_batches
from pmm_edge.images import read_crops
from pmm_edge.model import PMM, ReidNetwork
from pmm_edge.model.backbone import STRIDE
from pmm_edge.model.mixing import spread, top_blocks
from pmm_edge.pictures import UnsuitableError
from pmm_edge.pictures.attention import checkpoint_with_heads, overlay, training_classes
from pmm_edge.pictures.grid import Cell, enlarged, enlargement, grid
from pmm_edge.runtime.torch_backend import Preprocess, torch_device
from pmm_edge.spec import InputSpec

PEOPLE, IMAGES_EACH = 8, 4
"""Identities and images per identity of the batch, as in training; more identities if more are drawn."""
BLOCK = "#ffd60a"


@dataclass(frozen=True, eq=False)
class Mixing:
    """One training batch of B images, and what it becomes for stages II and III (the axis of size 2)."""

    crops: NDArray[np.uint8]
    """(B, H, W, 3) RGB anchors."""
    classes: NDArray[np.int64]
    """(B,)."""
    negatives: NDArray[np.int64]
    """(2, B), index of the image that each anchor was mixed with."""
    cams: NDArray[np.float32]
    """(2, B, h, w), Grad-CAM of the previous stage, which selects the blocks."""
    masks: NDArray[np.bool_]
    """(2, B, h, w), True where features were replaced."""
    block_size: tuple[int, int]

    @property
    def seen(self) -> NDArray[np.uint8]:
        """(2, B, H, W, 3), the anchor with the negative's pixels in the blocks; a position has STRIDE x STRIDE."""
        height, width = self.crops.shape[1:3]
        pixels = spread(torch.from_numpy(self.masks), (STRIDE, STRIDE))[..., :height, :width, None]
        return np.where(pixels.numpy(), self.crops[self.negatives], self.crops)


def mixing_grid(path: Path, train: Split, *, count: int = 6, seed: int = 0, device: str | None = None) -> Image.Image:
    """Draw the mixing of one batch, one row for each of `count` identities.

    `path` is a PMM checkpoint trained with A-Hard-Mix, `train` its training set; `seed` selects the batch and the
    negatives; `device` is as in `attention_of`.

    Raises UnsuitableError if the network does not mix features, was trained on other data, or is an export; DataError
    if an image cannot be read; ModelError if the file is not a checkpoint.
    """
    checkpoint = checkpoint_with_heads(path)
    network, size = checkpoint.network(), checkpoint.spec.input
    check_mixes(network)
    classes = training_classes(train.pids, checkpoint.spec, f"{train.paths[0].parent}")
    used = np.flatnonzero(classes >= 0)
    batches = identity_batches(classes[used], max(PEOPLE, count), IMAGES_EACH, np.random.default_rng(seed))
    if not batches:
        raise UnsuitableError(f"{path} was trained on one identity, and mixing needs two", "Name another checkpoint")
    chosen = used[batches[0]]
    crops = read_crops([train.paths[row] for row in chosen], size.height, size.width)
    found = mixed_batch(network, crops, classes[chosen], size, seed, torch_device(device))
    return draw_mixing(found, range(0, len(chosen), IMAGES_EACH)[:count])


def check_mixes(network: ReidNetwork) -> PMM:
    """Return the network if it was trained with A-Hard-Mix; raise UnsuitableError for others."""
    if isinstance(network, PMM) and network.mix == "a-hard-mix":
        return network
    what = f"a PMM with --mix {network.mix}" if isinstance(network, PMM) else f"a {type(network).__name__}"
    raise UnsuitableError(
        f"the network is {what}, whose training does not mix features by attention",
        "Name a PMM checkpoint trained with A-Hard-Mix; --what cams accepts any method",
    )


def mixed_batch(
    network: ReidNetwork,
    crops: NDArray[np.uint8],
    classes: NDArray[np.int64],
    size: InputSpec,
    seed: int,
    device: torch.device | None = None,
) -> Mixing:
    """Run the training forward pass of a PMM on a batch, without augmentation. The network is not changed.

    `crops` are (B, H, W, 3) uint8 RGB at network size, of two or more `classes` (B,); `seed` is for the negatives.
    """
    place = device or torch.device("cpu")
    trained = check_mixes(copy.deepcopy(network).to(place).train())  # a copy: this updates the running statistics
    images = Preprocess(replace(size, form="uint8")).to(place)(torch.from_numpy(crops).to(place))
    with torch.no_grad():  # Grad-CAM needs no gradient of the backbone
        features = trained.backbone(images)
    generator = torch.Generator(place).manual_seed(seed)
    pids = torch.from_numpy(classes).to(place)
    stages = trained.train_stages(features.requires_grad_(), pids, None, generator)[:2]
    cams = torch.stack([stage.cam for stage in stages])  # type: ignore[misc]  # of stages I and II
    masks = torch.stack([top_blocks(cam, trained.block_size, trained.mix_blocks)[:, 0] for cam in cams])
    negatives = torch.stack([stage.negatives for stage in stages])  # type: ignore[misc]
    maps = cams.float().cpu().numpy()
    return Mixing(crops, classes, negatives.cpu().numpy(), maps, masks.cpu().numpy(), trained.block_size)


def draw_mixing(found: Mixing, rows: Sequence[int]) -> Image.Image:
    """Draw one row per anchor: the anchor and, for each mixing, the map, the negative and the mixed image."""
    count = int(found.masks[0, 0].sum()) // (found.block_size[0] * found.block_size[1])
    blocks = "the most salient block" if count == 1 else f"the {count} most salient blocks"
    return grid(
        [_row(found, row) for row in rows],
        [
            "anchor",
            *("Grad-CAM\nof stage I", "negative", "input of\nstage II"),
            *("Grad-CAM\nof stage II", "negative", "input of\nstage III"),
        ],
        title="A-Hard-Mix: each stage loses what the previous stage looked at",
        notes=[
            f"Outlined: {blocks} of the true class's Grad-CAM, replaced by the same blocks of a negative (another"
            " identity); the anchor keeps its label. Features are mixed: each position is drawn on its"
            f" {STRIDE} x {STRIDE} pixels, although its receptive field is larger."
        ],
        wide_before=[1, 4],
    )


def _row(found: Mixing, row: int) -> list[Cell]:
    anchor = enlarged(Image.fromarray(found.crops[row]))
    cells = [Cell(anchor, f"class {found.classes[row]}")]
    for cams, negatives, masks, seen in zip(found.cams, found.negatives, found.masks, found.seen, strict=True):
        other = negatives[row]
        for picture, caption in (
            (overlay(anchor, cams[row]), ""),
            (enlarged(Image.fromarray(found.crops[other])), f"class {found.classes[other]}"),
            (enlarged(Image.fromarray(seen[row])), ""),
        ):
            _outline(picture, masks[row], found.block_size, STRIDE * enlargement(found.crops.shape[1]))
            cells.append(Cell(picture, caption))
    return cells


def _outline(picture: Image.Image, mask: NDArray[np.bool_], block_size: tuple[int, int], step: int) -> None:
    """Outline the replaced blocks; a position of the map covers step x step pixels."""
    draw = ImageDraw.Draw(picture)
    high, wide = block_size
    for y, x in np.argwhere(mask[::high, ::wide]).tolist():
        left, top = x * wide * step, y * high * step
        right, bottom = min(left + wide * step, picture.width) - 1, min(top + high * step, picture.height) - 1
        draw.rectangle((left, top, right, bottom), outline="black", width=5)
        draw.rectangle((left + 1, top + 1, right - 1, bottom - 1), outline=BLOCK, width=3)
