"""What a step is fed: batches of the epoch in shards, decoded ahead, on the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pmm_edge.data.dataset import Split
from pmm_edge.data.loader import Crops, Replacements, identity_batches
from pmm_edge.errors import PmmError
from pmm_edge.machine import threads
from pmm_edge.trainer.config import TrainConfig
from pmm_edge.trainer.distributed import World
from pmm_edge.trainer.logging import Meter
from pmm_edge.trainer.setup import class_indices
from pmm_edge.trainer.step import Shard, shard_seed


def check_shards(config: TrainConfig, identities: int, world: World) -> None:
    """Refuse a batch that cannot be divided among processes and parts.

    Raises:
        PmmError: shards would be unequal, hold a single identity, or the data set has too few identities.
    """
    shards, each = world.size * config.accumulate, config.images_per_identity
    if config.batch % (shards * each) or config.batch < 2 * shards * each:
        raise PmmError(
            f"a batch of {config.batch} does not give {world.size} processes with {config.accumulate} parts each two or"
            f" more identities of {each} images",
            f"Choose a --batch that is a multiple of {shards * each}, {2 * shards * each} or more",
        )
    if identities < 2 * shards:
        raise PmmError(
            f"{identities} identities are too few for {shards} parts of a batch: each needs two",
            "Train with fewer processes, or a smaller --accumulate",
        )


class Feed:
    """The training images as this process's shards.

    A batch is the same in every process; each takes `accumulate` of its `world.size * accumulate` shards.
    """

    def __init__(self, train: Split, config: TrainConfig, world: World, device: torch.device) -> None:
        used, self.classes = class_indices(train)
        self.paths = [train.paths[index] for index in used]
        self._config, self._device = config, device
        self._count = world.size * config.accumulate
        self._own = range(world.rank * config.accumulate, (world.rank + 1) * config.accumulate)
        self.replacements = Replacements(self.paths, self.classes, config.max_bad_images)
        cache, workers = int(config.cache_gib * 2**30) // world.local_size, threads(world.local_size)
        self.crops = Crops(self.paths, config.height, config.width, cache, self.replacements, workers)

    def batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """The epoch's batches: indices into `paths`."""
        config = self._config
        batches = identity_batches(
            self.classes,
            config.batch // config.images_per_identity,
            config.images_per_identity,
            np.random.default_rng([config.seed, epoch]),
        )
        # Of what is left at the end of an epoch, as many identities are taken as make equal shards of two or more; so
        # an epoch of less than one batch has a step, too, as `check_shards` has seen to.
        unit = self._count * config.images_per_identity
        return [batch[: len(batch) // unit * unit] for batch in batches if len(batch) >= 2 * unit]

    def seeds(self, epoch: int, step: int) -> list[int]:
        """Of all shards of a step."""
        return [shard_seed(self._config.seed, epoch, step, number) for number in range(self._count)]

    def shards(
        self, batches: list[NDArray[np.int64]], epoch: int, first_step: int, meter: Meter
    ) -> Iterator[list[Shard]]:
        """For each step from `first_step` on this process's shards; `meter` is told how long a step waited."""
        parts = [self._split(batch)[number] for batch in batches[first_step:] for number in self._own]
        ahead = self.crops.prefetched(parts, ahead=2 * len(self._own))
        try:
            for step in range(first_step, len(batches)):
                asked = time.perf_counter()
                crops = [next(ahead) for _ in self._own]
                meter.waited(time.perf_counter() - asked)
                indices = parts[(step - first_step) * len(self._own) :][: len(self._own)]
                seeds = [self.seeds(epoch, step)[number] for number in self._own]
                yield [
                    Shard(self._copied(images), self._copied(self.classes[own]), seed)
                    for images, own, seed in zip(crops, indices, seeds, strict=True)
                ]
        finally:
            ahead.close()

    def _split(self, batch: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """A batch in shards of whole identities."""
        identities = batch.reshape(-1, self._config.images_per_identity)
        return [part.ravel() for part in np.split(identities, self._count)]

    def _copied(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()  # so that the copy goes on while the GPU works
        return tensor.to(self._device, non_blocking=True)
