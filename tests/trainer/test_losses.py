import math

import pytest
import torch

from pmm_edge.model import StageOutput
from pmm_edge.model.mixing import MixedLabels
from pmm_edge.trainer.losses import batch_hard_triplet_loss, identity_loss, pmm_loss


def test_triplet_loss_takes_the_farthest_positive_and_the_nearest_negative():
    embeddings = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0], [10.0, 0.0]])
    pids = torch.tensor([0, 0, 0, 1])
    d = torch.cdist(embeddings, embeddings).tolist()
    hardest = [(4.0, 10.0), (d[1][2], 7.0), (d[2][1], d[2][3]), (0.0, 7.0)]
    expected = sum(math.log1p(math.exp(ap - an)) for ap, an in hardest) / 4
    assert batch_hard_triplet_loss(embeddings, pids).item() == pytest.approx(expected, rel=1e-5)


def test_triplet_loss_of_equal_embeddings_has_a_finite_gradient():
    embeddings = torch.ones(4, 8, requires_grad=True)
    batch_hard_triplet_loss(embeddings, torch.tensor([0, 0, 1, 1])).backward()
    assert torch.isfinite(embeddings.grad).all()


def test_identity_loss_smooths_labels_by_a_tenth():
    logits = torch.tensor([[2.0, 0.0, -1.0]])
    log_probabilities = torch.log_softmax(logits, dim=1)[0]
    target = torch.tensor([0.1 / 3 + 0.9, 0.1 / 3, 0.1 / 3])
    assert identity_loss(logits, torch.tensor([0])).item() == pytest.approx(-(target * log_probabilities).sum().item())


def test_mixed_labels_share_the_identity_loss_by_area_and_count_whole_in_triplets():
    torch.manual_seed(0)
    logits, embeddings = torch.randn(4, 3), torch.randn(4, 8)
    pids, other = torch.tensor([0, 0, 1, 1]), torch.tensor([2, 1, 0, 0])
    mixed = MixedLabels(other, torch.tensor([0.25, 0.75, 0.0, 1.0]))
    expected = sum(
        (1 - share) * identity_loss(logits[i : i + 1], pids[i : i + 1])
        + share * identity_loss(logits[i : i + 1], other[i : i + 1])
        for i, share in enumerate(mixed.share)
    )
    _, parts = pmm_loss([StageOutput(embeddings, logits)], pids, mixed)
    assert parts["identity_1"].item() == pytest.approx(expected.item() / 4)
    assert parts["triplet_1"].item() == batch_hard_triplet_loss(embeddings, torch.tensor([0, 1, 1, 0])).item()
