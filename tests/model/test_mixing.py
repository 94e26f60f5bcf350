"""Grad-CAM, ranking and mixing against slow definitions."""

import pytest
import torch

from pmm_edge.errors import PmmError
from pmm_edge.model.mixing import check_block_grid, draw_negatives, grad_cam, mix, scaled_mix_blocks, top_blocks
from pmm_edge.model.network import Head, average_pool, max_pool


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("pool", [average_pool, max_pool])
def test_grad_cam_at_the_pooled_vector_equals_the_textbook_one(pool, generator):
    torch.manual_seed(0)
    head = Head(16, num_classes=5, init_mode="fan_in").double().train()
    features = torch.randn(6, 16, 12, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    pids = torch.tensor([0, 1, 2, 3, 4, 0])
    pooled = pool(features)
    _, logits = head(pooled)
    cam = grad_cam(features, pooled, logits, pids)

    (gradient,) = torch.autograd.grad(logits.gather(1, pids[:, None]).sum(), features)
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    textbook = torch.relu((weights * features).sum(dim=1)).detach()
    assert textbook.max() > 0
    torch.testing.assert_close(cam, textbook, rtol=1e-12, atol=1e-15)
    assert not cam.requires_grad


def test_top_blocks_are_those_with_the_largest_sum(generator):
    cam = torch.rand(5, 12, 4, generator=generator)
    replaced = top_blocks(cam, (3, 2), count=3)
    assert replaced.shape == (5, 1, 12, 4) and replaced.dtype == torch.bool
    for sample in range(5):
        sums = {(r, c): cam[sample, r : r + 3, c : c + 2].sum() for r in range(0, 12, 3) for c in range(0, 4, 2)}
        best = sorted(sums, key=sums.get, reverse=True)[:3]
        expected = torch.zeros(12, 4, dtype=torch.bool)
        for row, column in best:
            expected[row : row + 3, column : column + 2] = True
        assert torch.equal(replaced[sample, 0], expected)


def test_mix_takes_the_negative_where_replaced_and_sends_it_the_gradient(generator):
    features = torch.randn(3, 2, 6, 4, generator=generator, requires_grad=True)
    replaced = torch.zeros(3, 1, 6, 4, dtype=torch.bool)
    replaced[:, :, :3, :2] = True
    mixed = mix(features, torch.tensor([2, 0, 1]), replaced)
    assert torch.equal(mixed[0, :, :3, :2], features[2, :, :3, :2])
    assert torch.equal(mixed[0, :, 3:], features[0, :, 3:])
    mixed[0].sum().backward()
    assert features.grad[2].sum() == 12 and features.grad[0].sum() == 36 and features.grad[1].sum() == 0


def test_negatives_are_uniform_over_other_identities_in_any_order(generator):
    pids = torch.tensor([1, 0, 1, 2, 0, 2])
    drawn = torch.stack([draw_negatives(pids, generator) for _ in range(4000)])
    assert (pids[drawn] != pids).all()
    for sample in range(6):
        counts = torch.bincount(drawn[:, sample], minlength=6)[pids != pids[sample]]
        assert ((counts - 1000).abs() < 130).all(), counts  # five standard deviations of a binomial


def test_a_batch_of_one_identity_is_refused():
    with pytest.raises(PmmError, match="one identity"):
        draw_negatives(torch.tensor([4, 4, 4]))


def test_an_input_that_the_blocks_do_not_divide_names_sizes_that_fit():
    assert check_block_grid(384, 128, (3, 2)) == 32
    assert check_block_grid(192, 64, (3, 2)) == 8
    with pytest.raises(PmmError, match=r"16x8 map.*multiple of 48 \(such as 240 or 288\).*multiple of 32"):
        check_block_grid(256, 128, (3, 2))


@pytest.mark.parametrize(("k", "blocks", "scaled"), [(3, 32, 3), (8, 32, 8), (3, 8, 1), (8, 8, 2), (3, 6, 1)])
def test_k_scales_with_the_number_of_blocks(k, blocks, scaled):
    assert scaled_mix_blocks(k, blocks) == scaled
