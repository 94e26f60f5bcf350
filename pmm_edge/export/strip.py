"""The network that is deployed: what only training needs is gone, and what can be multiplied out is."""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from pmm_edge.model.network import Head, ReidNetwork
from pmm_edge.runtime.torch_backend import Preprocess
from pmm_edge.spec import InputSpec


class Stripped(nn.Module):
    """A network without classifiers and mixing. Forward: (N, 3, H, W) normalised -> (N, D).

    Batch normalisation is folded into the layers before it. Heads that read one pooled vector are one layer: when
    nothing is mixed, PMM's stages II and III are one 2048->1024.
    """

    def __init__(self, network: ReidNetwork) -> None:
        super().__init__()
        network = copy.deepcopy(network).eval()
        self.backbone = fold_batch_norm(network.backbone)
        self.average = _side_by_side(network.average_heads)
        self.maximum: nn.Linear | None = None
        if network.max_heads:
            self.bottleneck = fold_batch_norm(network.bottleneck)
            self.maximum = _side_by_side(network.max_heads)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        # Plain reductions export as one node each; torch's adaptive pooling brings shape arithmetic with it.
        embeddings = self.average(features.mean(dim=(2, 3)))
        if self.maximum is not None:
            maximum = self.maximum(self.bottleneck(features).amax(dim=(2, 3)))
            embeddings = torch.cat([embeddings, maximum], dim=1)
        # One ReLU behind all: ONNX Runtime 1.31 leaves an INT8 linear layer in float where a ReLU of its own follows.
        return F.relu(embeddings)


class UnitLength(nn.Module):
    """Embeddings (N, D) over their L2 norm. All zeros stay so."""

    def forward(self, embeddings: Tensor) -> Tensor:
        # Not F.normalize, whose export brings shape arithmetic with it.
        return embeddings / torch.linalg.vector_norm(embeddings, dim=1, keepdim=True).clamp_min(1e-12)


def inference_network(network: ReidNetwork, spec: InputSpec, normalize_output: bool = False) -> nn.Module:
    """The network to deploy, from the spec's input form to embeddings; the trained one is left as it is.

    The normalisation of the forms `uint8` and `raw` stays a scale and a shift of its own: folded into the first
    convolution it would be wrong at the border, where zeros are padded after it.
    """
    behind = [UnitLength()] if normalize_output else []
    return nn.Sequential(Preprocess(spec), Stripped(network), *behind).eval()


def fold_batch_norm(module: nn.Module) -> nn.Module:
    """Fold each batch normalisation into the convolution that is registered right before it, in place."""
    for (name, layer), (norm_name, norm) in pairwise(list(module.named_children())):
        if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(layer, norm))
            setattr(module, norm_name, nn.Identity())
    for child in module.children():
        fold_batch_norm(child)
    return module


def _side_by_side(heads: list[Head]) -> nn.Linear:
    """The heads' reductions, batch normalisation folded, as one layer that gives their outputs one behind another."""
    layers = [fuse_linear_bn_eval(head.linear, head.bn) for head in heads]
    if len(layers) == 1:
        return layers[0]
    together = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers))
    together.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]))
    together.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]))
    return together
