"""The stripped network computes what the trained one does, with less in it."""

from pathlib import Path

import torch
from torch import nn

from pmm_edge.export import inference_network
from pmm_edge.model import load_checkpoint


def test_same_embeddings_without_batch_norm_and_classifiers(tiny_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    network = checkpoint.network()
    stripped = inference_network(network, checkpoint.spec.input)
    images = torch.randn(3, *checkpoint.spec.input.shape(1)[1:], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, actual = network(images), stripped(images)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.max().item())
    assert not any(isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) for module in stripped.modules())
    linear = [(layer.in_features, layer.out_features) for layer in stripped.modules() if isinstance(layer, nn.Linear)]
    assert linear == [(512, 512), (512, 1024)]


def test_the_trained_network_is_left_as_it_was(tiny_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    network = checkpoint.network()
    inference_network(network, checkpoint.spec.input)
    kept = network.state_dict()
    assert kept.keys() == checkpoint.weights.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in checkpoint.weights.items())
