"""What the paper compares PMM with (its tables 2 and 3, figure 1): ResNet-50 + GAP, and BDB."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.resnet import Bottleneck

from pmm_edge.model.network import STAGE_SIZE, Head, ReidNetwork, StageOutput, average_pool, max_pool

DROPPED_HEIGHT = 1 / 3
"""The share of the map's height that BDB drops."""


class Baseline(ReidNetwork):
    """ResNet + global average pooling: PMM's stage I alone.

    The paper does not say what follows its baseline's pooling. The reading here gives it PMM's own first head, so
    that what the other stages add is all that differs.
    """

    def __init__(self, num_classes: int, backbone: str = "resnet50") -> None:
        super().__init__(backbone)
        self.stage1 = Head(self.backbone.channels, num_classes, init_mode="fan_in")

    @property
    def average_heads(self) -> list[Head]:
        return [self.stage1]

    def train_stages(
        self,
        features: Tensor,
        pids: Tensor,
        negatives: tuple[Tensor, Tensor] | None,
        generator: torch.Generator | None,
    ) -> tuple[StageOutput, ...]:
        return (StageOutput(*self.stage1(average_pool(features))),)


class BDB(ReidNetwork):
    """Batch DropBlock network (Dai et al., ICCV 2019): a global branch of 512 and a part branch of 1024.

    The part branch sees the bottleneck's map without one full-width stripe, the same for the whole batch. PMM
    splits this branch into its stages II and III, so both networks have the same layers but for a classifier's bias.
    """

    def __init__(self, num_classes: int, backbone: str = "resnet50") -> None:
        super().__init__(backbone)
        channels = self.backbone.channels
        self.bottleneck = Bottleneck(channels, channels // 4)
        self.stage1 = Head(channels, num_classes, init_mode="fan_in")
        self.part = Head(channels, num_classes, init_mode="fan_out", size=2 * STAGE_SIZE)

    @property
    def average_heads(self) -> list[Head]:
        return [self.stage1]

    @property
    def max_heads(self) -> list[Head]:
        return [self.part]

    def train_stages(
        self,
        features: Tensor,
        pids: Tensor,
        negatives: tuple[Tensor, Tensor] | None,
        generator: torch.Generator | None,
    ) -> tuple[StageOutput, ...]:
        dropped = drop_stripe(self.bottleneck(features), generator)
        return StageOutput(*self.stage1(average_pool(features))), StageOutput(*self.part(max_pool(dropped)))


def drop_stripe(features: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Zero one stripe of a third of the height, at one random place for the whole batch: (N, C, H, W)."""
    height = features.shape[2]
    stripe = round(height * DROPPED_HEIGHT)
    start = torch.rand(1, device=features.device, generator=generator) * (height - stripe + 1)
    row = torch.arange(height, device=features.device)
    inside = (row >= start.floor()) & (row < start.floor() + stripe)
    return features.masked_fill(inside[None, None, :, None], 0.0)
