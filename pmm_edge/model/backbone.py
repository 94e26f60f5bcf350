"""Torchvision ResNet with stride 1 in the last stage, so that 384x128 gives a 24x8 map (paper section 2.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from pmm_edge.errors import ModelError, PmmError, did_you_mean

RESNETS: dict[str, Callable[..., ResNet]] = {
    "resnet10": partial(ResNet, BasicBlock, [1, 1, 1, 1]),
    **{name: getattr(torchvision.models, name) for name in ("resnet18", "resnet34", "resnet50", "resnet101")},
}
STRIDE = 16
"""Input pixels per position of the map, in each direction."""


class Backbone(nn.Module):
    """A torchvision ResNet without its pooling and classifier. `forward`: (N, 3, H, W) -> (N, C, ⌈H/16⌉, ⌈W/16⌉).

    The paper takes stride 1 in "the 3rd and 4th blocks"; its 24x8 map and the authors' code have stride 1 in the last
    stage only. Parameters keep torchvision's names, so that ImageNet weights load unchanged.
    """

    def __init__(self, name: str) -> None:
        if name not in RESNETS:
            raise PmmError(f"unknown backbone '{name}'", f"{did_you_mean(name, RESNETS)}Choose {', '.join(RESNETS)}")
        super().__init__()
        resnet = RESNETS[name]()
        self.conv1, self.bn1, self.relu, self.maxpool = resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool
        self.layer1, self.layer2 = resnet.layer1, resnet.layer2
        self.layer3, self.layer4 = resnet.layer3, resnet.layer4
        for module in self.layer4.modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
        self.channels: int = resnet.fc.in_features

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def map_size(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the map of an input of `height` x `width` pixels."""
    return -(-height // STRIDE), -(-width // STRIDE)


def load_backbone_weights(backbone: Backbone, state_dict: object) -> None:
    """Load a torchvision state dict, without its classifier `fc`. Raises ModelError if a tensor does not fit."""
    remedy = "Use weights of the torchvision ResNet of the same name"
    if not isinstance(state_dict, Mapping):
        raise ModelError("the file of backbone weights does not contain a state dict", remedy)
    weights = {name: tensor for name, tensor in state_dict.items() if not str(name).startswith("fc.")}
    try:
        backbone.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).splitlines()[:2])
        raise ModelError(f"the weights do not fit the backbone: {reason}", remedy) from error


def zero_init_residuals(backbone: Backbone) -> None:
    """Initialize each bottleneck block as the identity: the weight of its last batch norm is 0.

    Goyal et al., "Accurate, Large Minibatch SGD", 2017, section 5.1. Without it, a ResNet-50 trained from scratch on a
    small data set learns almost nothing in a few dozen epochs; ResNets without bottleneck blocks learn without it.
    """
    for module in backbone.modules():
        if isinstance(module, Bottleneck):
            nn.init.zeros_(module.bn3.weight)


def imagenet_weights(name: str) -> dict[str, Tensor]:
    """ImageNet weights of torchvision (version 1, that of the paper's time), downloaded once into torch's hub cache.

    Raises PmmError if there are none for this backbone, or they cannot be downloaded.
    """
    if name not in torchvision.models.list_models():
        raise PmmError(f"{name} has no ImageNet weights", "Choose --backbone-weights none, or name a file of weights")
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    # No network, a truncated file, a wrong hash: these errors have no common type.
    except Exception as error:
        raise PmmError(
            f"the ImageNet weights of {name} cannot be downloaded ({error})",
            f"Put {weights.url} into {torch.hub.get_dir()}/checkpoints/, or name a file with --backbone-weights FILE,"
            " or train from scratch with --backbone-weights none",
        ) from error
