"""ResNet of torchvision with stride 1 in its last stage, so that 384×128 gives a 24×8 map (paper section 2.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from pmm_edge.errors import ModelError, PmmError

RESNETS: dict[str, Callable[..., torchvision.models.ResNet]] = {
    name: getattr(torchvision.models, name) for name in ("resnet18", "resnet34", "resnet50", "resnet101")
}
STRIDE = 16
"""Input pixels per position of the map, in each direction."""


class Backbone(nn.Module):
    """A torchvision ResNet up to its last map. `forward`: (N, 3, H, W) -> (N, channels, ⌈H/16⌉, ⌈W/16⌉).

    The paper says that the stride is taken from "the 3rd and 4th blocks"; its 24×8 map and the authors' code
    have stride 1 in the last stage alone.

    Parameters carry torchvision's names, so ImageNet weights load as they are.
    """

    def __init__(self, name: str) -> None:
        if name not in RESNETS:
            raise PmmError(f"backbone '{name}' is unknown", f"Choose one of {', '.join(RESNETS)}")
        super().__init__()
        resnet = RESNETS[name]()
        self.conv1, self.bn1, self.relu, self.maxpool = resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool
        self.layer1, self.layer2, self.layer3 = resnet.layer1, resnet.layer2, resnet.layer3
        self.layer4 = _with_stride_1(resnet.layer4)
        self.channels: int = resnet.fc.in_features

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.layer4(x)


def map_size(height: int, width: int) -> tuple[int, int]:
    """The size of the map that an input of this size gives."""
    return -(-height // STRIDE), -(-width // STRIDE)


def load_backbone_weights(backbone: Backbone, state_dict: object) -> None:
    """Load weights in torchvision's layout; its ImageNet classifier `fc` is left out.

    Raises:
        ModelError: tensors are missing, unknown or of another shape.
    """
    remedy = "Give weights of torchvision's ResNet of the same name"
    if not isinstance(state_dict, Mapping):
        raise ModelError("the file of backbone weights holds no state dict", remedy)
    weights = {name: tensor for name, tensor in state_dict.items() if not str(name).startswith("fc.")}
    try:
        backbone.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        first = (str(error).splitlines() or [""])[min(1, str(error).count("\n"))].strip()
        raise ModelError(f"the weights do not fit the backbone: {first}", remedy) from error


def begin_bottlenecks_as_identities(backbone: Backbone) -> None:
    """Let each bottleneck block pass on what it gets at first: the scale of its last batch normalisation is zero.

    Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 5.1. From random weights a ResNet-50 learns hardly
    anything in a few dozen epochs on a small set without it; ResNet-18 and ResNet-34, whose
    blocks are no bottlenecks, learn as they are.
    """
    for module in backbone.modules():
        if isinstance(module, Bottleneck):
            nn.init.zeros_(module.bn3.weight)


def _with_stride_1(stage: nn.Sequential) -> nn.Sequential:
    for module in stage.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
    return stage


def imagenet_weights(name: str) -> dict[str, Tensor]:
    """Torchvision's ImageNet weights for a backbone, downloaded once into torch's hub cache.

    The first version: what torchvision had when the paper was written.

    Raises:
        PmmError: they are not in the cache and cannot be downloaded.
    """
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    # No network, a file cut off, a wrong hash, a file put there by hand that is none: they share no other type.
    except Exception as error:
        folder = torch.hub.get_dir()
        raise PmmError(
            f"the ImageNet weights of {name} cannot be downloaded ({error})",
            f"Put {weights.url} into {folder}/checkpoints/, or name a file with --backbone-weights FILE, or train from"
            " scratch with --backbone-weights none",
        ) from error
