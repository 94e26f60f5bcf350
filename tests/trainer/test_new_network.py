"""What a training begins with."""

from dataclasses import replace

import pytest
import torch

from pmm_edge.trainer.config import PRESETS
from pmm_edge.trainer.setup import new_network

CONFIG = replace(PRESETS["quick"], backbone="resnet50")


def test_from_scratch_each_bottleneck_passes_on_what_it_gets():
    backbone = new_network(CONFIG, 4).backbone.eval()
    block = backbone.layer3[1]  # one without a convolution on its shortcut
    x = torch.rand(2, 1024, 4, 4)
    assert torch.equal(block(x), x)


def test_weights_that_are_given_stay_as_they_are(tmp_path):
    given = tmp_path / "resnet50.pth"
    source = new_network(replace(CONFIG, seed=1), 4).backbone
    torch.nn.init.constant_(source.layer1[0].bn3.weight, 0.5)
    torch.save(source.state_dict(), given)
    backbone = new_network(replace(CONFIG, backbone_weights=str(given)), 4).backbone
    assert all(torch.equal(own, source.state_dict()[name]) for name, own in backbone.state_dict().items())


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_blocks_that_are_no_bottlenecks_begin_as_torchvision_has_them(name):
    backbone = new_network(replace(CONFIG, backbone=name), 4).backbone
    assert all((norm.weight == 1).all() for norm in backbone.modules() if isinstance(norm, torch.nn.BatchNorm2d))
