"""One training step: learning rate, augmentation, forward, backward, update."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pmm_edge.data.augment import ERASE_PROBABILITY, augment
from pmm_edge.model import PMM, ReidNetwork, StageOutput
from pmm_edge.model.alternatives import MixedLabels, attention, attentive_cutmix, cutmix
from pmm_edge.trainer.config import TrainConfig
from pmm_edge.trainer.device import autocast
from pmm_edge.trainer.distributed import World
from pmm_edge.trainer.losses import pmm_loss

PAPER_EPOCHS = 400


WARM_UP = 0.1
"""Fraction of a training with the cosine schedule over which the rate rises."""


def learning_rate(config: TrainConfig, epoch: int, done: float = 0.0) -> float:
    """Return the learning rate at a point of the training.

    `paper` follows section 3.1 of the paper: a stepwise warm-up, the peak rate until the middle of the training, then a
    tenth and a hundredth of it. A training of another length than 400 epochs follows the same curve in proportion.
    `cosine` rises linearly from 0 to the peak rate and decays to 0 along a half cosine (Loshchilov and Hutter, 2017).

    Args:
        epoch: 1-based.
        done: fraction of the epoch that is over, in [0, 1); only `cosine` changes within an epoch.
    """
    if config.schedule == "cosine":
        progress = (epoch - 1 + done) / config.epochs
        if progress < WARM_UP:
            return config.lr * progress / WARM_UP
        return config.lr * 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))
    scale = config.lr / 1e-3
    paper_epoch = int(1 + (epoch - 1) * PAPER_EPOCHS / config.epochs)
    if paper_epoch < 50:
        return scale * 1e-4 * (paper_epoch // 5 + 1)
    if paper_epoch < 200:
        return scale * 1e-3
    if paper_epoch < 300:
        return scale * 1e-4
    return scale * 1e-5


@dataclass
class Trainee:
    """A network in training, with all that changes with it."""

    network: ReidNetwork
    forward: Callable[..., tuple[StageOutput, ...]]
    """The network, behind DistributedDataParallel where several processes train."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None
    """The exponential moving average of the weights, where one is kept."""
    device: torch.device
    dtype: torch.dtype

    @property
    def judged(self) -> nn.Module:
        """The network that evaluations judge and `best.pt` holds."""
        return self.average.module if self.average else self.network


class Shard(NamedTuple):
    """The part of a batch that goes through the network at once, on the trainee's device."""

    crops: Tensor
    """(N, H, W, 3) uint8 RGB."""
    pids: Tensor
    """(N,) int64 class indices."""
    seed: int
    """Of its augmentation and mixing."""


def shard_seed(run_seed: int, epoch: int, step: int, shard: int) -> int:
    """Each shard has its own seed, so a resumed run draws what the uninterrupted one would have drawn."""
    return int(np.random.SeedSequence([run_seed, epoch, step, shard]).generate_state(1, np.uint64)[0] >> 1)


def prepare(
    network: ReidNetwork, config: TrainConfig, device: torch.device, dtype: torch.dtype, world: World | None = None
) -> Trainee:
    """Put a network on its device, in channels-last memory, beside the paper's optimiser (Adam, coupled decay)."""
    world = world or World()
    if config.sync_batch_norm and world.size > 1:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network = network.to(device).to(memory_format=torch.channels_last).train()
    if config.compile:
        # Grad-CAM asks autograd for a gradient in the middle of the forward pass, which a compiler cannot follow:
        # the backbone, where the time is spent, is compiled by itself.
        network.backbone.compile()
    forward: nn.Module = network
    if world.size > 1:
        forward = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    return Trainee(
        network,
        forward,
        torch.optim.Adam(
            network.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=device.type == "cuda"
        ),
        torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        _average(network, config.ema),
        device,
        dtype,
    )


def train_step(trainee: Trainee, shards: list[Shard], config: TrainConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Augment, forward, backward for each shard, then one update.

    Returns:
        The mean loss of the shards and its parts, on the device: reading them waits for it.
    """
    trainee.optimizer.zero_grad(set_to_none=True)
    results = []
    for number, shard in enumerate(shards, start=1):
        with _gradients_stay_here(trainee) if number < len(shards) else nullcontext():
            loss, parts = _loss(trainee, shard, config)
            trainee.scaler.scale(loss / len(shards)).backward()
        results.append({"loss": loss.detach(), **parts})
    if config.clip_norm:
        trainee.scaler.unscale_(trainee.optimizer)
        nn.utils.clip_grad_norm_(trainee.network.parameters(), config.clip_norm)
    trainee.scaler.step(trainee.optimizer)
    trainee.scaler.update()
    if trainee.average:
        trainee.average.update_parameters(trainee.network)
    means = {name: torch.stack([result[name] for result in results]).mean() for name in results[0]}
    return means.pop("loss"), means


def _loss(trainee: Trainee, shard: Shard, config: TrainConfig) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator(trainee.device).manual_seed(shard.seed)
    # CutOut is the erasing that every method's augmentation has, of every image instead of half of them.
    erased = 1.0 if config.mix == "cutout" else ERASE_PROBABILITY
    images = augment(shard.crops, config.erase_size, generator, erased)
    with autocast(trainee.device, trainee.dtype):
        images, mixed = _mixed_images(trainee.network, images, shard.pids, generator)
        outputs = trainee.forward(images, shard.pids, generator=generator)
    return pmm_loss(outputs, shard.pids, mixed)


def _mixed_images(
    network: ReidNetwork, images: Tensor, pids: Tensor, generator: torch.Generator
) -> tuple[Tensor, MixedLabels | None]:
    """The images as CutMix and A-CutMix change them, and their labels; as they are with any other method."""
    if not isinstance(network, PMM) or network.mix not in ("cutmix", "a-cutmix"):
        return images, None
    if network.mix == "cutmix":
        return cutmix(images, pids, generator)
    salience = attention(network, images, pids)
    return attentive_cutmix(images, pids, salience, network.block_size, network.mix_blocks, generator)


def _average(network: ReidNetwork, decay: float) -> AveragedModel | None:
    if not decay:
        return None
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def _gradients_stay_here(trainee: Trainee) -> AbstractContextManager[None]:
    """Several processes exchange gradients once a step, with the last shard's."""
    if isinstance(trainee.forward, DistributedDataParallel):
        return trainee.forward.no_sync()
    return nullcontext()
