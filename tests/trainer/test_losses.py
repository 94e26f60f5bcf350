import math

import pytest
import torch

from pmm_edge.trainer.losses import batch_hard_triplet_loss, identity_loss


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
