"""Attentive feature Hard-Mix: Grad-CAM, block ranking, mixing (paper section 2.2).

Every function works on a whole batch at once; nothing here loops over samples.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from torch import Tensor

from pmm_edge.errors import PmmError
from pmm_edge.model.backbone import STRIDE, map_size

PAPER_BLOCKS = 32
"""Blocks of 3×2 on the paper's 24×8 map: the grid for which its K = 3, 6, 8 are meant."""


def grad_cam(features: Tensor, pooled: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Grad-CAM of the target classes on the map that was pooled.

    The textbook weights channel c by the mean over positions of d logit / d features[c]. Average and max
    pooling are linear in the positions they pick, so that mean is (d logit / d pooled[c]) / (H W): the gradient
    is needed at the pooled vector only, one backward through a 512-wide head, never one through the backbone.

    Args:
        features: (N, C, H, W), the map.
        pooled: (N, C), its global average or max pooling, part of the graph that leads to `logits`.
        logits: (N, classes).
        targets: (N,) int64, the class whose evidence is mapped.

    Returns:
        (N, H, W), ReLU applied, not rescaled, detached.
    """
    evidence = logits.gather(1, targets[:, None]).sum()
    (gradient,) = torch.autograd.grad(evidence, pooled, retain_graph=True)
    height, width = features.shape[-2:]
    weights = gradient.to(features.dtype) / (height * width)
    return F.relu(torch.einsum("nc,nchw->nhw", weights, features.detach()))


def draw_negatives(pids: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """For each sample the index of one of another identity, uniformly, whatever the order of the batch.

    Args:
        pids: (N,) identities; on the CPU a batch of one identity is refused, on a GPU that check would wait
            for the device, and the sampler is trusted.

    Returns:
        (N,) int64.

    Raises:
        PmmError: the batch holds a single identity.
    """
    same = pids[:, None] == pids[None, :]
    if not pids.is_cuda and bool(same.all()):
        raise PmmError("a batch for mixing holds one identity only", "Put images of two or more identities in it")
    score = torch.rand(same.shape, device=pids.device, generator=generator)
    return score.masked_fill(same, -1.0).argmax(dim=1)


def top_blocks(cam: Tensor, block_size: tuple[int, int], count: int) -> Tensor:
    """The positions of the `count` blocks with the largest sum (paper equation 1, where they are 0).

    Args:
        cam: (N, H, W); H and W are multiples of the block's height and width.

    Returns:
        (N, 1, H, W) bool, True where the block is to be replaced.
    """
    sums = F.avg_pool2d(cam[:, None].float(), block_size, divisor_override=1)
    return highest_blocks(sums, block_size, count)


def random_blocks(
    features: Tensor, block_size: tuple[int, int], count: int, generator: torch.Generator | None = None
) -> Tensor:
    """DropBlock's mask: `count` blocks of each sample's map, drawn without looking (Ghiasi et al., 2018).

    The source drops squares around seeds at any position; here they are blocks of A-Hard-Mix's own grid and
    number, so that the two differ in what is compared: attention, and features of another person for zeros.

    Args:
        features: (N, C, H, W).

    Returns:
        (N, 1, H, W) bool, True where the map is to be dropped.
    """
    samples, _, height, width = features.shape
    grid = (samples, 1, height // block_size[0], width // block_size[1])
    return highest_blocks(torch.rand(grid, device=features.device, generator=generator), block_size, count)


def highest_blocks(scores: Tensor, block_size: tuple[int, int], count: int) -> Tensor:
    """Blocks with the highest scores, as positions: (N, 1, rows, columns) -> (N, 1, H, W) bool."""
    flat = scores.flatten(1)
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, flat.topk(count).indices, True)
    return spread(chosen.view(scores.shape), block_size)


def spread(grid: Tensor, factor: tuple[int, int]) -> Tensor:
    """Each entry of (N, 1, rows, columns) over `factor` rows and columns."""
    return grid.repeat_interleave(factor[0], 2).repeat_interleave(factor[1], 3)


def mix(features: Tensor, negatives: Tensor, replaced: Tensor) -> Tensor:
    """Replace the positions where `replaced` is True by those of the negative (paper equation 2).

    Args:
        features: (N, C, H, W).
        negatives: (N,) int64, the sample of the batch that each one is mixed with.
        replaced: (N, 1, H, W) bool.
    """
    # Whole samples, as they lie in channels-last memory: forward and backward take a third of `features[negatives]`.
    others = features.permute(0, 2, 3, 1).index_select(0, negatives).permute(0, 3, 1, 2)
    return torch.where(replaced, others, features)


def check_block_grid(height: int, width: int, block_size: tuple[int, int]) -> int:
    """The number of blocks on the map of an input of this size.

    Raises:
        PmmError: the map is no multiple of the block; the remedy names input sizes that fit.
    """
    (rows, columns), (block_height, block_width) = map_size(height, width), block_size
    if rows % block_height or columns % block_width:
        step_h, step_w = block_height * STRIDE, block_width * STRIDE
        near_h = [step_h * n for n in (height // step_h, height // step_h + 1) if n]
        near_w = [step_w * n for n in (width // step_w, width // step_w + 1) if n]
        raise PmmError(
            f"an input of {height}x{width} gives a {rows}x{columns} map, which blocks of {block_height}x{block_width}"
            " do not divide",
            f"Take a height that is a multiple of {step_h} (such as {' or '.join(map(str, near_h))}) and a width that"
            f" is a multiple of {step_w} (such as {' or '.join(map(str, near_w))})",
        )
    return rows * columns // (block_height * block_width)


def scaled_mix_blocks(k: int, blocks: float, meant_for: float = PAPER_BLOCKS) -> int:
    """K, meant for so many blocks, by default the paper's 32, in proportion to another number of them; at least 1."""
    return max(1, round(k * blocks / meant_for))
