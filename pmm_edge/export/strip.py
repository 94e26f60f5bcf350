"""The network that is deployed: what only training needs is gone, and what can be multiplied out is."""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from pmm_edge.model.network import PMM, Head
from pmm_edge.runtime.torch_backend import Preprocess
from pmm_edge.spec import InputSpec


class StrippedPMM(nn.Module):
    """PMM without classifiers and mixing. Forward: (N, 3, H, W) normalised -> (N, 1536).

    Batch normalisation is folded into the layers before it. Stages II and III read one max-pooled vector when
    nothing is mixed, so their two layers are one 2048->1024.
    """

    def __init__(self, network: PMM) -> None:
        super().__init__()
        network = copy.deepcopy(network).eval()
        self.backbone = fold_batch_norm(network.backbone)
        self.bottleneck = fold_batch_norm(network.bottleneck)
        self.stage1 = _reduction(network.stage1)
        self.stages23 = _side_by_side(_reduction(network.stage2), _reduction(network.stage3))

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        # Plain reductions export as one node each; torch's adaptive pooling brings shape arithmetic with it.
        average, maximum = features.mean(dim=(2, 3)), self.bottleneck(features).amax(dim=(2, 3))
        return torch.cat([F.relu(self.stage1(average)), F.relu(self.stages23(maximum))], dim=1)


def inference_network(network: PMM, spec: InputSpec) -> nn.Module:
    """The network to deploy, from the spec's input form to embeddings; the trained one is left as it is.

    The normalisation of the forms `uint8` and `raw` stays a scale and a shift of its own: folded into the first
    convolution it would be wrong at the border, where zeros are padded after it.
    """
    return nn.Sequential(Preprocess(spec), StrippedPMM(network)).eval()


def fold_batch_norm(module: nn.Module) -> nn.Module:
    """Fold each batch normalisation into the convolution that is registered right before it, in place."""
    for (name, layer), (norm_name, norm) in pairwise(list(module.named_children())):
        if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(layer, norm))
            setattr(module, norm_name, nn.Identity())
    for child in module.children():
        fold_batch_norm(child)
    return module


def _reduction(head: Head) -> nn.Linear:
    return fuse_linear_bn_eval(head.linear, head.bn)


def _side_by_side(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """One layer that gives both layers' outputs, one behind the other."""
    both = nn.Linear(first.in_features, first.out_features + second.out_features)
    both.weight = nn.Parameter(torch.cat([first.weight, second.weight]))
    both.bias = nn.Parameter(torch.cat([first.bias, second.bias]))
    return both
