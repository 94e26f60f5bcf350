"""PCB and refined part pooling (Sun et al., "Beyond Part Models", ECCV 2018).

PCB pools six horizontal stripes of the map. One 1x1 convolution, batch norm and ReLU reduce each stripe's vector to 256
values, and each stripe has its own classifier. The embedding is the concatenation of the six, the paper's H. Only the
cross-entropy of the six classifiers is trained: no label smoothing and no triplet loss.

Refined part pooling (RPP) replaces the stripes by a part classifier: a position of the map belongs to each part with a
probability, and a part pools all positions, weighted by it. Training has three phases (section 3.4): PCB; the part
classifier alone, while all other weights are fixed; all weights.

Where the paper is silent:
- The convolution is shared by the parts, as in the authors' code, whose initialization is used as well; no dropout.
- A map whose height is not a multiple of six has overlapping stripes, as adaptive pooling has: stripe i of h rows goes
  from floor(i h / 6) to ceil((i + 1) h / 6).
- A part's vector is 6 / (H W) times the sum over the map of probability times feature: if the probabilities are those
  of equal stripes, it is the mean over the stripe.
- The phases take 3/4, 1/8 and 1/8 of the epochs (the paper: 60 and then 10 epochs in all). The learning rate schedule
  is that of a training of the first phase's length; after it, the rate is a tenth of the peak. Batch norm uses batch
  statistics in all phases.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pmm_edge.model.backbone import build_backbone
from pmm_edge.model.mixing import Generator
from pmm_edge.model.network import Negatives, Pooled, ReidNetwork, StageOutput

PARTS = 6
PART_SIZE = 256


def stripes(rows: int) -> list[tuple[int, int]]:
    """First row and end of each of the six stripes of a map of `rows` rows."""
    return [(part * rows // PARTS, -(-(part + 1) * rows // PARTS)) for part in range(PARTS)]


class PartHead(nn.Module):
    """Vectors of the parts (N, C, 6, 1) -> embeddings (N, 256, 6, 1), and a classifier for each part."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(channels, PART_SIZE, 1, bias=False)
        self.bn = nn.BatchNorm2d(PART_SIZE)
        self.classifier = nn.ModuleList(nn.Linear(PART_SIZE, num_classes) for _ in range(PARTS))
        nn.init.kaiming_normal_(self.reduction.weight, mode="fan_out")
        for layer in self.classifier:
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=0.001)
            nn.init.zeros_(layer.bias)

    def forward(self, vectors: Tensor) -> Tensor:
        return F.relu(self.bn(self.reduction(vectors)))


class PCB(ReidNetwork):
    """Part-based Convolutional Baseline: six stripes, one embedding of 1536 values."""

    def __init__(self, num_classes: int, backbone: str = "resnet50") -> None:
        nn.Module.__init__(self)
        self.backbone = build_backbone(backbone)
        self.head = PartHead(self.backbone.channels, num_classes)
        self.average_heads, self.max_heads, self.projection = [], [], None

    def part_weights(self, features: Tensor) -> Tensor | None:
        """Weights (N, 6, H, W) with which the parts pool the positions of the map; None for stripes."""
        return None

    def part_vectors(self, features: Tensor) -> Tensor:
        """Map of the backbone (N, C, H, W) -> vectors of the parts (N, C, 6, 1)."""
        weights = self.part_weights(features)
        if weights is None:
            parts = [features[:, :, start:stop] for start, stop in stripes(features.shape[2])]
            return torch.cat([part.mean(dim=(2, 3), keepdim=True) for part in parts], dim=2)
        mean = PARTS / (features.shape[2] * features.shape[3])
        return mean * (features.flatten(2) @ weights.flatten(2).transpose(1, 2))[..., None]

    def train_stages(
        self, features: Tensor, pids: Tensor, negatives: Negatives, generator: Generator
    ) -> tuple[StageOutput, ...]:
        embeddings = self.head(self.part_vectors(features))[..., 0].unbind(dim=2)
        classified = zip(embeddings, self.head.classifier, strict=True)
        return tuple(StageOutput(embedding, classifier(embedding)) for embedding, classifier in classified)

    def embed(self, features: Tensor) -> Tensor:
        return self.head(self.part_vectors(features))[..., 0].transpose(1, 2).flatten(1).float()

    def pooled(self, features: Tensor) -> list[Pooled]:
        vectors, weights = self.part_vectors(features), self.part_weights(features)
        if weights is None:
            weights = features.new_zeros(1, PARTS, *features.shape[2:])
            for part, (start, stop) in enumerate(stripes(features.shape[2])):
                weights[:, part, start:stop] = features.shape[2] / (stop - start)
        else:
            weights = PARTS * weights

        def head(part: int, vector: Tensor) -> tuple[Tensor, Tensor]:
            embedding = self.head(vector[..., None, None]).flatten(1)
            return embedding, self.head.classifier[part](embedding)

        return [
            Pooled(features, vectors[:, :, part, 0], partial(head, part), weights[:, part]) for part in range(PARTS)
        ]

    @property
    def stages(self) -> dict[str, tuple[int, int]]:
        return {f"P{part + 1}": (part * PART_SIZE, (part + 1) * PART_SIZE) for part in range(PARTS)}


class RefinedPCB(PCB):
    """PCB with refined part pooling, which `refined` switches on; it is saved with the weights."""

    def __init__(self, num_classes: int, backbone: str = "resnet50") -> None:
        super().__init__(num_classes, backbone)
        self.part_classifier = nn.Conv2d(self.backbone.channels, PARTS, 1, bias=False)
        nn.init.kaiming_normal_(self.part_classifier.weight, mode="fan_out")
        self.refined = False

    def part_weights(self, features: Tensor) -> Tensor | None:
        """Probability (N, 6, H, W) of each part at each position (paper equation 1)."""
        return self.part_classifier(features).softmax(dim=1) if self.refined else None

    def start_phase(self, phase: int) -> None:
        """Phase 0 trains PCB, 1 the part classifier only, 2 everything."""
        self.refined = phase > 0
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(phase != 1 or name.startswith("part_classifier."))

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.refined)

    def set_extra_state(self, state: Tensor) -> None:
        self.refined = bool(state)


def refinement_epochs(epochs: int) -> tuple[int, int]:
    """The last epochs of phases 0 and 1 of a training of `epochs`, 3 or more."""
    each = max(1, epochs // 8)
    return epochs - 2 * each, epochs - each


def pcb_loss(outputs: Sequence[StageOutput], pids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the cross-entropy over the parts. Returns the loss, and its parts by name (`identity_1`...), detached."""
    parts = {f"identity_{number}": F.cross_entropy(part.logits.float(), pids) for number, part in enumerate(outputs, 1)}
    return torch.stack(list(parts.values())).sum(), {name: part.detach() for name, part in parts.items()}
