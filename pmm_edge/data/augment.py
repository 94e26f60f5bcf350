"""From uint8 crops to network input, a whole batch at once, on the device that trains."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from pmm_edge.spec import IMAGENET_MEAN, IMAGENET_STD

FLIP_PROBABILITY = 0.5
ERASE_PROBABILITY = 0.5


def normalize(crops: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 RGB -> (N, 3, H, W) float32 with ImageNet's mean and spread, in channels-last memory."""
    scale, shift = _imagenet(crops.device)
    # In place: on a CPU each pass over a batch of floats costs more than what it computes.
    return crops.float().mul_(scale).sub_(shift).permute(0, 3, 1, 2)


@cache  # made once for a device: copying a constant to a GPU waits for it
def _imagenet(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return (1 / (255 * std)).to(device), (mean / std).to(device)


def augment(
    crops: Tensor, erase_size: int, generator: torch.Generator, erase_probability: float = ERASE_PROBABILITY
) -> Tensor:
    """Flip, normalise and erase, each sample by its own draw (design of the paper's training, section 3.1).

    Args:
        crops: (N, H, W, 3) uint8 RGB.
        erase_size: side in pixels of the square that is set to 0, the mean colour; 64 in the paper's setting.
        generator: on the device of `crops`.

    Returns:
        (N, 3, H, W) float32, normalised.
    """
    draws = torch.rand(4, len(crops), device=crops.device, generator=generator)
    flipped = draws[0] < FLIP_PROBABILITY
    images = normalize(torch.where(flipped[:, None, None, None], crops.flip(2), crops))
    return _erase(images, draws[1] < erase_probability, draws[2], draws[3], erase_size)


def _erase(images: Tensor, chosen: Tensor, row_draw: Tensor, column_draw: Tensor, size: int) -> Tensor:
    height, width = images.shape[-2:]
    inside_rows = _square_side(row_draw, height, size)
    inside_columns = _square_side(column_draw, width, size)
    erased = inside_rows[:, :, None] & inside_columns[:, None, :] & chosen[:, None, None]
    return images.masked_fill_(erased[:, None], 0.0)


def _square_side(draw: Tensor, length: int, size: int) -> Tensor:
    """(N,) draws in [0, 1) -> (N, length) bool: True along a uniformly placed side that lies inside."""
    start = (draw * (length - size + 1)).long()[:, None]
    position = torch.arange(length, device=draw.device)[None]
    return (position >= start) & (position < start + size)
