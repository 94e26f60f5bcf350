"""Every method goes through the same export and bench as PMM."""

import pytest
import torch
from torch import nn

from pmm_edge.export.graph import Stripped, inference_network
from pmm_edge.model import build_model
from pmm_edge.spec import InputSpec


@pytest.fixture(params=["pmm", "bdb", "baseline"])
def network(request):
    torch.manual_seed(0)
    network = build_model(request.param, num_classes=4, backbone="resnet18", height=96, width=64)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def test_stripping_keeps_the_embeddings_and_drops_the_classifiers(network):
    images = torch.rand(3, 3, 96, 64)
    with torch.inference_mode():
        expected = network(images)
        stripped = inference_network(network, InputSpec(96, 64))
        torch.testing.assert_close(stripped(images), expected, rtol=1e-4, atol=1e-4)
    trained = sum(p.numel() for name, p in network.named_parameters() if "classifier" not in name)
    assert sum(p.numel() for p in stripped.parameters()) <= trained
    assert not any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in stripped.modules())


def test_heads_that_read_one_vector_are_one_layer(network):
    layers = [module for module in Stripped(network).modules() if isinstance(module, nn.Linear)]
    assert len(layers) == 1 + bool(network.max_heads)
