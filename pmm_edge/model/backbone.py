"""Backbones: torchvision networks without pooling and classifier, of a total stride of 16.

The last convolutions of stride 2 have stride 1, so that 384x128 gives a 24x8 map (paper section 2.1, for ResNet-50).
"""

from collections.abc import Callable, Mapping
from functools import partial

import torchvision
from torch import Tensor, nn
from torchvision.models.efficientnet import MBConv
from torchvision.models.mobilenetv3 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import SqueezeExcitation

from pmm_edge.errors import PmmError, did_you_mean

RESNETS: dict[str, Callable[..., ResNet]] = {
    "resnet10": partial(ResNet, BasicBlock, [1, 1, 1, 1]),
    **{name: getattr(torchvision.models, name) for name in ("resnet18", "resnet34", "resnet50", "resnet101")},
}
MOBILE: dict[str, Callable[..., nn.Module]] = {
    "mobilenet_v3_small": torchvision.models.mobilenet_v3_small,
    "mobilenet_v3_large": torchvision.models.mobilenet_v3_large,
    # Stochastic depth draws from torch's global generator, so that a resumed run would differ.
    "efficientnet_b0": partial(torchvision.models.efficientnet_b0, stochastic_depth_prob=0.0),
}
STRIDE = 16  # input pixels per position of the map, in each direction


class Backbone(nn.Module):
    """Images (N, 3, H, W) -> map (N, C, ⌈H/16⌉, ⌈W/16⌉). Parameters have torchvision's names."""

    channels: int  # C

    def load_torchvision(self, weights: Mapping[str, Tensor]) -> None:
        """Load weights under torchvision's names; raise RuntimeError if they do not fit."""
        self.load_state_dict(weights)


class ResNetBackbone(Backbone):
    """A ResNet with stride 1 in the last stage.

    The paper takes stride 1 in "the 3rd and 4th blocks"; its 24x8 map and the authors' code have stride 1 in the last
    stage only.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        resnet = RESNETS[name]()
        self.conv1, self.bn1, self.relu, self.maxpool = resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool
        self.layer1, self.layer2 = resnet.layer1, resnet.layer2
        self.layer3, self.layer4 = resnet.layer3, resnet.layer4
        for module in self.layer4.modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
        self.channels = resnet.fc.in_features

    def forward(self, images: Tensor) -> Tensor:
        return self.layer4(self.layer3(self.layer2(self.layer1(self.stem(images)))))

    def stem(self, images: Tensor) -> Tensor:
        """What comes before the four stages: (N, 3, H, W) -> (N, 64, ⌈H/4⌉, ⌈W/4⌉)."""
        return self.maxpool(self.relu(self.bn1(self.conv1(images))))


class GlobalMean(nn.Module):
    """Global average pooling (N, C, H, W) -> (N, C, 1, 1), which exports as one node; adaptive pooling may not."""

    def forward(self, features: Tensor) -> Tensor:
        return features.mean(dim=(2, 3), keepdim=True)


class MobileBackbone(Backbone):
    """The `features` of a MobileNetV3 or EfficientNet, with stride 1 in its last strided convolution."""

    def __init__(self, name: str) -> None:
        super().__init__()
        features = MOBILE[name]().features
        assert isinstance(features, nn.Sequential)
        for module in features.modules():
            if isinstance(module, SqueezeExcitation):
                module.avgpool = GlobalMean()
        convolutions = [module for module in features.modules() if isinstance(module, nn.Conv2d)]
        [module for module in convolutions if module.stride == (2, 2)][-1].stride = (1, 1)
        self.features, self.channels = features, convolutions[-1].out_channels

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)


def build_backbone(name: str) -> Backbone:
    """Build a backbone with random weights; raise PmmError if there is none with this name."""
    if name in RESNETS:
        return ResNetBackbone(name)
    if name in MOBILE:
        return MobileBackbone(name)
    known = (*RESNETS, *MOBILE)
    raise PmmError(f"unknown backbone '{name}'", f"{did_you_mean(name, known)}Choose {', '.join(known)}")


def map_size(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the map of an input of `height` x `width` pixels."""
    return -(-height // STRIDE), -(-width // STRIDE)


def zero_init_residuals(backbone: Backbone) -> None:
    """Initialize each block of three convolutions with a shortcut as the identity: its last batch norm has weight 0.

    Goyal et al., "Accurate, Large Minibatch SGD", 2017, section 5.1. Without it, a ResNet-50 or MobileNetV3 trained
    from scratch on a small data set learns almost nothing in a few dozen epochs. ResNets of basic blocks do not need
    it.
    """
    for module in backbone.modules():
        if isinstance(module, Bottleneck):
            nn.init.zeros_(module.bn3.weight)
        elif isinstance(module, InvertedResidual | MBConv) and module.use_res_connect:
            nn.init.zeros_(module.block[-1][1].weight)
