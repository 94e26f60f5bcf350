"""One training step: what is timed by `benchmarks/train_step.py` is what `pmm train` runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pmm_edge.data.augment import augment
from pmm_edge.trainer.config import TrainConfig
from pmm_edge.trainer.device import autocast
from pmm_edge.trainer.losses import pmm_loss


@dataclass
class Trainee:
    """A network in training with all that changes with it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    dtype: torch.dtype


def prepare(model: nn.Module, config: TrainConfig, device: torch.device, dtype: torch.dtype) -> Trainee:
    """Put a network on its device, in channels-last memory, beside the paper's optimiser (Adam, coupled decay)."""
    model = model.to(device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(
        model.parameters(), lr=1e-3, weight_decay=config.weight_decay, fused=device.type == "cuda"
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return Trainee(model, optimizer, scaler, device, dtype)


def train_step(
    trainee: Trainee, crops: Tensor, pids: Tensor, erase_size: int, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """Augment, forward, backward, update.

    Args:
        crops: (N, H, W, 3) uint8 RGB on the trainee's device.
        pids: (N,) int64 class indices, likewise.
        generator: of augmentation and mixing, on that device.

    Returns:
        The loss and its parts, on the device: reading them waits for it.
    """
    images = augment(crops, erase_size, generator)
    with autocast(trainee.device, trainee.dtype):
        outputs = trainee.model(images, pids, generator=generator)
    loss, parts = pmm_loss(outputs, pids)
    trainee.optimizer.zero_grad(set_to_none=True)
    trainee.scaler.scale(loss).backward()
    trainee.scaler.step(trainee.optimizer)
    trainee.scaler.update()
    return loss.detach(), parts
