"""Torchvision ResNet with stride 1 in the last stage, so that 384x128 gives a 24x8 map (paper section 2.1)."""

from collections.abc import Callable, Mapping
from functools import partial

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from pmm_edge.errors import PmmError, did_you_mean

RESNETS: dict[str, Callable[..., ResNet]] = {
    "resnet10": partial(ResNet, BasicBlock, [1, 1, 1, 1]),
    **{name: getattr(torchvision.models, name) for name in ("resnet18", "resnet34", "resnet50", "resnet101")},
}
STRIDE = 16  # input pixels per position of the map, in each direction


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
        return self.layer4(self.layer3(self.layer2(self.layer1(self.stem(images)))))

    def stem(self, images: Tensor) -> Tensor:
        """What comes before the four stages: (N, 3, H, W) -> (N, 64, ⌈H/4⌉, ⌈W/4⌉)."""
        return self.maxpool(self.relu(self.bn1(self.conv1(images))))

    def load_torchvision(self, weights: Mapping[str, Tensor]) -> None:
        """Load weights under torchvision's names; raise RuntimeError if they do not fit."""
        self.load_state_dict(weights)


def map_size(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the map of an input of `height` x `width` pixels."""
    return -(-height // STRIDE), -(-width // STRIDE)


def zero_init_residuals(backbone: Backbone) -> None:
    """Initialize each bottleneck block as the identity: the weight of its last batch norm is 0.

    Goyal et al., "Accurate, Large Minibatch SGD", 2017, section 5.1. Without it, a ResNet-50 trained from scratch on a
    small data set learns almost nothing in a few dozen epochs; ResNets without bottleneck blocks learn without it.
    """
    for module in backbone.modules():
        if isinstance(module, Bottleneck):
            nn.init.zeros_(module.bn3.weight)
