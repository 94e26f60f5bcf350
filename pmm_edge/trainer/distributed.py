"""Several processes that train one network, started by `torchrun`."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, but missing in the stubs

from pmm_edge.errors import PmmError

T = TypeVar("T")
_STORE_TIMEOUT = timedelta(seconds=5)


@dataclass(frozen=True)
class World:
    """The processes that train together, seen from one of them; a single one by default."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Rank on this machine, and the number of the GPU that this process uses."""
    local_size: int = 1
    """Processes on this machine; they share its memory and cores."""

    @property
    def leads(self) -> bool:
        """Whether this process evaluates, writes files and reports."""
        return self.rank == 0

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set in any process."""
        if self.size == 1:
            return list(flags)
        maximum = torch.tensor([int(flag) for flag in flags])  # on the CPU, so that nothing waits for a GPU
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in maximum]

    def gather(self, values: list[T]) -> list[T]:
        """Concatenate the lists of all processes in the order of their ranks."""
        if self.size == 1:
            return values
        of_each: list[Any] = [None] * self.size
        dist.all_gather_object(of_each, values)
        return [value for of_one in of_each for value in of_one]

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Join the processes that `torchrun` started with this one; without `torchrun`, a world of one.

    Raises PmmError if the processes would share a GPU, or if another one has stopped or cannot be joined.
    """
    world = _from_environment()
    if world.size == 1:
        yield world
        return
    if device not in ("auto", "cpu", "cuda"):
        raise PmmError(
            f"{world.size} processes cannot share device {device}", "Use --device cuda: each takes a GPU of its own"
        )
    on_gpus = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpus and world.local_rank >= torch.cuda.device_count():
        raise PmmError(
            f"{world.local_size} processes on this machine need as many GPUs; torch finds {torch.cuda.device_count()}",
            "Start fewer processes with --nproc-per-node, or train with --device cpu",
        )
    if on_gpus:
        torch.cuda.set_device(world.local_rank)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
    except (RuntimeError, ValueError) as error:
        reason, address = str(error).partition("\n")[0].rstrip("."), os.environ.get("MASTER_ADDR")
        raise PmmError(
            f"cannot join {world.size} processes at {address}:{os.environ['MASTER_PORT']}: {reason}",
            "Start them with torchrun --standalone, which finds a free port; if one has stopped, its error says why",
        ) from error
    try:
        yield world
    except RuntimeError as error:
        # Gloo's errors have no type of their own.
        if not isinstance(error, dist.DistError) and not re.search(r"Connection (closed|reset) by peer", str(error)):
            raise
        raise PmmError(
            "another process of this training has stopped",
            "Its own error says why; --resume continues the run from its last checkpoint",
        ) from error
    finally:
        dist.destroy_process_group()
        # The group is in a reference cycle with the model, and its threads end with it. A thread that releases a tensor
        # while the interpreter shuts down would abort the process.
        gc.collect()


def first_to_report(text: str) -> bool:
    """Whether no other process of `torchrun` has reported this error yet; True if that cannot be determined.

    A process that stops makes the others stop too, so an error that all meet is printed by the first one only.
    """
    try:
        port = int(os.environ["MASTER_PORT"])
        store = TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=_STORE_TIMEOUT)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.add(f"pmm-edge/{attempt}/{text}", 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return True


def _from_environment() -> World:
    found = os.environ
    if found.get("WORLD_SIZE") in (None, "", "1"):
        return World()
    try:
        size, rank, local_rank, _ = (int(found[name]) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"))
        return World(rank, size, local_rank, int(found.get("LOCAL_WORLD_SIZE", size)))
    except (KeyError, ValueError) as error:
        raise PmmError(
            "WORLD_SIZE, RANK, LOCAL_RANK and MASTER_PORT are not all set to numbers, as torchrun does",
            "Start several processes with torchrun, or unset WORLD_SIZE",
        ) from error
