"""Networks by name."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from pmm_edge.errors import PmmError
from pmm_edge.model.backbone import imagenet_weights, load_backbone_weights
from pmm_edge.model.baselines import BDB, Baseline
from pmm_edge.model.mixing import check_block_grid, scaled_mix_blocks
from pmm_edge.model.network import PMM, ReidNetwork
from pmm_edge.model.torch_file import read_torch_file
from pmm_edge.spec import Method, Mix

BLOCKWISE = ("a-hard-mix", "a-cutmix", "dropblock")
"""Mixes that choose blocks of the map."""
PAPER_K = 3
"""K of the paper for Market-1501, on a map of 32 blocks."""


def build_model(
    method: Method = "pmm",
    *,
    num_classes: int,
    backbone: str = "resnet50",
    height: int = 384,
    width: int = 128,
    mix: Mix = "a-hard-mix",
    mix_blocks: int | None = None,
    block_size: tuple[int, int] = (3, 2),
    pretrained: str | Path | None = None,
) -> ReidNetwork:
    """Build a network, its weights drawn from torch's global generator.

    Args:
        method: `pmm`, `bdb` or `baseline`.
        num_classes: identities of the training set.
        height, width: of the input in pixels; for PMM the blocks must divide its map.
        mix: what stages II and III of PMM are trained on; the others have none.
        mix_blocks: K; None scales the paper's 3 of 32 blocks (Market-1501) to the map.
        pretrained: of the backbone: `imagenet`, a file in torchvision's layout, or None.

    Raises:
        PmmError: an unknown name, an input whose map the blocks do not divide, a K that leaves no block, or weights
            that cannot be had.
    """
    network = _drawn(method, num_classes, backbone, height, width, mix, mix_blocks, block_size)
    if pretrained is not None:
        load_pretrained(network, backbone, pretrained)
    return network


def load_pretrained(network: ReidNetwork, backbone: str, pretrained: str | Path) -> None:
    """Load the weights of a network's backbone in place: `imagenet`, or a file in torchvision's layout.

    Raises:
        PmmError: they cannot be had, or are of another backbone.
    """
    weights = imagenet_weights(backbone) if pretrained == "imagenet" else read_torch_file(Path(pretrained))
    load_backbone_weights(network.backbone, weights)


def _drawn(
    method: Method,
    num_classes: int,
    backbone: str,
    height: int,
    width: int,
    mix: Mix,
    mix_blocks: int | None,
    block_size: tuple[int, int],
) -> ReidNetwork:
    if method not in get_args(Method):
        raise PmmError(f"method '{method}' is unknown", f"Choose {', '.join(get_args(Method))}")
    if mix not in get_args(Mix):
        raise PmmError(f"mix '{mix}' is unknown", f"Choose {', '.join(get_args(Mix))}")
    if method == "baseline":
        return Baseline(num_classes, backbone)
    if method == "bdb":
        return BDB(num_classes, backbone)
    if mix not in BLOCKWISE:
        return PMM(num_classes, backbone, mix=mix)
    blocks = check_block_grid(height, width, block_size)
    if mix_blocks is None:
        mix_blocks = scaled_mix_blocks(PAPER_K, blocks)
    if not 1 <= mix_blocks < blocks:
        raise PmmError(
            f"{mix_blocks} of {blocks} blocks cannot be replaced", f"Choose mix blocks from 1 to {blocks - 1}"
        )
    return PMM(num_classes, backbone, mix_blocks, block_size, mix)
