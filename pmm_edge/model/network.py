"""The two global poolings of the paper (section 2.1)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from pmm_edge.errors import PmmError
from pmm_edge.model.backbone import Backbone
from pmm_edge.model.mixing import draw_negatives, grad_cam, mix, random_blocks, top_blocks


def average_pool(features: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C)."""
    return features.mean(dim=(2, 3))


def max_pool(features: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C). The gradient goes to one position of a channel, also where several are equal."""
    if torch.are_deterministic_algorithms_enabled():  # the pooling's gradient has no such algorithm on a GPU
        return features.flatten(2).max(dim=2).values
    return F.adaptive_max_pool2d(features, 1).flatten(1)


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
        self.size = size
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


class ReidNetwork(nn.Module, ABC):
    """A backbone, heads on its average-pooled map, and heads on the max-pooled map of an extra bottleneck.

    The embedding is the heads' embeddings side by side, not normalised; its distance is Euclidean. Methods differ
    in their heads, and in what training does to the maps (`train_stages`).

    Args:
        backbone: `resnet18`, `resnet34`, `resnet50` or `resnet101`.
    """

    bottleneck: nn.Module

    def __init__(self, backbone: str) -> None:
        super().__init__()
        self.backbone = Backbone(backbone)

    @property
    @abstractmethod
    def average_heads(self) -> list[Head]:
        """Heads on the average-pooled map of the backbone, in the order of the embedding."""

    @property
    def max_heads(self) -> list[Head]:
        """Heads on the max-pooled map of `self.bottleneck`, behind the average heads in the embedding."""
        return []

    @abstractmethod
    def train_stages(
        self,
        features: Tensor,
        pids: Tensor,
        negatives: tuple[Tensor, Tensor] | None,
        generator: torch.Generator | None,
    ) -> tuple[StageOutput, ...]:
        """What each stage gives in training, from the backbone's map (N, C, H, W)."""

    def forward(
        self,
        images: Tensor,
        pids: Tensor | None = None,
        negatives: tuple[Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[StageOutput, ...] | Tensor:
        """One step of training, or embeddings.

        Args:
            images: (N, 3, H, W) float, normalised.
            pids: (N,) int64 class indices; needed in training mode, ignored in evaluation mode.
            negatives: the samples to mix in for stages II and III, each (N,) int64; drawn when None.
            generator: of the drawing.

        Returns:
            In training mode the stages' outputs, in evaluation mode embeddings (N, D) float32.

        Raises:
            PmmError: training mode without `pids`.
        """
        features = self.backbone(images)
        if not self.training:
            return self.embed(features)
        if pids is None:
            raise PmmError("training mode needs the identities of the images", "Pass pids, or call model.eval()")
        return self.train_stages(features, pids, negatives, generator)

    def embed(self, features: Tensor) -> Tensor:
        """The backbone's map (N, C, H, W) -> embeddings (N, D) float32."""
        average = average_pool(features)
        parts = [head.embed(average) for head in self.average_heads]
        if self.max_heads:
            maximum = max_pool(self.bottleneck(features))
            parts += [head.embed(maximum) for head in self.max_heads]
        return torch.cat(parts, dim=1).float()

    @property
    def stages(self) -> dict[str, tuple[int, int]]:
        """The slice [start, stop) of the embedding that each stage fills: I, II, III."""
        slices, start = {}, 0
        for name, head in zip(("I", "II", "III"), (*self.average_heads, *self.max_heads), strict=False):
            slices[name] = (start, start + head.size)
            start += head.size
        return slices


class PMM(ReidNetwork):
    """Progressive Multi-stage feature Mix network.

    Stage I reads the average-pooled map of the backbone. Stages II and III read the max-pooled map of one extra
    bottleneck that they share; in training its most salient blocks, ranked by the Grad-CAM of the stage before,
    are first replaced by those of another identity.

    Args:
        num_classes: identities of the training set.
        mix_blocks: K, the number of blocks replaced.
        block_size: (height, width) of a block on the map.
        mix: `a-hard-mix` replaces salient blocks, `dropblock` zeroes random ones, any other leaves the
            map as it is.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        mix_blocks: int = 3,
        block_size: tuple[int, int] = (3, 2),
        mix: str = "a-hard-mix",
    ) -> None:
        super().__init__(backbone)
        channels = self.backbone.channels
        self.bottleneck = Bottleneck(channels, channels // 4)
        self.stage1 = Head(channels, num_classes, init_mode="fan_in")
        self.stage2 = Head(channels, num_classes, init_mode="fan_out")
        self.stage3 = Head(channels, num_classes, init_mode="fan_out")
        self.mix_blocks = mix_blocks
        self.block_size = block_size
        self.mix = mix

    @property
    def average_heads(self) -> list[Head]:
        return [self.stage1]

    @property
    def max_heads(self) -> list[Head]:
        return [self.stage2, self.stage3]

    def train_stages(
        self,
        features: Tensor,
        pids: Tensor,
        negatives: tuple[Tensor, Tensor] | None,
        generator: torch.Generator | None,
    ) -> tuple[StageOutput, StageOutput, StageOutput]:
        if self.mix != "a-hard-mix":
            return self._train_stages_blindly(features, generator)
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

    def _train_stages_blindly(
        self, features: Tensor, generator: torch.Generator | None
    ) -> tuple[StageOutput, StageOutput, StageOutput]:
        """The stages without Grad-CAM, on the map as it is or with random blocks dropped."""
        unmixed = self.bottleneck(features)
        maps = [unmixed, unmixed]
        if self.mix == "dropblock":
            maps = [
                unmixed.masked_fill(random_blocks(unmixed, self.block_size, self.mix_blocks, generator), 0.0)
                for _ in range(2)
            ]
        stage1 = StageOutput(*self.stage1(average_pool(features)))
        stage2, stage3 = (StageOutput(*head(max_pool(seen))) for head, seen in zip(self.max_heads, maps, strict=True))
        return stage1, stage2, stage3
