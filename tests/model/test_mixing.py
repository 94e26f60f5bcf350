"""Grad-CAM and every mix, each against a slow reference written from its definition."""

import pytest
import torch

from pmm_edge.errors import PmmError
from pmm_edge.model import build_model, mixing
from pmm_edge.model.network import Head, average_pool, max_pool

PIDS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
CORNERS = [(row, column) for row in (0, 3) for column in (0, 2)]
"""Of the blocks of 3x2 on a 6x4 map."""


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(3)


@pytest.fixture
def images(generator):
    return torch.rand(8, 3, 96, 64, generator=generator)


def pmm(**options):
    torch.manual_seed(0)
    return build_model("pmm", num_classes=4, backbone="resnet18", height=96, width=64, **options).train()


def textbook(features, logits, pids):
    """Grad-CAM by its definition, with a backward pass to the features."""
    (gradient,) = torch.autograd.grad(logits.gather(1, pids[:, None]).sum(), features)
    return torch.relu((gradient.mean(dim=(2, 3), keepdim=True) * features).sum(dim=1)).detach()


@pytest.mark.parametrize("pool", [average_pool, max_pool])
def test_grad_cam_from_the_pooled_vector_equals_the_textbook(pool, generator):
    torch.manual_seed(0)
    head = Head(16, num_classes=5, init_mode="fan_in").double().train()
    features = torch.randn(6, 16, 12, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    pids = torch.tensor([0, 1, 2, 3, 4, 0])
    pooled = pool(features)
    _, logits = head(pooled)
    cam = mixing.grad_cam(features, pooled, logits, pids)
    expected = textbook(features, logits, pids)
    assert expected.max() > 0 and not cam.requires_grad
    torch.testing.assert_close(cam, expected, rtol=1e-12, atol=1e-15)


def test_top_blocks_have_the_largest_sums(generator):
    cam = torch.rand(5, 12, 4, generator=generator)
    replaced = mixing.top_blocks(cam, (3, 2), count=3)
    assert replaced.shape == (5, 1, 12, 4) and replaced.dtype == torch.bool
    for sample in range(5):
        sums = {(r, c): cam[sample, r : r + 3, c : c + 2].sum() for r in range(0, 12, 3) for c in range(0, 4, 2)}
        expected = torch.zeros(12, 4, dtype=torch.bool)
        for row, column in sorted(sums, key=sums.get, reverse=True)[:3]:
            expected[row : row + 3, column : column + 2] = True
        assert torch.equal(replaced[sample, 0], expected)


def test_mix_takes_the_negative_where_replaced_and_routes_the_gradient_to_it(generator):
    features = torch.randn(3, 2, 6, 4, generator=generator, requires_grad=True)
    replaced = torch.zeros(3, 1, 6, 4, dtype=torch.bool)
    replaced[:, :, :3, :2] = True
    mixed = mixing.mix(features, torch.tensor([2, 0, 1]), replaced)
    assert torch.equal(mixed[0, :, :3, :2], features[2, :, :3, :2])
    assert torch.equal(mixed[0, :, 3:], features[0, :, 3:])
    mixed[0].sum().backward()
    assert features.grad[2].sum() == 12 and features.grad[0].sum() == 36 and features.grad[1].sum() == 0


def test_negatives_are_uniform_over_other_identities(generator):
    pids = torch.tensor([1, 0, 1, 2, 0, 2])
    drawn = torch.stack([mixing.draw_negatives(pids, generator) for _ in range(4000)])
    assert (pids[drawn] != pids).all()
    for sample in range(6):
        counts = torch.bincount(drawn[:, sample], minlength=6)[pids != pids[sample]]
        assert ((counts - 1000).abs() < 130).all(), counts  # five standard deviations of a binomial
    with pytest.raises(PmmError):
        mixing.draw_negatives(torch.tensor([4, 4, 4]))


def test_blocks_must_divide_the_map_and_k_scales_with_their_number():
    assert mixing.check_block_grid(384, 128, (3, 2)) == 32
    assert mixing.check_block_grid(192, 64, (3, 2)) == 8
    with pytest.raises(PmmError) as caught:
        mixing.check_block_grid(256, 128, (3, 2))
    assert "240x128" in caught.value.remedy, "the remedy names a size that fits"
    for k, blocks, scaled in ((3, 32, 3), (8, 32, 8), (3, 8, 1), (8, 8, 2), (3, 6, 1)):
        assert mixing.scaled_mix_blocks(k, blocks) == scaled


def sources(mixed, images, sample):
    """For each pixel of a mixed image, the sample that it comes from."""
    source = torch.full(mixed.shape[-2:], -1)
    for other in range(len(images)):
        source[(mixed[sample] == images[other]).all(dim=0)] = other
    return source


def test_cutmix_pastes_one_box_of_another_identity_and_mixes_labels_by_area(images, generator):
    shares = []
    for _ in range(20):
        mixed, labels = mixing.cutmix(images, PIDS, generator)
        for sample in range(8):
            source = sources(mixed, images, sample)
            pasted = source != sample
            shares.append(labels.share[sample].item())
            assert pasted.float().mean().item() == pytest.approx(shares[-1])
            if pasted.any():
                (negative,) = source[pasted].unique().tolist()
                assert PIDS[negative] == labels.other[sample] != PIDS[sample]
                rows, columns = torch.where(pasted)
                assert (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1) == pasted.sum()
    assert min(shares) < 0.1 and max(shares) > 0.5


def test_attentive_cutmix_pastes_the_most_salient_blocks_of_the_negative(images, generator):
    attention = torch.rand(8, 6, 4, generator=generator)
    mixed, labels = mixing.attentive_cutmix(images, PIDS, attention, (3, 2), 1, generator)
    for sample in range(8):
        source = sources(mixed, images, sample)
        (negative,) = source[source != sample].unique().tolist()
        row, column = max(CORNERS, key=lambda at: attention[negative, at[0] : at[0] + 3, at[1] : at[1] + 2].sum())
        expected = torch.zeros(96, 64, dtype=torch.bool)
        expected[row * 16 : (row + 3) * 16, column * 16 : (column + 2) * 16] = True
        assert torch.equal(source != sample, expected)
        assert labels.share[sample].item() == pytest.approx(0.25)
        assert labels.other[sample] == PIDS[negative] != PIDS[sample]


def test_attention_is_the_grad_cam_of_stage_one_and_leaves_the_network_unchanged(images):
    network = pmm()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    cam = network.attention(images, PIDS)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert network.training and all(p.grad is None for p in network.parameters())

    network.eval()
    features = network.backbone(images).detach().requires_grad_()
    logits = network.stage1(average_pool(features))[1]
    torch.testing.assert_close(cam, textbook(features, logits, PIDS), rtol=1e-4, atol=1e-7)


def test_random_blocks_are_uniform_over_the_grid(generator):
    dropped = mixing.random_blocks(torch.empty(2000, 1, 6, 4), (3, 2), 1, generator)
    assert dropped.shape == (2000, 1, 6, 4)
    grid = dropped.view(2000, 2, 3, 2, 2).permute(0, 1, 3, 2, 4).flatten(3)
    assert (grid.all(dim=3) == grid.any(dim=3)).all(), "whole blocks"
    counts = grid.all(dim=3).sum(dim=0)
    assert counts.sum() == 2000 and ((counts - 500).abs() < 100).all()
