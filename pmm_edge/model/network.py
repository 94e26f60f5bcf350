"""PMM: a backbone, three stages, and progressive mixing in training (paper section 2); and what it is compared with."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from pmm_edge.errors import PmmError
from pmm_edge.model.backbone import build_backbone
from pmm_edge.model.mixing import Generator, draw_negatives, grad_cam, mix, random_blocks, top_blocks

Negatives = tuple[Tensor, Tensor] | None
InitMode = Literal["fan_in", "fan_out"]
STAGE_SIZE = 512  # of the embedding of one stage, by default


def average_pool(features: Tensor) -> Tensor:
    """Global average pooling: (N, C, H, W) -> (N, C)."""
    return features.mean(dim=(2, 3))


def max_pool(features: Tensor) -> Tensor:
    """Global max pooling: (N, C, H, W) -> (N, C). The gradient goes to one position, even if several are equal."""
    if features.is_cuda:  # adaptive pooling would copy the map to channels-first memory, and is not deterministic
        return features.permute(0, 2, 3, 1).flatten(1, 2).max(dim=1).values
    return F.adaptive_max_pool2d(features, 1).flatten(1)


class StageOutput(NamedTuple):
    """Output of one stage in training mode."""

    embedding: Tensor  # (N, D) after ReLU, for the triplet loss
    logits: Tensor  # (N, classes), for the identity loss
    cam: Tensor | None = None  # (N, H, W) that guides the mixing for the next stage, or that CAMA penalizes
    negatives: Tensor | None = None  # (N,) int64 indices of the samples mixed in for the next stage


class Pooled(NamedTuple):
    """What a stage reads in evaluation mode, and the head that reads it."""

    features: Tensor  # (N, C, H, W)
    vector: Tensor  # (N, C), pooled from the features
    head: Callable[[Tensor], tuple[Tensor, Tensor]]  # vector -> embedding, logits (N, classes)
    region: Tensor | None = None  # (N or 1, H, W) weights of the positions, 1 on average; None if all count alike


class Head(nn.Module):
    """Linear layer, batch norm and ReLU from a pooled vector to an embedding, followed by a linear classifier.

    The released code has a 1x1 convolution in stage I (on a map of one position) and linear layers in the others: the
    same product with another Kaiming normal initialization, `fan_in` instead of `fan_out`.
    """

    def __init__(self, channels: int, num_classes: int, init_mode: InitMode, size: int = STAGE_SIZE) -> None:
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


class ReidNetwork(nn.Module):
    """A backbone, a head on its average-pooled map, and heads on the max-pooled map of an extra bottleneck.

    The embedding is the concatenation of the heads' embeddings. It is not normalized, and its distance is Euclidean.
    Without max heads, this is the ResNet + global average pooling that the paper compares PMM with. The paper does not
    say what follows the pooling; here it is PMM's stage I, so that the additional stages are the only difference.
    """

    bottleneck: nn.Module
    average_heads: list[Head]  # on the average-pooled map of the backbone; first in the embedding
    max_heads: list[Head]  # on the max-pooled map of `bottleneck`
    projection: nn.Linear | None  # of the embedding to a smaller one; see `export/reduce.py`

    def __init__(
        self, num_classes: int, backbone: str = "resnet50", embedding_size: int = STAGE_SIZE, **sizes: int
    ) -> None:
        """Build stage I, and a bottleneck with one head for each name and size in `sizes`, if there are any."""
        super().__init__()
        self.backbone = build_backbone(backbone)
        channels = self.backbone.channels
        if sizes:
            self.bottleneck = Bottleneck(channels, channels // 4)
        self.stage1 = Head(channels, num_classes, "fan_in", embedding_size)
        self.average_heads, self.max_heads, self.projection = [self.stage1], [], None
        for name, size in sizes.items():
            self.max_heads.append(Head(channels, num_classes, "fan_out", size))
            self.add_module(name, self.max_heads[-1])

    def forward(
        self, images: Tensor, pids: Tensor | None = None, negatives: Negatives = None, generator: Generator = None
    ) -> tuple[StageOutput, ...] | Tensor:
        """Compute one StageOutput per stage in training mode, embeddings (N, D) float32 in evaluation mode.

        Args:
            images: (N, 3, H, W) float, normalized.
            pids: (N,) int64 class indices; required in training mode only.
            negatives: indices of the samples to mix in for stages II and III, each (N,) int64; drawn if None.
            generator: source of randomness for the mixing.
        """
        features = self.backbone(images)
        if not self.training:
            embeddings = self.embed(features)
            return self.projection(embeddings) if self.projection else embeddings
        if pids is None:
            raise PmmError("training mode needs the identities of the images", "Pass pids, or call model.eval()")
        return self.train_stages(features, pids, negatives, generator)

    def train_stages(
        self, features: Tensor, pids: Tensor, negatives: Negatives, generator: Generator
    ) -> tuple[StageOutput, ...]:
        """Outputs of all stages in training mode, from the backbone's map (N, C, H, W); other arguments: `forward`."""
        maps = self.max_maps(self.bottleneck(features), generator) if self.max_heads else []
        pooled = average_pool(features), *map(max_pool, maps)
        heads = (*self.average_heads, *self.max_heads)
        return tuple(StageOutput(*head(vector)) for head, vector in zip(heads, pooled, strict=True))

    def max_maps(self, features: Tensor, generator: Generator) -> list[Tensor]:
        """What each of `max_heads` pools in training, made from the bottleneck's map (N, C, H, W)."""
        return [features for _ in self.max_heads]

    def embed(self, features: Tensor) -> Tensor:
        """Map of the backbone (N, C, H, W) -> embeddings (N, D) float32, before the projection."""
        heads = (*self.average_heads, *self.max_heads)
        parts = [head.embed(stage.vector) for head, stage in zip(heads, self.pooled(features), strict=True)]
        return torch.cat(parts, dim=1).float()

    def pooled(self, features: Tensor) -> list[Pooled]:
        """What each stage reads in evaluation mode, from the backbone's map (N, C, H, W)."""
        average = average_pool(features)
        stages = [Pooled(features, average, head) for head in self.average_heads]
        if self.max_heads:
            features = self.bottleneck(features)
            maximum = max_pool(features)
            stages += [Pooled(features, maximum, head) for head in self.max_heads]
        return stages

    @property
    def stages(self) -> dict[str, tuple[int, int]]:
        """The slice [start, stop) of the embedding that each stage (I, II, III) fills."""
        slices, start = {}, 0
        for name, head in zip(("I", "II", "III"), (*self.average_heads, *self.max_heads), strict=False):
            slices[name] = (start, start + head.size)
            start += head.size
        return slices


class PMM(ReidNetwork):
    """Progressive Multi-stage feature Mix network (paper section 2).

    Stage I reads the average-pooled map of the backbone. Stages II and III read the max-pooled map of a shared extra
    bottleneck. In training, the most salient blocks of that map, ranked by the Grad-CAM of the previous stage, are
    replaced by the blocks of another identity (`mix` is `a-hard-mix`), or random blocks are set to 0 (`dropblock`);
    any other `mix` leaves the map unchanged. `mix_blocks` is K, `block_size` the (height, width) of a block on the map.
    """

    stage2: Head
    stage3: Head

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet50",
        mix_blocks: int = 3,
        block_size: tuple[int, int] = (3, 2),
        mix: str = "a-hard-mix",
        embedding_size: int = STAGE_SIZE,
    ) -> None:
        super().__init__(num_classes, backbone, embedding_size, stage2=embedding_size, stage3=embedding_size)
        self.mix_blocks, self.block_size, self.mix = mix_blocks, block_size, mix

    def train_stages(
        self, features: Tensor, pids: Tensor, negatives: Negatives, generator: Generator
    ) -> tuple[StageOutput, ...]:
        if self.mix != "a-hard-mix":
            return super().train_stages(features, pids, negatives, generator)
        unmixed = self.bottleneck(features)
        first, second = negatives or (draw_negatives(pids, generator), draw_negatives(pids, generator))

        pooled = average_pool(features)
        embedding, logits = self.stage1(pooled)
        cam = grad_cam(features, pooled, logits, pids)
        stage1 = StageOutput(embedding, logits, cam, first)
        mixed = mix(unmixed, first, top_blocks(cam, self.block_size, self.mix_blocks))
        pooled = max_pool(mixed)
        embedding, logits = self.stage2(pooled)
        cam = grad_cam(mixed, pooled, logits, pids)
        stage2 = StageOutput(embedding, logits, cam, second)
        # Stage III starts from the unmixed map again: K of its blocks are replaced, not 2 K.
        mixed = mix(unmixed, second, top_blocks(cam, self.block_size, self.mix_blocks))
        stage3 = StageOutput(*self.stage3(max_pool(mixed)))
        return stage1, stage2, stage3

    def max_maps(self, features: Tensor, generator: Generator) -> list[Tensor]:
        if self.mix != "dropblock":
            return super().max_maps(features, generator)
        drops = [random_blocks(features, self.block_size, self.mix_blocks, generator) for _ in self.max_heads]
        return [features.masked_fill(drop, 0.0) for drop in drops]

    def attention(self, images: Tensor, pids: Tensor) -> Tensor:
        """Grad-CAM of stage I, (N, h, w) detached, on unmixed images (N, 3, H, W) of classes (N,), for A-CutMix.

        It runs in evaluation mode, so that batch statistics do not count these images twice in a step.
        """
        was_training = self.training
        self.eval()
        with torch.no_grad():
            features = self.backbone(images)
        pooled = average_pool(features).requires_grad_()
        with torch.enable_grad():
            cam = grad_cam(features, pooled, self.stage1(pooled)[1], pids)
        self.train(was_training)
        return cam


class BDB(ReidNetwork):
    """Batch DropBlock network (Dai et al., ICCV 2019): a global branch of size 512 and a part branch of twice that.

    The part branch reads the bottleneck's map without one full-width stripe, the same for the whole batch. PMM splits
    this branch into its stages II and III, so both networks have the same layers except for one classifier's bias.
    """

    def __init__(self, num_classes: int, backbone: str = "resnet50", embedding_size: int = STAGE_SIZE) -> None:
        super().__init__(num_classes, backbone, embedding_size, part=2 * embedding_size)

    def max_maps(self, features: Tensor, generator: Generator) -> list[Tensor]:
        return [drop_stripe(features, generator)]


def drop_stripe(features: Tensor, generator: Generator = None) -> Tensor:
    """Set one full-width stripe of a third of the height of (N, C, H, W) to 0, at one random position for all."""
    height = features.shape[2]
    stripe = round(height / 3)
    start = torch.rand(1, device=features.device, generator=generator) * (height - stripe + 1)
    row = torch.arange(height, device=features.device)
    inside = (row >= start.floor()) & (row < start.floor() + stripe)
    return features.masked_fill(inside[None, None, :, None], 0.0)
