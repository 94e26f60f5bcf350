"""Device and processes of a training, and one-line errors for what torch reports about them."""

import gc
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import TCPStore, rendezvous  # type: ignore[attr-defined]  # documented, not in the stubs

from pmm_edge.errors import PmmError
from pmm_edge.machine import in_torchrun
from pmm_edge.runs import about_run
from pmm_edge.runtime.torch_backend import is_out_of_memory, torch_device
from pmm_edge.trainer.config import TrainConfig

T = TypeVar("T")
HEARTBEAT_SECONDS = 1.0


@dataclass(frozen=True)
class World:
    """The processes that train together, seen from one of them; a single one by default."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # rank on this machine, and the number of the GPU that this process uses
    local_size: int = 1  # processes on this machine, which share its memory and cores

    @property
    def leads(self) -> bool:
        """Whether this process ranks, writes files and reports."""
        return self.rank == 0

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set in any process."""
        if self.size == 1:
            return list(flags)
        maximum = torch.tensor([int(flag) for flag in flags])  # on the CPU, so that nothing waits for a GPU
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in maximum]

    def gather(self, values: list[T], to_first: bool = False) -> list[T]:
        """Concatenate the lists of all processes in the order of their ranks; `to_first`: [] in the others."""
        if self.size == 1:
            return values
        of_each: list[Any] = [()] * self.size
        if to_first:
            dist.gather_object(values, of_each if self.leads else None)
        else:
            dist.all_gather_object(of_each, values)
        return [value for of_one in of_each for value in of_one]

    def copy_from_first(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite tensors with those of the first process."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, 0)

    def first(self, work: Callable[[], T]) -> T:
        """Do work in the first process, however long it takes, and return its result in all.

        torch ends a process that waits for another one for longer than the group's timeout, 30 minutes; so the
        processes exchange heartbeats meanwhile.
        """
        if self.size == 1:
            return work()
        done = threading.Event()

        def exchange() -> None:
            while not self.any(self.leads and done.wait(HEARTBEAT_SECONDS))[0]:
                pass

        result: list[Any] = [None]
        with ThreadPoolExecutor(1) as pool:
            exchanged = pool.submit(exchange)
            try:
                result = [work()] if self.leads else result
            finally:
                done.set()
        exchanged.result()
        dist.broadcast_object_list(result, 0)
        return result[0]


@contextmanager
def joined(resume: Path | None = None) -> Iterator[World]:
    """Join the processes that `torchrun` started with this one; without `torchrun`, a world of one.

    torchrun numbers machines in an order that may change between two starts. The ranks are rotated so that the first
    process finds the run folder `resume` on its machine; `RANK` is set to the new rank.
    Raises PmmError if another process has stopped, does not answer or cannot be joined.
    """
    if not in_torchrun():
        yield World()
        return
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
    try:
        world = World(*(int(os.environ.get(name) or os.environ["WORLD_SIZE"]) for name in names))
    except ValueError as error:
        raise PmmError(f"{', '.join(names)} are not all numbers", "Start several processes with torchrun") from error
    try:
        store, rank, size = next(rendezvous("env://"))
        if resume:
            store.set(f"folder/{rank}", "found" if about_run(resume) else "")
            rank = (rank - next((other for other in range(size) if store.get(f"folder/{other}")), 0)) % size
            world, os.environ["RANK"] = replace(world, rank=rank), str(rank)
        # NCCL connects with the first exchange between GPUs, which a training on CPUs never starts.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
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
        lost = r"Connection (closed|reset) by peer|Timed out waiting|Application timeout|timed out connecting"
        if not isinstance(error, dist.DistError) and not re.search(lost, str(error)):
            raise
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it, often before this error is printed
        remedy = "Its error or its machine says why; --resume continues the run"
        raise PmmError("another process has stopped or does not answer", remedy) from error
    finally:
        dist.destroy_process_group()
        gc.collect()  # the group's threads end with it; one that released a tensor at exit would abort the process


def first_to_report(text: str) -> bool:
    """Whether no process of `torchrun` on this machine has reported this error; True if that cannot be determined.

    A process that stops makes the others stop too, so an error that all meet is printed by the first one only.
    """
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection((address, port), timeout=5).close()  # or TCPStore retries and logs for 20 s
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        start, machine = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "GROUP_RANK"))
        return store.add(f"pmm-edge/{start}/{machine}/{text}", 1) == 1
    except (KeyError, ValueError, RuntimeError, OSError):
        return True


def choose_machine(config: TrainConfig, world: World) -> tuple[torch.device, torch.dtype]:
    """The device and autocast type of this process; `auto` is its GPU or the CPU, and bfloat16 if it computes in it.

    Raises PmmError if there is no such device, or it cannot do what the configuration requires.
    """
    name, gpus = config.device, torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if world.size > 1 and (name not in ("cpu", "cuda") or (name == "cuda" and world.local_rank >= gpus)):
        raise PmmError(
            f"{world.local_size} processes on this machine need as many GPUs; device is {name}, torch finds {gpus}",
            "Use --device cuda and --nproc-per-node with the number of GPUs, or train with --device cpu",
        )
    if world.size > 1 and name == "cuda":
        torch.cuda.set_device(world.local_rank)
    device = torch_device(world.local_rank if name == "cuda" else name)
    if device.type == "cpu" and config.sync_batch_norm and world.size > 1:
        raise PmmError("torch synchronizes batch norm on GPUs only", "Choose --no-sync-batch-norm, or train on GPUs")
    if device.type == "cpu" and config.precision == "fp16":  # computed in software: seconds instead of milliseconds
        raise PmmError("precision fp16 trains on a GPU only", "Choose --precision bf16 or fp32 on a CPU")
    if config.precision != "auto":
        return device, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device, torch.bfloat16 if native else torch.float32


@contextmanager
def torch_errors_explained(device: torch.device, config: TrainConfig, world: World) -> Iterator[None]:
    """Raise PmmError with a remedy in place of torch's errors for too little memory and a failed compilation."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            unit = config.images_per_identity * config.accumulate * world.size
            half = config.batch // 2 // unit * unit
            smaller = f"Try --batch {half}, or --accumulate {2 * config.accumulate}"
            remedy = smaller if half >= 2 * unit else "Choose a smaller backbone or input, or --precision bf16"
            problem = f"training with a batch of {config.batch} does not fit into the memory of {device}"
            raise PmmError(problem, remedy) from error
        from torch._dynamo.exc import BackendCompilerFailed

        if not isinstance(error, BackendCompilerFailed):
            raise
        raise PmmError(
            f"--compile failed: {str(error).strip().splitlines()[0]}",
            "Leave --compile out; it needs a C and C++ compiler (such as the Debian package g++)",
        ) from error
