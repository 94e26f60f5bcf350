"""Each mix of the paper's table 3 against a slow reference written from its definition."""

import pytest
import torch

from pmm_edge.model import build_model
from pmm_edge.model.alternatives import attention, attentive_cutmix, cutmix
from pmm_edge.model.mixing import random_blocks
from pmm_edge.model.network import average_pool, max_pool

PIDS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(5)


@pytest.fixture
def images(generator):
    return torch.rand(8, 3, 96, 64, generator=generator)


def sources(mixed, images, sample):
    """For each pixel of a mixed image the sample that it came from."""
    came_from = torch.full(mixed.shape[-2:], -1)
    for other in range(len(images)):
        came_from[(mixed[sample] == images[other]).all(dim=0)] = other
    return came_from


def test_cutmix_pastes_one_box_of_another_identity_and_mixes_labels_by_its_area(images, generator):
    shares = []
    for _ in range(20):
        mixed, labels = cutmix(images, PIDS, generator)
        for sample in range(8):
            came_from = sources(mixed, images, sample)
            pasted = came_from != sample
            shares.append(labels.share[sample].item())
            assert pasted.float().mean().item() == pytest.approx(shares[-1])
            if pasted.any():
                (negative,) = came_from[pasted].unique().tolist()
                assert PIDS[negative] == labels.other[sample] != PIDS[sample]
                rows, columns = torch.where(pasted)
                box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
                assert box == pasted.sum(), "the pasted pixels are a rectangle"
    assert min(shares) < 0.1 and max(shares) > 0.5


def test_attentive_cutmix_pastes_the_most_salient_blocks_of_the_negative(images, generator):
    salience = torch.rand(8, 6, 4, generator=generator)
    mixed, labels = attentive_cutmix(images, PIDS, salience, (3, 2), 1, generator)
    for sample in range(8):
        came_from = sources(mixed, images, sample)
        (negative,) = came_from[came_from != sample].unique().tolist()
        sums = {(r, c): salience[negative, r : r + 3, c : c + 2].sum() for r in (0, 3) for c in (0, 2)}
        row, column = max(sums, key=sums.get)
        expected = torch.zeros(96, 64, dtype=torch.bool)
        expected[row * 16 : (row + 3) * 16, column * 16 : (column + 2) * 16] = True
        assert torch.equal(came_from != sample, expected)
        assert labels.share[sample].item() == pytest.approx(0.25)
        assert labels.other[sample] == PIDS[negative] != PIDS[sample]


def test_attention_is_the_grad_cam_of_stage_one_and_leaves_the_network_as_it_was(images):
    torch.manual_seed(0)
    network = build_model("pmm", num_classes=4, backbone="resnet18", height=96, width=64).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    cam = attention(network, images, PIDS)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert network.training and all(p.grad is None for p in network.parameters())

    network.eval()
    features = network.backbone(images).detach().requires_grad_()
    logits = network.stage1(average_pool(features))[1]
    (gradient,) = torch.autograd.grad(logits.gather(1, PIDS[:, None]).sum(), features)
    textbook = torch.relu((gradient.mean(dim=(2, 3), keepdim=True) * features).sum(dim=1)).detach()
    torch.testing.assert_close(cam, textbook, rtol=1e-4, atol=1e-7)


def test_random_blocks_are_blocks_of_the_grid_each_as_often_as_any(generator):
    features = torch.empty(2000, 1, 6, 4)
    dropped = random_blocks(features, (3, 2), 1, generator)
    assert dropped.shape == (2000, 1, 6, 4)
    grid = dropped.view(2000, 2, 3, 2, 2).permute(0, 1, 3, 2, 4).flatten(3)
    assert (grid.all(dim=3) == grid.any(dim=3)).all(), "blocks are dropped whole"
    counts = grid.all(dim=3).sum(dim=0)
    assert counts.sum() == 2000 and ((counts - 500).abs() < 100).all()


def test_without_mixing_both_later_stages_see_the_map_as_it_is(images):
    torch.manual_seed(0)
    network = build_model("pmm", num_classes=4, backbone="resnet18", height=96, width=64, mix="none").train()
    network.stage3.load_state_dict(network.stage2.state_dict())
    _, second, third = network(images, PIDS)
    assert torch.equal(second.embedding, third.embedding)
    assert second.cam is None and second.negatives is None


@pytest.mark.parametrize("k", [1, 3])
def test_dropblock_zeroes_k_whole_blocks_of_each_sample_anew_for_each_stage(images, generator, monkeypatch, k):
    torch.manual_seed(0)
    network = build_model("pmm", num_classes=4, backbone="resnet18", mix="dropblock", mix_blocks=k, block_size=(3, 2))
    pooled = []
    monkeypatch.setattr("pmm_edge.model.network.max_pool", lambda seen: pooled.append(seen) or max_pool(seen))
    network.bottleneck = torch.nn.Identity()
    features = 1 + torch.rand(8, network.backbone.channels, 6, 4, generator=generator)  # nothing is 0 by itself
    network.train().train_stages(features, PIDS, None, generator)

    drawn = []
    for seen in pooled:
        for sample in range(8):
            dropped = []
            for row in (0, 3):
                for column in (0, 2):
                    block = (sample, slice(None), slice(row, row + 3), slice(column, column + 2))
                    if (seen[block] == 0).all():
                        dropped.append((row, column))
                    else:
                        assert torch.equal(seen[block], features[block]), "a block is dropped whole, or left as it is"
            assert len(dropped) == k
            drawn.append(dropped)
    assert len(pooled) == 2 and drawn[:8] != drawn[8:], "stages II and III draw for themselves"
    assert any(drawn[:1] != drawn[n : n + 1] for n in range(8)), "and so does each sample"
