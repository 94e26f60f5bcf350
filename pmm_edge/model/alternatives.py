"""What the paper puts in the place of A-Hard-Mix (its table 3): mixing of images, and of their labels.

CutMix and A-CutMix change the images before the network sees them; stages II and III then read the map as it is.
CutOut (DeVries and Taylor, Improved Regularization of Convolutional Neural Networks with Cutout, 2017) mixes nothing:
it is the augmentation's erasing (`pmm_edge.data.augment`), of every image instead of half of them. The source lets the
square reach over the border; here it lies inside, and has the size that the paper's training erases anyway.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pmm_edge.model.backbone import STRIDE
from pmm_edge.model.mixing import draw_negatives, grad_cam, spread, top_blocks
from pmm_edge.model.network import average_pool

if TYPE_CHECKING:
    from pmm_edge.model.network import PMM


class MixedLabels(NamedTuple):
    """Two identities that share an image."""

    other: Tensor
    """(N,) int64, the identity whose pixels were pasted in."""
    share: Tensor
    """(N,) float32, the part of the image that it fills."""


def cutmix(images: Tensor, pids: Tensor, generator: torch.Generator) -> tuple[Tensor, MixedLabels]:
    """Paste a random box of another identity's image (Yun et al., CutMix, 2019).

    The box keeps the image's proportions and fills a share of it that is drawn uniformly for each sample, the
    source's Beta(1, 1). Cut at the border, it fills less; the labels follow what it really fills.

    Args:
        images: (N, 3, H, W).
        pids: (N,).
    """
    height, width = images.shape[-2:]
    negatives = draw_negatives(pids, generator)
    side, row, column = torch.rand(3, len(images), device=images.device, generator=generator).unbind()
    side = side.sqrt()
    pasted = _around(row, side, height)[:, :, None] & _around(column, side, width)[:, None, :]
    return _paste(images, pids, negatives, pasted[:, None])


def attentive_cutmix(
    images: Tensor, pids: Tensor, attention: Tensor, block_size: tuple[int, int], count: int, generator: torch.Generator
) -> tuple[Tensor, MixedLabels]:
    """Paste the most salient blocks of another identity's image (Walawalkar et al., Attentive CutMix, 2020).

    The source asks a network pretrained on ImageNet for the attention. Here the network in training answers, by
    Grad-CAM of its stage I, so that no second network is needed and attention means the same as in A-Hard-Mix.

    Args:
        images: (N, 3, H, W).
        attention: (N, h, w), Grad-CAM of the images as they are.
        block_size, count: on the map of h × w, as in A-Hard-Mix.
    """
    negatives = draw_negatives(pids, generator)
    salient = top_blocks(attention, block_size, count)[negatives]
    height, width = images.shape[-2:]  # the map's last row and column may reach over the border
    return _paste(images, pids, negatives, spread(salient, (STRIDE, STRIDE))[..., :height, :width])


def attention(network: PMM, images: Tensor, pids: Tensor) -> Tensor:
    """Grad-CAM of a network's stage I on images as they are: (N, 3, H, W) -> (N, h, w).

    In evaluation mode, so that batch statistics do not see these images twice in a step.
    """
    was_training = network.training
    network.eval()
    with torch.no_grad():
        features = network.backbone(images)
    pooled = average_pool(features).requires_grad_()
    with torch.enable_grad():
        cam = grad_cam(features, pooled, network.stage1(pooled)[1], pids)
    network.train(was_training)
    return cam


def _paste(images: Tensor, pids: Tensor, negatives: Tensor, pasted: Tensor) -> tuple[Tensor, MixedLabels]:
    share = pasted.float().mean(dim=(1, 2, 3))
    return torch.where(pasted, images[negatives], images), MixedLabels(pids[negatives], share)


def _around(draw: Tensor, side: Tensor, length: int) -> Tensor:
    """(N,) centres in [0, 1) and sides as shares -> (N, length) bool, True within the side."""
    centre, half = (draw * length)[:, None], (side * length / 2)[:, None]
    position = torch.arange(length, device=draw.device)[None] + 0.5
    return (position - centre).abs() <= half
