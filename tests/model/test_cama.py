"""CAMA: sizes, weights of all branches, and the maps and the penalty against loops over samples and positions."""

import math
from itertools import combinations

import pytest
import torch
from torchvision.models import resnet18, resnet50

import pmm_edge as pmm
from pmm_edge.model.cama import cama_loss, overlap_penalty

PIDS = torch.tensor([0, 0, 1, 2])


@pytest.fixture
def network():
    torch.manual_seed(0)
    return pmm.build_model("cama", num_classes=3, backbone="resnet18", height=96, width=64).train()


def test_parameters_and_maps_are_a_resnet_with_three_last_stages():
    with torch.device("meta"):
        network, plain = pmm.build_model("cama", num_classes=751).eval(), resnet50()
        last = sum(p.numel() for p in plain.layer4.parameters())
        whole = sum(p.numel() for p in plain.parameters()) - sum(p.numel() for p in plain.fc.parameters())
        assert sum(p.numel() for p in network.parameters()) == whole + 2 * last + 3 * 2048 * 751
        features = network.backbone(torch.empty(2, 3, 384, 128))
        assert features.shape == (2, 3 * 2048, 24, 8) and network.embed(features).shape == (2, 3 * 2048)
        assert network.stages == {"I": (0, 2048), "II": (2048, 4096), "III": (4096, 6144)}


def test_imagenet_weights_fill_every_branch(network):
    torch.manual_seed(1)
    weights = {name: tensor for name, tensor in resnet18().state_dict().items() if not name.startswith("fc.")}
    network.backbone.load_torchvision(weights)
    for branch in (network.backbone.layer4, *network.backbone.branches):
        assert torch.equal(branch[1].conv2.weight, weights["layer4.1.conv2.weight"])


def test_maps_and_logits_are_those_of_loops(network):
    network = network.double().eval()
    with torch.no_grad():
        features = network.backbone(torch.randn(4, 3, 96, 64).double())
        outputs = network.train_stages(features, PIDS, None, None)
        embeddings = network.embed(features)
    for branch, (output, classifier) in enumerate(zip(outputs, network.classifiers, strict=True)):
        for sample, pid in enumerate(PIDS.tolist()):
            maps = features[sample, branch * 512 : (branch + 1) * 512]
            weights = classifier.weight[pid]
            for y in range(maps.shape[1]):
                for x in range(maps.shape[2]):
                    torch.testing.assert_close(output.cam[sample, y, x], weights @ maps[:, y, x], rtol=1e-5, atol=1e-5)
            # Without a bias, the mean of the map is the logit.
            torch.testing.assert_close(output.cam[sample].mean(), output.logits[sample, pid], rtol=1e-5, atol=1e-5)
            mean = maps.flatten(1).mean(dim=1).float()
            torch.testing.assert_close(embeddings[sample, branch * 512 : (branch + 1) * 512], mean)


def test_the_penalty_is_that_of_loops_and_moves_the_later_branch_only():
    cams = [(3 * torch.randn(4, 6, 4)).requires_grad_() for _ in range(3)]
    expected = 0.0
    for first, second in combinations(cams, 2):
        for sample in range(4):
            masks = []
            for cam in (first, second):
                values = cam[sample].flatten().tolist()
                limit = sorted(values, reverse=True)[math.ceil(0.3 * len(values)) - 1]
                masks.append([1 / (1 + math.exp(limit - value)) for value in values])
            expected += sum(a * b for a, b in zip(*masks, strict=True)) / (24 * 4)
    penalty = overlap_penalty(cams)
    assert penalty.item() == pytest.approx(expected, abs=1e-5)
    penalty.backward()
    assert cams[0].grad is None and cams[1].grad is not None and cams[2].grad is not None
    apart = [torch.zeros(1, 1, 10) for _ in range(2)]
    apart[0][..., :3], apart[1][..., 7:] = 50, 50
    assert overlap_penalty(apart).item() < 1e-6 < 0.05 < overlap_penalty([apart[0], apart[0]]).item()


def test_a_step_has_a_gradient_everywhere_and_the_parts_of_the_loss(network):
    outputs = network(torch.randn(4, 3, 96, 64), PIDS)
    loss, parts = cama_loss(outputs, PIDS)
    assert list(parts) == ["identity_1", "identity_2", "identity_3", "overlap"]
    torch.testing.assert_close(loss, sum(parts.values()))
    rows = [-each.logits.log_softmax(1)[row, pid] / 4 for each in outputs for row, pid in enumerate(PIDS.tolist())]
    torch.testing.assert_close(loss - parts["overlap"], sum(rows), rtol=1e-5, atol=1e-5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
