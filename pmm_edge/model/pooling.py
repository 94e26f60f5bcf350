"""The two global poolings of the paper (section 2.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def average_pool(features: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C)."""
    return features.mean(dim=(2, 3))


def max_pool(features: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C). The gradient goes to one position of a channel, also where several are equal."""
    if torch.are_deterministic_algorithms_enabled():  # the pooling's gradient has no such algorithm on a GPU
        return features.flatten(2).max(dim=2).values
    return F.adaptive_max_pool2d(features, 1).flatten(1)
