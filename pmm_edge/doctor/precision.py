"""Which types the processor and the GPU multiply in hardware."""

from __future__ import annotations

from pathlib import Path

from pmm_edge.doctor.findings import Finding
from pmm_edge.machine import cpuinfo

_X86 = {
    "FP32": (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("sse2", "SSE2")),
    "INT8": (("amx_int8", "AMX"), ("avx512_vnni", "AVX-512 VNNI"), ("avx_vnni", "AVX VNNI")),
    "BF16": (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512")),
    "FP16": (("amx_fp16", "AMX"), ("avx512_fp16", "AVX-512")),
}
_ARM = {
    "INT8": (("i8mm", "i8mm"), ("asimddp", "dot products")),
    "BF16": (("bf16", "bf16"),),
    "FP16": (("asimdhp", "half precision"),),
}
"""For each type the flags of /proc/cpuinfo that speed it up, and what they are called."""
_TENSOR_CORES = (((7, 0), "FP16"), ((7, 2), "INT8"), ((8, 0), "BF16"), ((8, 9), "FP8"), ((10, 0), "FP4"))
"""The first compute capability whose tensor cores multiply in a type (CUDA C++ Programming Guide)."""


def processor_precision(root: Path) -> Finding:
    """What the processor's flags say."""
    info = cpuinfo(root)
    table, flags = (_X86, info["flags"]) if "flags" in info else (_ARM, info.get("Features", ""))
    there = set(flags.split())
    if not there:
        return Finding("processor", "unknown: it names no flags")
    fast, slow = [], []
    for kind, known in table.items():
        named = [name for flag, name in known if flag in there]
        if kind == "FP32":
            named = named[:1]  # the widest
        if named:
            fast.append(f"{kind} ({', '.join(named)})")
        else:
            slow.append(kind)
    said = f"made for {', '.join(fast)}" if fast else ""
    return Finding(
        "processor", "; ".join(part for part in (said, f"not for {', '.join(slow)}" if slow else "") if part)
    )


def gpu_precision(capability: tuple[int, int]) -> str:
    """The types of a GPU's tensor cores, by its compute capability."""
    kinds = [kind for first, kind in _TENSOR_CORES if capability >= first]
    return f"tensor cores for {', '.join(kinds)}" if kinds else "no tensor cores"
