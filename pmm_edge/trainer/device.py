"""Which device trains, and in which precision."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from pmm_edge.errors import PmmError


def choose_device(wanted: str) -> torch.device:
    """`auto` is the first GPU where there is one, else the CPU.

    Raises:
        PmmError: the name is no device, or the GPU is not there.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise PmmError(f"'{wanted}' is no device", "Choose auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise PmmError(
            f"device {wanted} is not there: torch sees {torch.cuda.device_count()} GPUs",
            "Train with --device cpu, or check the driver with nvidia-smi",
        )
    return device


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies in it, else float32."""
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
