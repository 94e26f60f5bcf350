"""Device and precision of a training, and plain messages for what torch reports about them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pmm_edge.errors import PmmError
from pmm_edge.runtime.torch_backend import is_out_of_memory, torch_device
from pmm_edge.trainer.config import TrainConfig
from pmm_edge.trainer.distributed import World


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Find a device; `auto` is the GPU of this process or the CPU. Raises PmmError if there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch_device(local_rank if name == "cuda" else name)


def choose_machine(config: TrainConfig, world: World) -> tuple[torch.device, torch.dtype]:
    """The device and autocast type of this process. `auto` precision is bfloat16 if the hardware computes in it.

    Raises PmmError if there is no such device, or it cannot do what the configuration requires.
    """
    device = choose_device(config.device, world.local_rank)
    if config.sync_batch_norm and world.size > 1 and device.type == "cpu":
        raise PmmError(
            "batch norm cannot be synchronized on the CPU: torch supports it on GPUs only",
            "Choose --no-sync-batch-norm, or train on GPUs",
        )
    if config.precision == "fp16" and device.type == "cpu":  # computed in software: seconds instead of milliseconds
        raise PmmError("precision fp16 trains on a GPU only", "Choose --precision bf16 or fp32 on a CPU")
    if config.precision != "auto":
        return device, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device, torch.bfloat16 if native else torch.float32


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Use deterministic algorithms only; an operation that has none raises."""
    if not enabled:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def torch_errors_explained(device: torch.device, config: TrainConfig, world: World) -> Iterator[None]:
    """Raise PmmError with a remedy in place of torch's errors for too little memory and a failed compilation."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            owner = "this machine" if device.type == "cpu" else str(device)
            raise PmmError(
                f"training with a batch of {config.batch} does not fit into the memory of {owner}",
                memory_remedy(config, world),
            ) from error
        from torch._dynamo.exc import BackendCompilerFailed

        if not isinstance(error, BackendCompilerFailed):
            raise
        raise PmmError(
            f"--compile failed: {str(error).strip().splitlines()[0]}",
            "Leave --compile out; it needs a C and C++ compiler (such as the Debian package g++)",
        ) from error


def memory_remedy(config: TrainConfig, world: World) -> str:
    """What to try after running out of memory: half of the batch, if it can still be split."""
    unit = config.images_per_identity * config.accumulate * world.size
    half = config.batch // 2 // unit * unit
    if half < 2 * unit:
        return "Choose a smaller backbone or input, or --precision bf16"
    return f"Try --batch {half}, or --accumulate {2 * config.accumulate}"
