"""Attentive feature Hard-Mix (A-Hard-Mix, paper section 2.2) and the mixes that table 3 compares it with.

A-Hard-Mix replaces salient blocks of the feature map, DropBlock sets random ones to 0, CutMix and A-CutMix change
images and labels. CutOut (DeVries and Taylor, 2017) is the augmentation's erasing, of every image.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from torch import Tensor

from pmm_edge.errors import PmmError
from pmm_edge.model.backbone import STRIDE, map_size

PAPER_BLOCKS = 32  # of 3x2 on the 24x8 map of the paper: the grid that its K = 3, 6, 8 refer to
Generator = torch.Generator | None


def grad_cam(features: Tensor, pooled: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Grad-CAM of the target class (Selvaraju et al., 2017) on the map that was pooled.

    Grad-CAM weights channel c by the mean over all positions of d logit / d features[c]. Average and max pooling are
    linear in the positions they select, so this mean is (d logit / d pooled[c]) / (H W). One backward pass through the
    head is enough; none goes through the backbone.

    `features` (N, C, H, W) were pooled to `pooled` (N, C), from which `logits` (N, classes) were computed. Returns
    (N, H, W) ReLU(sum_c weight[c] * features[c]) for the classes `targets` (N,), not rescaled, detached.
    """
    evidence = logits.gather(1, targets[:, None]).sum()
    (gradient,) = torch.autograd.grad(evidence, pooled, retain_graph=True)
    height, width = features.shape[-2:]
    weights = gradient.to(features.dtype) / (height * width)
    return F.relu(torch.einsum("nc,nchw->nhw", weights, features.detach()))


def draw_negatives(pids: Tensor, generator: Generator = None) -> Tensor:
    """For each sample, draw the index of a sample of another identity, uniformly: (N,) int64.

    Raises PmmError if the batch contains a single identity. On a GPU this is not checked: it would wait for the device.
    """
    same = pids[:, None] == pids[None, :]
    if not pids.is_cuda and bool(same.all()):
        raise PmmError("a batch contains a single identity, so there is no negative to mix", "Use two or more")
    score = torch.rand(same.shape, device=pids.device, generator=generator)
    return score.masked_fill(same, -1.0).argmax(dim=1)


def top_blocks(cam: Tensor, block_size: tuple[int, int], count: int) -> Tensor:
    """Select the `count` blocks with the largest sum (the zeros of the mask in paper equation 1).

    `cam` is (N, H, W), H and W multiples of the block size. Returns (N, 1, H, W) bool, True in the selected blocks.
    """
    sums = F.avg_pool2d(cam[:, None].float(), block_size, divisor_override=1)
    return _highest_blocks(sums, block_size, count)


def random_blocks(features: Tensor, block_size: tuple[int, int], count: int, generator: Generator = None) -> Tensor:
    """Select `count` random blocks of each sample (DropBlock, Ghiasi et al., 2018).

    DropBlock drops squares at any position. Here the blocks have the grid and number of A-Hard-Mix, which differs in
    the guidance by attention and the features of another identity only. Returns (N, 1, H, W) bool, True in the blocks.
    """
    samples, _, height, width = features.shape
    grid = (samples, 1, height // block_size[0], width // block_size[1])
    return _highest_blocks(torch.rand(grid, device=features.device, generator=generator), block_size, count)


def _highest_blocks(scores: Tensor, block_size: tuple[int, int], count: int) -> Tensor:
    """(N, 1, rows, columns) scores of blocks -> (N, 1, H, W) bool."""
    flat = scores.flatten(1)
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, flat.topk(count).indices, True)
    return spread(chosen.view(scores.shape), block_size)


def spread(grid: Tensor, factor: tuple[int, int]) -> Tensor:
    """Repeat each entry of (N, 1, rows, columns) over `factor` rows and columns."""
    return grid.repeat_interleave(factor[0], 2).repeat_interleave(factor[1], 3)


def mix(features: Tensor, negatives: Tensor, replaced: Tensor) -> Tensor:
    """Replace blocks of each map by the same blocks of its negative (paper equation 2).

    Returns features[negatives] where `replaced`, (N, 1, H, W) bool, is True, else features (N, C, H, W).
    """
    # Selecting whole samples in channels-last memory takes a third of the time of `features[negatives]`.
    others = features.permute(0, 2, 3, 1).index_select(0, negatives).permute(0, 3, 1, 2)
    return torch.where(replaced, others, features)


class MixedLabels(NamedTuple):
    """Labels of images that show two identities: the pasted one (N,) int64, and its share of the area (N,) float32."""

    other: Tensor
    share: Tensor


def cutmix(images: Tensor, pids: Tensor, generator: torch.Generator) -> tuple[Tensor, MixedLabels]:
    """Paste a random box of another identity's image (CutMix, Yun et al., 2019).

    The box has the proportions of the image. Its share of the area is drawn uniformly, the Beta(1, 1) of the source;
    clipped at the border it is smaller, and the labels follow. `images` are (N, 3, H, W), `pids` (N,) class indices.
    """
    negatives, inside = draw_negatives(pids, generator), []
    side, *centers = torch.rand(3, len(images), device=images.device, generator=generator).unbind()
    for center, length in zip(centers, images.shape[-2:], strict=True):
        middle, half = (center * length)[:, None], (side.sqrt() * length / 2)[:, None]
        position = torch.arange(length, device=images.device)[None] + 0.5
        inside.append((position - middle).abs() <= half)
    return _paste(images, pids, negatives, (inside[0][:, :, None] & inside[1][:, None, :])[:, None])


def attentive_cutmix(
    images: Tensor, pids: Tensor, attention: Tensor, block_size: tuple[int, int], count: int, generator: torch.Generator
) -> tuple[Tensor, MixedLabels]:
    """Paste the most salient blocks of another identity's image (A-CutMix, Walawalkar et al., 2020).

    The source takes the attention from a second network, pretrained on ImageNet. Here it is the Grad-CAM (N, h, w) of
    stage I for the unmixed images (N, 3, H, W), so that attention means the same as in A-Hard-Mix.
    """
    negatives = draw_negatives(pids, generator)
    salient = top_blocks(attention, block_size, count)[negatives]
    height, width = images.shape[-2:]  # the last row and column of the map may reach over the border
    return _paste(images, pids, negatives, spread(salient, (STRIDE, STRIDE))[..., :height, :width])


def _paste(images: Tensor, pids: Tensor, negatives: Tensor, pasted: Tensor) -> tuple[Tensor, MixedLabels]:
    share = pasted.float().mean(dim=(1, 2, 3))
    return torch.where(pasted, images[negatives], images), MixedLabels(pids[negatives], share)


def check_block_grid(height: int, width: int, block_size: tuple[int, int]) -> int:
    """Number of blocks on the map of an input of `height` x `width`. Raises PmmError if they do not divide the map."""
    (rows, columns), (block_height, block_width) = map_size(height, width), block_size
    if rows % block_height or columns % block_width:
        step_h, step_w = block_height * STRIDE, block_width * STRIDE
        near = f"{max(1, round(height / step_h)) * step_h}x{max(1, round(width / step_w)) * step_w}"
        raise PmmError(
            f"blocks of {block_height}x{block_width} do not divide the {rows}x{columns} map of {height}x{width} pixels",
            f"Choose multiples of {step_h} and {step_w}, such as {near}",
        )
    return rows * columns // (block_height * block_width)


def scaled_mix_blocks(k: int, blocks: float, k_blocks: float = PAPER_BLOCKS) -> int:
    """Scale K from a map of `k_blocks` blocks (the paper's 32 by default) to one of `blocks`; at least 1."""
    return max(1, round(k * blocks / k_blocks))
