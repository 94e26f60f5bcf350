"""Several processes that train one network, as `torchrun` starts them."""

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
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # a documented name that its stubs leave out

from pmm_edge.errors import PmmError
from pmm_edge.trainer.device import choose_device

T = TypeVar("T")
_NONE = 2**62
_STORE_SECONDS = timedelta(seconds=5)


@dataclass(frozen=True)
class World:
    """One process among those that train together; alone by default."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of this machine: the number of its GPU."""
    local_size: int = 1
    """The processes of this machine, which share its memory and its cores."""

    @property
    def leads(self) -> bool:
        """Whether this process evaluates, writes and reports."""
        return self.rank == 0

    def agree(self, wish: bool) -> bool:
        """Whether any process wishes it: all of them get the same answer."""
        return self.any_of(wish)[0]

    def any_of(self, *wishes: bool) -> list[bool]:
        """Of each wish whether any process has it, in one message."""
        if self.size == 1:
            return list(wishes)
        all_wishes = torch.tensor([int(wish) for wish in wishes])  # on the CPU: nothing waits for a GPU
        dist.all_reduce(all_wishes, op=dist.ReduceOp.MAX)
        return [bool(wish) for wish in all_wishes]

    def gathered(self, values: list[T]) -> list[T]:
        """The values of all processes, in every process."""
        if self.size == 1:
            return values
        of_each: list[Any] = [None] * self.size
        dist.all_gather_object(of_each, values)
        return [value for of_one in of_each for value in of_one]

    def first(self, number: int | None) -> int | None:
        """The smallest number that any process has; None where none has one."""
        if self.size == 1:
            return number
        smallest = torch.tensor(_NONE if number is None else number)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        return None if int(smallest) == _NONE else int(smallest)

    def share(self, value: str) -> str:
        """The leading process's value, in every process."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()


def first_to_say(text: str) -> bool:
    """Whether no other process of `torchrun` has said this line yet; True also where that cannot be known.

    Whoever meets an error first says it, for a process that ends takes the others with it; what only one meets, it
    says.
    """
    try:
        port = int(os.environ["MASTER_PORT"])
        store = TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=_STORE_SECONDS)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.add(f"pmm-edge/{attempt}/{text}", 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return True


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Join the processes that `torchrun` started with this one; without it, a world of one.

    Args:
        device: what a run asks for: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        PmmError: this process's device is not there, all would share one GPU, another process has stopped or
            cannot be joined, or the environment is not that of `torchrun`.
    """
    world = _told_by_torchrun()
    if world.size == 1:
        yield world
        return
    if device.startswith("cuda:"):
        raise PmmError(
            f"{world.size} processes cannot share {device}", "Give --device cuda: each takes a GPU of its own"
        )
    own = choose_device(device, world.local_rank)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    _join(world, own)
    try:
        yield world
    except RuntimeError as error:
        # Gloo's errors have no type of their own.
        if not isinstance(error, dist.DistError) and not re.search(r"Connection (closed|reset) by peer", str(error)):
            raise
        raise PmmError(
            "another process of this training has stopped",
            "Its own error says why; the run goes on from its last checkpoint with --resume",
        ) from error
    finally:
        dist.destroy_process_group()
        # Gloo's threads end with the last that holds the group, which is in a cycle with the model; one that still
        # lets go of a tensor while the interpreter ends would abort the process.
        gc.collect()


def _join(world: World, own: torch.device) -> None:
    try:
        # Both, so that flags travel between CPUs also where gradients travel between GPUs.
        dist.init_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        why = str(error).partition("\n")[0].rstrip(".")
        raise PmmError(
            f"cannot join {world.size} processes at {place}: {why}",
            "Start them with torchrun (--standalone finds a free port); one that has stopped has said why",
        ) from error


def _told_by_torchrun() -> World:
    """What the environment says; a world of one where it says nothing."""
    told = {
        name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    if told["WORLD_SIZE"] in ("", "1"):
        return World()
    try:
        size, rank, local_rank = (int(told[name]) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        int(told["MASTER_PORT"])
        if not told["MASTER_ADDR"]:
            raise ValueError
    except ValueError as error:
        said = ", ".join(f"{name} is {value or 'not set'}" for name, value in told.items())
        raise PmmError(
            f"the environment is not that of torchrun: {said}",
            "Start several processes with torchrun, which sets all of them, or unset WORLD_SIZE",
        ) from error
    return World(rank, size, local_rank, local_size)
