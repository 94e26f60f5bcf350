"""From uint8 crops to network input, a whole batch at once, on the device that trains.

A GPU takes each operation over the whole batch. A CPU takes one image after the other through all of them, for then
it stays in the processor's cache: the same operations on the same numbers, so the same bits.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from pmm_edge.spec import IMAGENET_MEAN, IMAGENET_STD

FLIP_PROBABILITY = 0.5
ERASE_PROBABILITY = 0.5


def normalize(crops: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 RGB -> (N, 3, H, W) float32 with ImageNet's mean and spread, in channels-last memory."""
    if crops.device.type != "cpu":
        return _normalized_at_once(crops)
    images = torch.empty(crops.shape)
    for crop, image in zip(crops, images, strict=True):
        _normalize_into(image, crop)
    return images.permute(0, 3, 1, 2)


def augment(
    crops: Tensor, erase_size: int, generator: torch.Generator, erase_probability: float = ERASE_PROBABILITY
) -> Tensor:
    """Flip, normalise and erase, each sample by its own draw (design of the paper's training, section 3.1).

    Args:
        crops: (N, H, W, 3) uint8 RGB.
        erase_size: side in pixels of the square that is set to 0, the mean colour; 64 in the paper's setting.
        generator: on the device of `crops`.

    Returns:
        (N, 3, H, W) float32, normalised, in channels-last memory.
    """
    draws = torch.rand(4, len(crops), device=crops.device, generator=generator)
    flipped, erased = draws[0] < FLIP_PROBABILITY, draws[1] < erase_probability
    height, width = crops.shape[1:3]
    rows, columns = _start(draws[2], height, erase_size), _start(draws[3], width, erase_size)
    way = augment_one_by_one if crops.device.type == "cpu" else augment_at_once
    return way(crops, flipped, erased, rows, columns, erase_size)


def augment_one_by_one(
    crops: Tensor, flipped: Tensor, erased: Tensor, rows: Tensor, columns: Tensor, size: int
) -> Tensor:
    """The way of a CPU.

    Args:
        flipped, erased: (N,) bool.
        rows, columns: (N,) int64, where a square of `size` begins.
    """
    images = torch.empty(crops.shape)
    draws = zip(flipped.tolist(), erased.tolist(), rows.tolist(), columns.tolist(), strict=True)
    for crop, image, (flip, erase, row, column) in zip(crops, images, draws, strict=True):
        _normalize_into(image, crop.flip(1) if flip else crop)
        if erase:
            image[row : row + size, column : column + size] = 0.0
    return images.permute(0, 3, 1, 2)


def augment_at_once(crops: Tensor, flipped: Tensor, erased: Tensor, rows: Tensor, columns: Tensor, size: int) -> Tensor:
    """The way of a GPU: nothing waits for it. Arguments as of `augment_one_by_one`."""
    images = _normalized_at_once(torch.where(flipped[:, None, None, None], crops.flip(2), crops))
    inside_rows, inside_columns = _side(rows, crops.shape[1], size), _side(columns, crops.shape[2], size)
    inside = inside_rows[:, :, None] & inside_columns[:, None, :] & erased[:, None, None]
    return images.masked_fill_(inside[:, None], 0.0)


def _normalized_at_once(crops: Tensor) -> Tensor:
    scale, shift = _imagenet(crops.device)
    return crops.float().mul_(scale).sub_(shift).permute(0, 3, 1, 2)


def _normalize_into(image: Tensor, crop: Tensor) -> None:
    """(H, W, 3) uint8 -> (H, W, 3) float32, contiguous."""
    height, width, _ = image.shape
    scale, shift = _imagenet_row(width)
    image.copy_(crop)
    image.view(height, 3 * width).mul_(scale).sub_(shift)  # whole rows: three channels alone do not fill a register


@cache  # made once for a device: copying a constant to a GPU waits for it
def _imagenet(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return (1 / (255 * std)).to(device), (mean / std).to(device)


@cache
def _imagenet_row(width: int) -> tuple[Tensor, Tensor]:
    scale, shift = _imagenet(torch.device("cpu"))
    return scale.repeat(width), shift.repeat(width)


def _start(draw: Tensor, length: int, size: int) -> Tensor:
    """(N,) draws in [0, 1) -> (N,) int64, where a uniformly placed side that lies inside begins."""
    return (draw * (length - size + 1)).long()


def _side(start: Tensor, length: int, size: int) -> Tensor:
    """(N,) int64 -> (N, length) bool: True along the side."""
    position = torch.arange(length, device=start.device)[None]
    return (position >= start[:, None]) & (position < start[:, None] + size)
