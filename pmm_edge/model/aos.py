"""Adversarially occluded samples (Huang et al., CVPR 2018): occlusion where it hurts the baseline most.

A window of a tenth of the image's area slides over each training image; for each position, the network's probability
of the true identity falls by some amount (sections 3.2 and 3.3). Half of the images of each batch are occluded by one
window, whose position is drawn with a probability proportional to the fall. It replaces the random erasing of the
other methods, with its probability of a half and its value, the mean color. Network and losses are the baseline's.

Where this differs from the source, or the source is silent:
- The source trains a network, measures it once, and trains another one from the start. Here one network is trained: it
  is measured after a quarter and after half of the epochs, and before that all positions are equally probable.
- Neighboring positions are about half a window apart, 30 for 384x128 (the authors' code: 10 pixels, 160 for 256x128),
  because each costs a forward pass. The map is not blurred.
- A flipped image is occluded at the mirrored position, instead of being measured separately.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pmm_edge.model.network import ReidNetwork, average_pool

AREA = 0.1  # of a window, as a share of the image


def window_side(height: int, width: int) -> int:
    """Side of the square window in pixels."""
    return min(height, width, round(math.sqrt(AREA * height * width)))


def window_corners(height: int, width: int) -> NDArray[np.int64]:
    """Top left corners (W, 2) of all windows, evenly spaced from border to border in each direction."""
    side = window_side(height, width)
    counts = (1 + math.ceil((length - side) / max(1, side // 2)) for length in (height, width))
    rows, columns = (
        np.linspace(0, length - side, count).round().astype(np.int64)
        for length, count in zip((height, width), counts, strict=True)
    )
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)


class Occlusion:
    """How far each window lowers the probability of the true identity, for each training image."""

    def __init__(self, images: int, height: int, width: int) -> None:
        self.corners = window_corners(height, width)
        self.falls = np.zeros((images, len(self.corners)), dtype=np.float32)
        self.epoch = 0  # after which it was measured last; 0 before that

    def draw(self, indices: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
        """Draw the top left corner of a window for each image: (N,) indices -> (N, 2) row and column."""
        chances = self.falls[indices].astype(np.float64)
        chances[chances.sum(axis=1) == 0] = 1.0
        steps = chances.cumsum(axis=1)
        chosen = (steps <= random.random((len(indices), 1)) * steps[:, -1:]).sum(axis=1)
        return self.corners[chosen]

    def state_dict(self) -> dict[str, Any]:
        return {"falls": torch.from_numpy(self.falls), "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; raise ValueError if it belongs to other images or windows."""
        falls = state["falls"].numpy()
        if falls.shape != self.falls.shape:
            raise ValueError(f"occlusion of {falls.shape} images and windows instead of {self.falls.shape}")
        self.falls, self.epoch = falls, int(state["epoch"])


def occlusion_epochs(epochs: int) -> tuple[int, int]:
    """The epochs after which the network is measured."""
    return max(1, epochs // 4), max(1, epochs // 2)


@torch.inference_mode()
def probability_falls(network: ReidNetwork, images: Tensor, pids: Tensor) -> Tensor:
    """How far each window lowers the probability of the true identity: (N, W), 0 where it does not.

    `images` are (N, 3, H, W) float, normalized; `pids` (N,) class indices. `network` is in evaluation mode.
    """

    def probability(images: Tensor) -> Tensor:
        logits = network.stage1(average_pool(network.backbone(images)))[1]
        return logits.float().softmax(dim=1).gather(1, pids[:, None])[:, 0]

    side, whole, falls = window_side(*images.shape[2:]), probability(images), []
    for row, column in window_corners(*images.shape[2:]).tolist():
        occluded = images.clone()
        occluded[:, :, row : row + side, column : column + side] = 0.0
        falls.append((whole - probability(occluded)).clamp(min=0))
    return torch.stack(falls, dim=1)
