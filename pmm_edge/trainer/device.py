"""Which device trains, and in which precision."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from pmm_edge.errors import PmmError
from pmm_edge.runtime.torch_backend import is_out_of_memory


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """`auto` is this process's GPU where there is one, else the CPU.

    Raises:
        PmmError: the name is no device, or the GPU is not there.
    """
    if wanted == "auto":
        wanted = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    elif wanted == "cuda":
        wanted = f"cuda:{local_rank}"
    try:
        device = torch.device(wanted)
        known = device.type in ("cpu", "cuda")
    except RuntimeError:
        known = False
    if not known:
        raise PmmError(f"'{wanted}' is no device to train on", "Choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise PmmError(
            f"device {wanted} is not there: torch sees {torch.cuda.device_count()} GPUs",
            "Train with --device cpu, or check the driver with nvidia-smi",
        )
    return device


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies in it, else float32.

    Raises:
        PmmError: fp16 on a CPU, where torch computes it in software: seconds for a step of milliseconds.
    """
    if wanted == "fp16" and device.type == "cpu":
        raise PmmError("precision fp16 trains on a GPU only", "Choose --precision bf16 or fp32 on a CPU")
    if wanted != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[wanted]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Autocast to `dtype`; nothing for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Take only algorithms that give the same bits every time; what has none raises."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by cuBLAS
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def owner(device: torch.device) -> str:
    """Whose memory a device has, for a message."""
    return "this machine" if device.type == "cpu" else str(device)


@contextmanager
def memory_errors_explained(device: torch.device, batch: int, unit: int) -> Iterator[None]:
    """Say which batch would fit when the memory does not suffice.

    Args:
        batch: images in a step, over all processes.
        unit: a batch must be a multiple of it.

    Raises:
        PmmError: instead of torch's error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        problem = f"training with a batch of {batch} does not fit into the memory of {owner(device)}"
        raise PmmError(problem, memory_remedy(batch, unit)) from error


@contextmanager
def compiler_errors_explained() -> Iterator[None]:
    """Say in one line why torch.compile failed: it needs a compiler, which only its first step finds missing.

    Raises:
        PmmError: instead of torch's error.
    """
    from torch._dynamo.exc import BackendCompilerFailed

    try:
        yield
    except BackendCompilerFailed as error:
        reason = str(error).strip().splitlines()[0]
        # The CPU's back end looks for a C++ compiler, the GPU's for a C compiler; their errors share no type.
        if "compiler" in reason.lower():
            raise PmmError(
                "--compile needs a C++ compiler, and none was found",
                "Install one (such as Debian's package g++), or name it in CXX, or leave --compile out",
            ) from error
        raise PmmError(f"--compile failed: {reason}", "Leave it out: training is the same without it") from error


def memory_remedy(batch: int, unit: int) -> str:
    """What to try when a batch did not fit; a batch holds two multiples of `unit` or more.

    How far the failed step had come is not known, so neither is what an image takes; half of the batch fits unless
    the network itself hardly does.
    """
    half = batch // 2 // unit * unit
    if half < 2 * unit:
        return "Choose a smaller backbone or input, or --precision bf16"
    return f"Try --batch {half}, or --accumulate 2 to take the batch in two parts"
