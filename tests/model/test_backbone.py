"""Backbones: their maps, torchvision's weights in them, and what they are refused for."""

import pytest
import torch
import torchvision

import pmm_edge as pmm
from pmm_edge.errors import PmmError
from pmm_edge.model.backbone import MOBILE, build_backbone, map_size, zero_init_residuals
from pmm_edge.model.checkpoint import load_pretrained, network_of
from pmm_edge.spec import InputSpec, ModelSpec


@pytest.mark.parametrize(
    ("name", "channels", "parameters"),
    [
        ("resnet10", 512, None),
        ("resnet18", 512, 11_176_512),
        ("resnet50", 2048, 23_508_032),
        ("mobilenet_v3_small", 576, 927_008),
        ("mobilenet_v3_large", 960, 2_971_952),
        ("efficientnet_b0", 1280, 4_007_548),
    ],
)
def test_maps_have_a_sixteenth_of_the_input(name, channels, parameters):
    with torch.device("meta"):
        backbone = build_backbone(name)
        for height, width in ((384, 128), (96, 48), (81, 33)):
            assert backbone(torch.empty(2, 3, height, width)).shape == (2, channels, *map_size(height, width))
    assert backbone.channels == channels
    assert parameters in (None, sum(p.numel() for p in backbone.parameters()))


@pytest.mark.parametrize("name", [*MOBILE, "resnet18"])
def test_weights_of_torchvision_give_the_features_of_torchvision(name, tmp_path):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(weights=None)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    network = pmm.build_model("baseline", num_classes=2, backbone=name)
    load_pretrained(network, name, tmp_path / "weights.pth")
    theirs = torch.nn.Sequential(*list(theirs.children())[:-2]) if name == "resnet18" else theirs.features
    convolutions = [module for module in theirs.modules() if isinstance(module, torch.nn.Conv2d)]
    for convolution in [each for each in convolutions if each.stride == (2, 2)][-2 if name == "resnet18" else -1 :]:
        convolution.stride = (1, 1)
    images = torch.randn(2, 3, 96, 48)
    with torch.inference_mode():
        assert torch.equal(network.backbone.eval()(images), theirs.eval()(images))
        network.backbone.train()
        assert torch.equal(network.backbone(images), network.backbone(images)), "nothing is drawn"


@pytest.mark.parametrize("name", MOBILE)
@pytest.mark.parametrize(
    ("method", "sizes"), [("pmm", [64] * 3), ("bdb", [64, 128]), ("aos", [64]), ("pcb", [256] * 6)]
)
def test_every_method_trains_on_every_backbone(name, method, sizes):
    torch.manual_seed(0)
    network = pmm.build_model(method, num_classes=2, backbone=name, height=96, width=64, embedding_size=64)
    outputs = network.train()(torch.randn(4, 3, 96, 64), torch.tensor([0, 0, 1, 1]))
    assert [output.embedding.shape[1] for output in outputs] == sizes
    sum(output.logits.square().sum() for output in outputs).backward()
    assert all(p.grad is not None for p in network.parameters())
    spec = ModelSpec(method, name, 2, InputSpec(96, 64), sum(sizes), network.stages, network.__dict__.get("mix_blocks"))
    assert network_of(spec).load_state_dict(network.state_dict())


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ({"backbone": "mobilenet_v3"}, "mobilenet_v3_small"),
        ({"backbone": "efficientnet-b0"}, "Did you mean 'efficientnet_b0'"),
        ({"method": "cama", "backbone": "efficientnet_b0"}, "ResNet"),
        ({"embedding_size": 0}, "1 to 8192"),
        ({"embedding_size": 10**9}, "1 to 8192"),
    ],
)
def test_what_is_refused(arguments, remedy):
    with pytest.raises(PmmError) as caught:
        pmm.build_model(**{"method": "baseline", "num_classes": 2} | arguments)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "block", "channels"),
    [("resnet50", "layer3.1", 1024), ("mobilenet_v3_small", "features.3", 24), ("efficientnet_b0", "features.2.1", 24)],
)
def test_zero_initialized_blocks_are_identities(name, block, channels):
    backbone = build_backbone(name).eval()
    zero_init_residuals(backbone)
    x = torch.rand(2, channels, 4, 4)
    assert torch.equal(backbone.get_submodule(block)(x), x)  # a block without a convolution on its shortcut


def test_basic_blocks_are_not_zero_initialized():
    other = build_backbone("resnet18")
    zero_init_residuals(other)
    assert all((norm.weight == 1).all() for norm in other.modules() if isinstance(norm, torch.nn.BatchNorm2d))
