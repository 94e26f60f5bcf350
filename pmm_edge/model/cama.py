"""CAMA, class activation maps augmentation (Yang et al., "Towards Rich Feature Discovery", CVPR 2019).

Ordered branches read the same features, and each classifies its own average-pooled map. The class activation map (CAM)
of a branch is its last map, weighted by the classifier's weights for the true identity. The overlapped activation
penalty makes a branch look where the branches before it do not. The embedding is the concatenation of the branches'
pooled vectors: 3 x 2048 values for a ResNet-50. The loss is the cross-entropy of all branches and the penalty.

The abstract and descriptions of the paper were read, not its implementation, which has not been published. Chosen here:
- Three branches, each with its own last stage of the ResNet; ImageNet weights are copied into all of them.
- Nothing between pooling and classifier, which has no bias: with it, the CAM is exactly the evidence for the class.
- A soft mask marks the most active 30 % of a CAM M: sigmoid(M - t), where t is the smallest of these values, detached.
- The penalty is the sum over pairs of branches of the mean over positions of the product of their masks. The mask of
  the earlier branch is detached, so that only the later one moves. It counts like one cross-entropy.
- No label smoothing and no triplet loss.
"""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from itertools import combinations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pmm_edge.errors import PmmError
from pmm_edge.model.backbone import MOBILE, ResNetBackbone
from pmm_edge.model.mixing import Generator
from pmm_edge.model.network import Negatives, Pooled, ReidNetwork, StageOutput, average_pool

BRANCHES = 3
ACTIVE = 0.3  # share of a map that its mask marks


class BranchedBackbone(ResNetBackbone):
    """A ResNet whose last stage exists once for each branch: (N, 3, H, W) -> maps of all branches (N, 3 C, h, w)."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.branches = nn.ModuleList(deepcopy(self.layer4) for _ in range(BRANCHES - 1))

    def forward(self, images: Tensor) -> Tensor:
        shared = self.layer3(self.layer2(self.layer1(self.stem(images))))
        return torch.cat([branch(shared) for branch in (self.layer4, *self.branches)], dim=1)

    def load_torchvision(self, weights: Mapping[str, Tensor]) -> None:
        for name in [name for name in weights if name.startswith("layer4.")]:
            copies = {f"branches.{branch}{name.removeprefix('layer4')}" for branch in range(BRANCHES - 1)}
            weights = {**weights, **dict.fromkeys(copies, weights[name])}
        super().load_torchvision(weights)


class CAMA(ReidNetwork):
    """Three branches with complementary class activation maps."""

    def __init__(self, num_classes: int, backbone: str = "resnet50") -> None:
        nn.Module.__init__(self)
        if backbone in MOBILE:
            raise PmmError(f"CAMA copies the last stage of a ResNet, which {backbone} is not", "Choose a ResNet")
        self.backbone = BranchedBackbone(backbone)
        self.average_heads, self.max_heads, self.projection = [], [], None
        layers = [nn.Linear(self.backbone.channels, num_classes, bias=False) for _ in range(BRANCHES)]
        self.branches = nn.ModuleList(nn.ModuleDict({"classifier": layer}) for layer in layers)
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")

    @property
    def classifiers(self) -> list[nn.Linear]:
        return [branch["classifier"] for branch in self.branches]  # type: ignore[index]

    def train_stages(
        self, features: Tensor, pids: Tensor, negatives: Negatives, generator: Generator
    ) -> tuple[StageOutput, ...]:
        outputs = []
        for maps, classifier in zip(features.chunk(BRANCHES, dim=1), self.classifiers, strict=True):
            pooled = average_pool(maps)
            cam = torch.einsum("nc,nchw->nhw", classifier.weight[pids].to(maps.dtype), maps)
            outputs.append(StageOutput(pooled, classifier(pooled), cam))
        return tuple(outputs)

    def embed(self, features: Tensor) -> Tensor:
        return features.mean(dim=(2, 3)).float()

    def pooled(self, features: Tensor) -> list[Pooled]:
        def head(classifier: nn.Linear, vector: Tensor) -> tuple[Tensor, Tensor]:
            return vector, classifier(vector)

        branches = zip(features.chunk(BRANCHES, dim=1), self.classifiers, strict=True)
        return [Pooled(maps, average_pool(maps), partial(head, classifier)) for maps, classifier in branches]

    @property
    def stages(self) -> dict[str, tuple[int, int]]:
        size = self.backbone.channels
        return {name: (branch * size, (branch + 1) * size) for branch, name in enumerate(("I", "II", "III"))}


def overlap_penalty(cams: Sequence[Tensor]) -> Tensor:
    """Overlapped activation penalty of the class activation maps (N, H, W) of ordered branches."""
    masks = []
    for cam in cams:
        flat = cam.flatten(1).float()
        active = math.ceil(ACTIVE * flat.shape[1])
        masks.append(torch.sigmoid(flat - flat.detach().topk(active, dim=1).values[:, -1:]))
    return torch.stack([(earlier.detach() * later).mean() for earlier, later in combinations(masks, 2)]).sum()


def cama_loss(outputs: Sequence[StageOutput], pids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the cross-entropy over the branches, and the overlap penalty.

    Returns the loss, and its parts by name (`identity_1`..., `overlap`), detached.
    """
    parts = {f"identity_{number}": F.cross_entropy(each.logits.float(), pids) for number, each in enumerate(outputs, 1)}
    parts["overlap"] = overlap_penalty([each.cam for each in outputs if each.cam is not None])
    return torch.stack(list(parts.values())).sum(), {name: part.detach() for name, part in parts.items()}
