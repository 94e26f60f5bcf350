"""A-Hard-Mix at work: what stages II and III see in training, projected onto the pixels (paper section 2.2)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pmm_edge.console import Report, silent
from pmm_edge.data.dataset import Split
from pmm_edge.data.loader import identity_batches
from pmm_edge.images import read_crops
from pmm_edge.model import PMM, ReidNetwork
from pmm_edge.model.backbone import STRIDE
from pmm_edge.model.mixing import spread, top_blocks
from pmm_edge.pictures.attention import UnsuitableError, checkpoint_with_heads, overlay, training_classes
from pmm_edge.pictures.grid import Cell, enlarged, grid
from pmm_edge.runtime.torch_backend import Preprocess, torch_device
from pmm_edge.spec import InputSpec

PEOPLE, IMAGES_EACH = 8, 4
"""Of the batch: four images of each, as in training; of more people where more are drawn."""
_BLOCK = "#ffd60a"


@dataclass(frozen=True, eq=False)
class Mixing:
    """One batch of training: B images, and what became of each for stages II and III (the axis of 2)."""

    crops: NDArray[np.uint8]
    """(B, H, W, 3) RGB, the anchors."""
    classes: NDArray[np.int64]
    """(B,)."""
    negatives: NDArray[np.int64]
    """(2, B), which image of the batch each one was mixed with."""
    cams: NDArray[np.float32]
    """(2, B, h, w), the Grad-CAM of the stage before, which chose the blocks."""
    masks: NDArray[np.bool_]
    """(2, B, h, w), True where the map was replaced."""
    block_size: tuple[int, int]

    @property
    def pixel_masks(self) -> NDArray[np.bool_]:
        """(2, B, H, W): each position of the map over the STRIDE x STRIDE pixels that it lies on."""
        height, width = self.crops.shape[1:3]
        wide = spread(torch.from_numpy(self.masks), (STRIDE, STRIDE))
        return wide[..., :height, :width].numpy()

    @property
    def seen(self) -> NDArray[np.uint8]:
        """(2, B, H, W, 3), what stages II and III saw: the anchor with the negative's pixels in the blocks."""
        return np.where(self.pixel_masks[..., None], self.crops[self.negatives], self.crops)


def mixing_grid(
    path: Path,
    train: Split,
    *,
    count: int = 6,
    seed: int = 0,
    device: str | None = None,
    report: Report = silent,
) -> Image.Image:
    """Draw the mixing of one batch: a row for each of `count` people, at most those of the batch.

    Args:
        path: a PMM checkpoint, trained with A-Hard-Mix.
        train: the training set of its data set.
        seed: of the batch and of the negatives.

    Raises:
        UnsuitableError: the network does not mix features, was trained on another data set, or is an export.
        DataError: an image cannot be read.
        ModelError: the file is no checkpoint.
    """
    checkpoint = checkpoint_with_heads(path)
    network = checkpoint.network()
    check_mixes(network, path)
    classes = training_classes(train.pids, checkpoint.spec, f"{train.paths[0].parent}")
    used = np.flatnonzero(classes >= 0)
    batches = identity_batches(classes[used], max(PEOPLE, count), IMAGES_EACH, np.random.default_rng(seed))
    if not batches:
        raise UnsuitableError(f"{path} was trained on one person, and mixing takes two", "Name another checkpoint")
    chosen = used[batches[0]]
    report("mixing", 0, 1, f"a batch of {len(chosen)}")
    size = checkpoint.spec.input
    crops = read_crops([train.paths[row] for row in chosen], size.height, size.width)
    found = mixed_batch(network, crops, classes[chosen], size, seed, torch_device(device))
    report("mixing", 1, 1, f"a batch of {len(chosen)}")
    return draw_mixing(found, range(0, len(chosen), IMAGES_EACH)[:count])


def check_mixes(network: ReidNetwork, path: Path) -> None:
    """Refuse a network whose training replaces no blocks by attention.

    Raises:
        UnsuitableError: it is no PMM, or was trained with another mix.
    """
    if isinstance(network, PMM) and network.mix == "a-hard-mix":
        return
    what = f"is a PMM with --mix {network.mix}" if isinstance(network, PMM) else f"is a {type(network).__name__}"
    raise UnsuitableError(
        f"{path} {what}, whose training mixes no features by attention",
        "Name a checkpoint of PMM with A-Hard-Mix; pmm visualize cams takes any method",
    )


def mixed_batch(
    network: ReidNetwork,
    crops: NDArray[np.uint8],
    classes: NDArray[np.int64],
    size: InputSpec,
    seed: int,
    device: torch.device | None = None,
) -> Mixing:
    """Take a batch through the forward pass of training, as it stands in `pmm_edge.model`, in training mode.

    Only the augmentation is left out, so that the images are easy to read. The network given is not changed.

    Args:
        network: a PMM with A-Hard-Mix.
        crops: (B, H, W, 3) uint8 RGB at network size, of two or more classes.
        classes: (B,).
        seed: of the drawing of negatives.
    """
    place = device or torch.device("cpu")
    trained = copy.deepcopy(network).to(place).train()  # training mode updates the running statistics
    assert isinstance(trained, PMM)
    images = Preprocess(replace(size, form="uint8")).to(place)(torch.from_numpy(crops).to(place))
    pids = torch.from_numpy(classes).to(place)
    with torch.no_grad():  # the graph that Grad-CAM needs begins behind the backbone
        features = trained.backbone(images)
    generator = torch.Generator(place).manual_seed(seed)
    stages = trained.train_stages(features.requires_grad_(), pids, None, generator)[:2]
    cams = torch.stack([stage.cam for stage in stages])  # type: ignore[misc]  # of stages I and II
    masks = [top_blocks(cam, trained.block_size, trained.mix_blocks)[:, 0] for cam in cams]
    negatives = torch.stack([stage.negatives for stage in stages])  # type: ignore[misc]
    return Mixing(
        crops,
        classes,
        negatives.cpu().numpy(),
        cams.float().cpu().numpy(),
        torch.stack(masks).cpu().numpy(),
        trained.block_size,
    )


def draw_mixing(found: Mixing, rows: Sequence[int]) -> Image.Image:
    """Draw some images of a batch, a row each: the anchor, and for each mixing the map, the negative, the mixture."""
    count = int(found.masks[0, 0].sum()) // (found.block_size[0] * found.block_size[1])
    blocks = "the most salient block" if count == 1 else f"the {count} most salient blocks"
    return grid(
        [_row(found, row) for row in rows],
        [
            "anchor",
            *("Grad-CAM\nof stage I", "negative", "what stage II\nsaw"),
            *("Grad-CAM\nof stage II", "negative", "what stage III\nsaw"),
        ],
        title="Attentive feature Hard-Mix: each stage loses what the one before it looked at",
        notes=[
            f"Outlined: {blocks} of the true class's Grad-CAM, replaced by the same place of a negative, a sample of"
            " another identity; the anchor keeps its label. The mixing is of the feature map: each of its positions is"
            f" drawn on the {STRIDE} x {STRIDE} pixels where it lies, though it has seen more of the image than these."
        ],
        wide_before=[1, 4],
    )


def _row(found: Mixing, row: int) -> list[Cell]:
    anchor = enlarged(Image.fromarray(found.crops[row]))
    cells = [Cell(anchor, f"class {found.classes[row]}")]
    for turn in range(2):
        boxes, other = _boxes(found, turn, row), found.negatives[turn, row]
        pictures = [
            overlay(anchor, found.cams[turn, row]),
            enlarged(Image.fromarray(found.crops[other])),
            enlarged(Image.fromarray(found.seen[turn, row])),
        ]
        captions = ["", f"class {found.classes[other]}", ""]
        cells += [Cell(_outlined(picture, boxes), caption) for picture, caption in zip(pictures, captions, strict=True)]
    return cells


def _boxes(found: Mixing, turn: int, row: int) -> list[tuple[float, float, float, float]]:
    """Left, top, right and bottom of each replaced block, as shares of the image's width and height."""
    high, wide = found.block_size
    height, width = found.crops.shape[1:3]
    across, down = STRIDE / width, STRIDE / height
    return [
        (x * wide * across, y * high * down, min(1.0, (x + 1) * wide * across), min(1.0, (y + 1) * high * down))
        for y, x in np.argwhere(found.masks[turn, row, ::high, ::wide]).tolist()
    ]


def _outlined(picture: Image.Image, boxes: Sequence[tuple[float, float, float, float]]) -> Image.Image:
    drawn = picture.copy()
    draw = ImageDraw.Draw(drawn)
    for left, top, right, bottom in boxes:
        corners = (left * picture.width, top * picture.height, right * picture.width - 1, bottom * picture.height - 1)
        draw.rectangle(corners, outline="#000000", width=5)
        draw.rectangle([corners[0] + 1, corners[1] + 1, corners[2] - 1, corners[3] - 1], outline=_BLOCK, width=3)
    return drawn
