"""The losses of PMM: batch-hard soft-margin triplet loss plus label-smoothed cross-entropy, for each stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pmm_edge.model import StageOutput
from pmm_edge.model.mixing import MixedLabels

LABEL_SMOOTHING = 0.1


def batch_hard_triplet_loss(embeddings: Tensor, pids: Tensor) -> Tensor:
    """Mean over anchors of softplus(d_ap - d_an), with the farthest positive and the nearest negative.

    Hermans et al., "In Defense of the Triplet Loss", 2017, equation 5 with the soft margin. d is the Euclidean distance
    of the embeddings (N, D); `pids` are (N,).
    """
    distances = pairwise_distances(embeddings)
    same = pids[:, None] == pids[None, :]
    hardest_positive = distances.masked_fill(~same, 0.0).amax(dim=1)
    hardest_negative = distances.masked_fill(same, torch.inf).amin(dim=1)
    return F.softplus(hardest_positive - hardest_negative).mean()


def pairwise_distances(embeddings: Tensor) -> Tensor:
    """Euclidean distances in float32: (N, D) -> (N, N). The lower bound of 1e-6 keeps the gradient finite at 0."""
    embeddings = embeddings.float()
    squares = embeddings.square().sum(dim=1)
    with torch.autocast(embeddings.device.type, enabled=False):
        squared = squares[:, None] + squares[None, :] - 2 * embeddings @ embeddings.T
    return squared.clamp_min(1e-12).sqrt()


def identity_loss(logits: Tensor, pids: Tensor, mixed: MixedLabels | None = None) -> Tensor:
    """Cross-entropy of (N, classes) with label smoothing 0.1; `pids` are (N,) int64 class indices.

    With mixed labels, the loss of a sample is (1 - share) CE(own identity) + share CE(other identity) (CutMix, 2019).
    """
    if mixed is None:
        return F.cross_entropy(logits.float(), pids, label_smoothing=LABEL_SMOOTHING)
    own, other = (
        F.cross_entropy(logits.float(), labels, label_smoothing=LABEL_SMOOTHING, reduction="none")
        for labels in (pids, mixed.other)
    )
    return torch.lerp(own, other, mixed.share).mean()


def pmm_loss(
    outputs: Sequence[StageOutput], pids: Tensor, mixed: MixedLabels | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the triplet loss and the identity loss over all stages (paper section 2.1).

    `pids` are (N,) int64 class indices; `mixed` are the labels that CutMix or A-CutMix mixed in. The triplet loss has
    no fractional labels: there an image counts as the identity that fills most of it.
    Returns the loss, and its parts by name (`triplet_1`, `identity_1`, `triplet_2`, ...), detached.
    """
    parts: dict[str, Tensor] = {}
    largest = pids if mixed is None else torch.where(mixed.share > 0.5, mixed.other, pids)
    for number, stage in enumerate(outputs, start=1):
        parts[f"triplet_{number}"] = batch_hard_triplet_loss(stage.embedding, largest)
        parts[f"identity_{number}"] = identity_loss(stage.logits, pids, mixed)
    return torch.stack(list(parts.values())).sum(), {name: part.detach() for name, part in parts.items()}
