"""One training step: the shards of its batch, the learning rate, augmentation, forward, backward, update."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pmm_edge.data.augment import ERASE_PROBABILITY, augment
from pmm_edge.data.dataset import DISTRACTOR_PID, Split
from pmm_edge.data.loader import Crops, Replacements, identity_batches
from pmm_edge.errors import PmmError
from pmm_edge.machine import threads
from pmm_edge.model import PMM, ReidNetwork, StageOutput
from pmm_edge.model.mixing import attentive_cutmix, cutmix
from pmm_edge.trainer.config import TrainConfig
from pmm_edge.trainer.distributed import World
from pmm_edge.trainer.logging import Meter
from pmm_edge.trainer.losses import pmm_loss

PAPER_EPOCHS = 400
WARM_UP = 0.15
"""Fraction of a training over which the cosine schedule warms up."""


def learning_rate(config: TrainConfig, epoch: int, done: float = 0.0) -> float:
    """Return the learning rate at a point of the training.

    `paper` follows section 3.1 of the paper: a stepwise warm-up, the peak rate until the middle of the training, then a
    tenth and a hundredth of it. A training of another length than 400 epochs follows the same curve in proportion.
    `cosine` rises linearly from 0 to the peak rate and decays to 0 along a half cosine (Loshchilov and Hutter, 2017).
    `epoch` is 1-based; `done` is the fraction of it that is over, in which only `cosine` changes.
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
    return scale * (1e-3 if paper_epoch < 200 else 1e-4 if paper_epoch < 300 else 1e-5)


class Shard(NamedTuple):
    """The part of a batch that passes through the network at once, on the training device.

    `crops` are (N, H, W, 3) uint8 RGB, `pids` (N,) int64 class indices; `seed` is that of augmentation and mixing.
    """

    crops: Tensor
    pids: Tensor
    seed: int


def class_indices(train: Split) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the training images that show a person, and their identities numbered from 0."""
    used = np.flatnonzero(train.pids > DISTRACTOR_PID)
    return used, np.unique(train.pids[used], return_inverse=True)[1].astype(np.int64)


class Feed:
    """The training images as the shards of one process.

    The batches of an epoch are the same in all processes. A batch is split into `world.size * accumulate` shards of
    whole identities, and each process takes `accumulate` of them. Each shard has a seed of its own, derived from the
    seed of the run, the epoch, the step and its number, so that a resumed run draws what the uninterrupted one draws.
    Raises PmmError if the batch cannot be split equally, or there are too few identities.
    """

    def __init__(self, train: Split, config: TrainConfig, world: World, device: torch.device) -> None:
        self.count = world.size * config.accumulate
        unit = self.count * config.images_per_identity
        if config.batch % unit or config.batch < 2 * unit:
            raise PmmError(
                f"a batch of {config.batch} cannot be split among {world.size} processes with {config.accumulate}"
                f" micro-batches of two or more identities each",
                f"Choose a --batch that is a multiple of {unit}, {2 * unit} or more",
            )
        if train.identities < 2 * self.count:
            raise PmmError(
                f"{train.identities} identities are too few for {self.count} micro-batches of two or more",
                "Use fewer processes or a smaller --accumulate",
            )
        used, self.classes = class_indices(train)
        self.paths = [train.paths[index] for index in used]
        self._config, self._device = config, device
        self._own = range(world.rank * config.accumulate, (world.rank + 1) * config.accumulate)
        self.replacements = Replacements(self.paths, self.classes, config.max_bad_images)
        cache, workers = int(config.cache_gib * 2**30) // world.local_size, threads(world.local_size)
        self.crops = Crops(self.paths, config.height, config.width, cache, self.replacements, workers)

    def batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """The batches of an epoch: indices into `paths`. The last one is cut to equal shards of whole identities."""
        config = self._config
        each, random = config.images_per_identity, np.random.default_rng([config.seed, epoch])
        batches = identity_batches(self.classes, config.batch // each, each, random)
        unit = self.count * each
        return [batch[: len(batch) // unit * unit] for batch in batches if len(batch) >= 2 * unit]

    def seeds(self, epoch: int, step: int) -> list[int]:
        """The seeds of all shards of a step."""
        sequences = (np.random.SeedSequence([self._config.seed, epoch, step, shard]) for shard in range(self.count))
        return [int(sequence.generate_state(1, np.uint64)[0] >> 1) for sequence in sequences]

    def shards(
        self, batches: list[NDArray[np.int64]], epoch: int, first_step: int, meter: Meter
    ) -> Iterator[list[Shard]]:
        """Yield the shards of this process for each step from `first_step`, decoded ahead; `meter` gets the waits."""
        parts = [np.split(batch, self.count)[number] for batch in batches[first_step:] for number in self._own]
        ahead = self.crops.prefetched(parts, ahead=2 * len(self._own))
        try:
            for step in range(first_step, len(batches)):
                start = time.perf_counter()
                crops = [next(ahead) for _ in self._own]
                meter.waited(time.perf_counter() - start)
                indices = parts[(step - first_step) * len(self._own) :]
                seeds = [self.seeds(epoch, step)[number] for number in self._own]
                yield [
                    Shard(self._to_device(images), self._to_device(self.classes[own]), seed)
                    for images, own, seed in zip(crops, indices, seeds, strict=False)
                ]
        finally:
            ahead.close()

    def _to_device(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()  # lets the copy overlap with the work of the GPU
        return tensor.to(self._device, non_blocking=True)


@dataclass
class Trainee:
    """A network in training, with everything that changes with it.

    `forward` is the network, wrapped in DistributedDataParallel if there are several processes; `average` the moving
    average of its weights; `dtype` the autocast type.
    """

    network: ReidNetwork
    forward: Callable[..., tuple[StageOutput, ...]]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None
    device: torch.device
    dtype: torch.dtype

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and saved as `best.pt`: the average if there is one."""
        return self.average.module if self.average else self.network


def prepare(
    network: ReidNetwork, config: TrainConfig, device: torch.device, dtype: torch.dtype, world: World | None = None
) -> Trainee:
    """Move a network to its device, in channels-last memory, and create its optimizer (Adam, coupled weight decay)."""
    world = world or World()
    if config.sync_batch_norm and world.size > 1:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network = network.to(device).to(memory_format=torch.channels_last).train()
    if config.compile:
        # Only the backbone, which takes the time: a compiler cannot follow Grad-CAM, which asks autograd for a gradient
        # in the middle of the forward pass.
        network.backbone.compile()
    forward: nn.Module = network
    if world.size > 1:
        forward = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    average = None
    if config.ema:
        average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return Trainee(network, forward, optimizer, scaler, average, device, dtype)


def train_step(trainee: Trainee, shards: list[Shard], config: TrainConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Accumulate the gradients of all shards and update the weights once.

    Returns the mean loss of the shards and its parts, on the device: reading them waits for it.
    """
    trainee.optimizer.zero_grad(set_to_none=True)
    results = []
    for number, shard in enumerate(shards, start=1):
        # Processes exchange gradients once per step, with the last shard.
        forward, last = trainee.forward, number == len(shards)
        with forward.no_sync() if isinstance(forward, DistributedDataParallel) and not last else nullcontext():
            loss, parts = _shard_loss(trainee, shard, config)
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


def _shard_loss(trainee: Trainee, shard: Shard, config: TrainConfig) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator(trainee.device).manual_seed(shard.seed)
    erase_probability = 1.0 if config.mix == "cutout" else ERASE_PROBABILITY
    images = augment(shard.crops, config.erase_size, generator, erase_probability)
    network, pids, mixed = trainee.network, shard.pids, None
    with torch.autocast(trainee.device.type, trainee.dtype, enabled=trainee.dtype != torch.float32):
        if isinstance(network, PMM) and network.mix == "cutmix":
            images, mixed = cutmix(images, pids, generator)
        elif isinstance(network, PMM) and network.mix == "a-cutmix":
            cam = network.attention(images, pids)
            images, mixed = attentive_cutmix(images, pids, cam, network.block_size, network.mix_blocks, generator)
        outputs = trainee.forward(images, pids, generator=generator)
    return pmm_loss(outputs, pids, mixed)
