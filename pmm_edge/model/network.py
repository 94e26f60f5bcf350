"""PMM: a backbone and three heads, each made to find what the one before it missed (paper section 2.1)."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from pmm_edge.errors import PmmError
from pmm_edge.model.backbone import Backbone
from pmm_edge.model.mixing import (
    check_block_grid,
    draw_negatives,
    grad_cam,
    mix,
    scaled_mix_blocks,
    top_blocks,
)

STAGE_SIZE = 512
"""Width of each stage's embedding."""


class StageOutput(NamedTuple):
    """What one stage gives in training."""

    embedding: Tensor
    """(N, 512), after ReLU; the triplet loss works on it."""
    logits: Tensor
    """(N, classes); the identity loss works on them."""
    cam: Tensor | None = None
    """(N, H, W), the Grad-CAM that guides the mixing for the next stage; None in the last."""
    negatives: Tensor | None = None
    """(N,) int64, the samples mixed in for the next stage; None in the last."""


class Head(nn.Module):
    """Reduction (linear, BN, ReLU) of a pooled vector to an embedding, and a linear classifier behind it.

    The released code has a 1×1 convolution in stage I, on a map of one position, and a linear layer in the
    others. Both are the same product; they differ in how they start (`init_mode`, of Kaiming's normal).
    """

    def __init__(
        self, channels: int, num_classes: int, init_mode: Literal["fan_in", "fan_out"], size: int = STAGE_SIZE
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, size)
        self.bn = nn.BatchNorm1d(size)
        self.classifier = nn.Linear(size, num_classes)
        nn.init.kaiming_normal_(self.linear.weight, mode=init_mode)
        nn.init.kaiming_normal_(self.classifier.weight, mode="fan_out")
        nn.init.zeros_(self.linear.bias)
        nn.init.zeros_(self.classifier.bias)
        nn.init.normal_(self.bn.weight, 1.0, 0.02)
        nn.init.zeros_(self.bn.bias)

    def embed(self, pooled: Tensor) -> Tensor:
        """(N, C) -> (N, size)."""
        return F.relu(self.bn(self.linear(pooled)))

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C) -> embedding (N, size), logits (N, classes)."""
        embedding = self.embed(pooled)
        return embedding, self.classifier(embedding)


class ReidNetwork(Protocol):
    """What training and export ask of a network, whatever the method."""

    backbone: Backbone
    stages: dict[str, tuple[int, int]]

    def __call__(
        self,
        images: Tensor,
        pids: Tensor | None = None,
        negatives: tuple[Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[StageOutput, ...] | Tensor: ...


class PMM(nn.Module):
    """Progressive Multi-stage feature Mix network.

    Stage I reads the average-pooled map of the backbone. Stages II and III read the max-pooled map of one extra
    bottleneck that they share; in training its most salient blocks, ranked by the Grad-CAM of the stage before,
    are first replaced by those of another identity. The embedding is [I, II, III], not normalised; its distance
    is Euclidean.

    Args:
        num_classes: identities of the training set.
        backbone: `resnet18`, `resnet34`, `resnet50` or `resnet101`.
        mix_blocks: K, the number of blocks replaced.
        block_size: (height, width) of a block on the map.
    """

    stages = {"I": (0, 512), "II": (512, 1024), "III": (1024, 1536)}  # noqa: RUF012

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        mix_blocks: int = 3,
        block_size: tuple[int, int] = (3, 2),
    ) -> None:
        super().__init__()
        self.backbone = Backbone(backbone)
        channels = self.backbone.channels
        self.bottleneck = Bottleneck(channels, channels // 4)
        self.stage1 = Head(channels, num_classes, init_mode="fan_in")
        self.stage2 = Head(channels, num_classes, init_mode="fan_out")
        self.stage3 = Head(channels, num_classes, init_mode="fan_out")
        self.mix_blocks = mix_blocks
        self.block_size = block_size

    def forward(
        self,
        images: Tensor,
        pids: Tensor | None = None,
        negatives: tuple[Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[StageOutput, StageOutput, StageOutput] | Tensor:
        """One step of training, or embeddings.

        Args:
            images: (N, 3, H, W) float, normalised.
            pids: (N,) int64 class indices; needed in training mode, ignored in evaluation mode.
            negatives: the samples to mix in for stages II and III, each (N,) int64; drawn when None.
            generator: of the drawing.

        Returns:
            In training mode the three stages' outputs, in evaluation mode embeddings (N, 1536) float32.

        Raises:
            PmmError: training mode without `pids`.
        """
        features = self.backbone(images)
        if not self.training:
            return self._embed(features)
        if pids is None:
            raise PmmError("training mode needs the identities of the images", "Pass pids, or call model.eval()")
        return self._train_stages(features, pids, negatives, generator)

    def _embed(self, features: Tensor) -> Tensor:
        average, maximum = average_pool(features), max_pool(self.bottleneck(features))
        parts = [self.stage1.embed(average), self.stage2.embed(maximum), self.stage3.embed(maximum)]
        return torch.cat(parts, dim=1).float()

    def _train_stages(
        self,
        features: Tensor,
        pids: Tensor,
        negatives: tuple[Tensor, Tensor] | None,
        generator: torch.Generator | None,
    ) -> tuple[StageOutput, StageOutput, StageOutput]:
        first, second = negatives or (draw_negatives(pids, generator), draw_negatives(pids, generator))
        unmixed = self.bottleneck(features)

        pooled = average_pool(features)
        embedding, logits = self.stage1(pooled)
        cam = grad_cam(features, pooled, logits, pids)
        stage1 = StageOutput(embedding, logits, cam, first)

        # The mask of stage II is applied to the unmixed map again for stage III: K blocks are replaced, not 2 K.
        mixed = mix(unmixed, first, top_blocks(cam, self.block_size, self.mix_blocks))
        pooled = max_pool(mixed)
        embedding, logits = self.stage2(pooled)
        cam = grad_cam(mixed, pooled, logits, pids)
        stage2 = StageOutput(embedding, logits, cam, second)

        mixed = mix(unmixed, second, top_blocks(cam, self.block_size, self.mix_blocks))
        stage3 = StageOutput(*self.stage3(max_pool(mixed)))
        return stage1, stage2, stage3


def average_pool(features: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C)."""
    return features.mean(dim=(2, 3))


def max_pool(features: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C). The gradient goes to one position of a channel, also where several are equal."""
    return F.adaptive_max_pool2d(features, 1).flatten(1)


def build_model(
    architecture: str = "pmm",
    *,
    num_classes: int,
    backbone: str = "resnet50",
    height: int = 384,
    width: int = 128,
    mix_blocks: int | None = None,
    block_size: tuple[int, int] = (3, 2),
) -> PMM:
    """Build a network, its weights drawn from torch's global generator.

    Args:
        architecture: `pmm`.
        num_classes: identities of the training set.
        height, width: of the input in pixels; the blocks must divide its map.
        mix_blocks: K; None scales the paper's 3 of 32 blocks (Market-1501) to the map.

    Raises:
        PmmError: an unknown name, an input whose map the blocks do not divide, or a K that leaves no block.
    """
    if architecture != "pmm":
        raise PmmError(f"architecture '{architecture}' is unknown", "Choose pmm")
    blocks = check_block_grid(height, width, block_size)
    if mix_blocks is None:
        mix_blocks = scaled_mix_blocks(3, blocks)
    if not 1 <= mix_blocks < blocks:
        raise PmmError(
            f"{mix_blocks} of {blocks} blocks cannot be replaced", f"Choose mix blocks from 1 to {blocks - 1}"
        )
    return PMM(num_classes, backbone, mix_blocks, block_size)
