"""Augment and normalize batches of uint8 crops on the training device.

A GPU processes the whole batch in each operation, a CPU one image at a time, which stays in its cache: identical bits.
"""

from functools import cache

import torch
from torch import Tensor

from pmm_edge.spec import IMAGENET_MEAN, IMAGENET_STD

FLIP_PROBABILITY = 0.5
ERASE_PROBABILITY = 0.5


def normalize(crops: Tensor) -> Tensor:
    """Normalize with the ImageNet mean and standard deviation.

    (N, H, W, 3) uint8 RGB -> (N, 3, H, W) float32, channels-last in memory.
    """
    scale, shift = _scale_and_shift(crops.device, crops.shape[2])
    images = crops.contiguous().to(torch.float32, copy=True)
    images.flatten(2).mul_(scale).sub_(shift)  # whole rows use SIMD, three channels do not
    return images.permute(0, 3, 1, 2)


def augment(
    crops: Tensor,
    erase_size: int,
    generator: torch.Generator,
    erase_probability: float = ERASE_PROBABILITY,
    corners: Tensor | None = None,
) -> Tensor:
    """Flip, normalize and erase each image at random (paper, section 3.1).

    (N, H, W, 3) uint8 RGB -> (N, 3, H, W) float32, channels-last in memory. With `erase_probability`, an image loses a
    square of `erase_size` pixels (64 in the paper), set to 0, the mean color. `generator` is on the device of `crops`.
    `corners` (N, 2) int64 are the row and column of the squares on the unflipped images; they are drawn if None.
    """
    draws = torch.rand(4, len(crops), device=crops.device, generator=generator)
    flipped, erased = draws[0] < FLIP_PROBABILITY, draws[1] < erase_probability
    rows, columns = ((draws[2 + axis] * (crops.shape[1 + axis] - erase_size + 1)).long() for axis in (0, 1))
    if corners is not None:
        rows, columns = corners.unbind(dim=1)
        columns = torch.where(flipped, crops.shape[2] - erase_size - columns, columns)
    apply = augment_each if crops.device.type == "cpu" else augment_batch
    return apply(crops, flipped, erased, rows, columns, erase_size)


def augment_each(crops: Tensor, flipped: Tensor, erased: Tensor, rows: Tensor, columns: Tensor, size: int) -> Tensor:
    """Augment one image at a time, for CPUs.

    `flipped` and `erased` are (N,) bool; `rows` and `columns` are (N,) int64, the top left corner of the square.
    """
    images = torch.empty(crops.shape)
    scale, shift = _scale_and_shift(crops.device, crops.shape[2])
    draws = zip(flipped.tolist(), erased.tolist(), rows.tolist(), columns.tolist(), strict=True)
    for crop, image, (flip, erase, row, column) in zip(crops, images, draws, strict=True):
        image.copy_(crop.flip(1) if flip else crop)
        image.view(len(image), -1).mul_(scale).sub_(shift)
        if erase:
            image[row : row + size, column : column + size] = 0.0
    return images.permute(0, 3, 1, 2)


def augment_batch(crops: Tensor, flipped: Tensor, erased: Tensor, rows: Tensor, columns: Tensor, size: int) -> Tensor:
    """Augment the whole batch at once without synchronizing, for GPUs. Arguments as in `augment_each`."""
    images = normalize(torch.where(flipped[:, None, None, None], crops.flip(2), crops))
    y, x = (torch.arange(length, device=crops.device) for length in crops.shape[1:3])
    in_rows = (y >= rows[:, None]) & (y < rows[:, None] + size)
    in_columns = (x >= columns[:, None]) & (x < columns[:, None] + size)
    square = in_rows[:, :, None] & in_columns[:, None, :] & erased[:, None, None]
    return images.masked_fill_(square[:, None], 0.0)


@cache  # once for each device and width: copying a constant to a GPU synchronizes
def _scale_and_shift(device: torch.device, pixels: int) -> tuple[Tensor, Tensor]:
    """The factors of `x * scale - shift`, equal to `(x / 255 - mean) / std`; (3 * pixels,) each."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return (1 / (255 * std)).repeat(pixels).to(device), (mean / std).repeat(pixels).to(device)
