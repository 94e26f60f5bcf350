"""The networks that the paper compares PMM with (tables 2 and 3, figure 1): ResNet-50 + GAP, and BDB."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.resnet import Bottleneck

from pmm_edge.model.network import (
    STAGE_SIZE,
    Generator,
    Head,
    Negatives,
    ReidNetwork,
    StageOutput,
    average_pool,
    max_pool,
)


class Baseline(ReidNetwork):
    """ResNet + global average pooling.

    The paper does not say what follows the pooling. Here it is the head of PMM's stage I, so that the additional stages
    are the only difference.
    """

    def __init__(self, num_classes: int, backbone: str = "resnet50") -> None:
        super().__init__(backbone)
        self.stage1 = Head(self.backbone.channels, num_classes, init_mode="fan_in")
        self.average_heads = [self.stage1]

    def train_stages(
        self, features: Tensor, pids: Tensor, negatives: Negatives, generator: Generator
    ) -> tuple[StageOutput, ...]:
        return (StageOutput(*self.stage1(average_pool(features))),)


class BDB(ReidNetwork):
    """Batch DropBlock network (Dai et al., ICCV 2019): a global branch of size 512 and a part branch of size 1024.

    The part branch reads the bottleneck's map without one full-width stripe, the same for the whole batch. PMM splits
    this branch into its stages II and III, so both networks have the same layers except for one classifier's bias.
    """

    def __init__(self, num_classes: int, backbone: str = "resnet50") -> None:
        super().__init__(backbone)
        channels = self.backbone.channels
        self.bottleneck = Bottleneck(channels, channels // 4)
        self.stage1 = Head(channels, num_classes, init_mode="fan_in")
        self.part = Head(channels, num_classes, init_mode="fan_out", size=2 * STAGE_SIZE)
        self.average_heads, self.max_heads = [self.stage1], [self.part]

    def train_stages(
        self, features: Tensor, pids: Tensor, negatives: Negatives, generator: Generator
    ) -> tuple[StageOutput, ...]:
        dropped = drop_stripe(self.bottleneck(features), generator)
        return StageOutput(*self.stage1(average_pool(features))), StageOutput(*self.part(max_pool(dropped)))


def drop_stripe(features: Tensor, generator: Generator = None) -> Tensor:
    """Set one full-width stripe of a third of the height of (N, C, H, W) to 0, at one random position for all."""
    height = features.shape[2]
    stripe = round(height / 3)
    start = torch.rand(1, device=features.device, generator=generator) * (height - stripe + 1)
    row = torch.arange(height, device=features.device)
    inside = (row >= start.floor()) & (row < start.floor() + stripe)
    return features.masked_fill(inside[None, None, :, None], 0.0)
