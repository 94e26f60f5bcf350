"""What each command needs, and whether it is here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pmm_edge.doctor.packages import importable
from pmm_edge.errors import PmmError

_TRAIN_EXTRA = "pip install 'pmm-edge[train]'"
_BASE = "pip install -U pmm-edge"
_ENGINES = ("bench", "embed", "eval", "visualize")
COMMANDS = ("train", "export", "trt", *_ENGINES, "verify", "data", "synth")
"""As `pmm doctor` takes them; `trt` is `pmm export --trt`."""

_TOML = () if sys.version_info >= (3, 11) else ("tomli",)
_MODULES = {
    "train": ("torch", "torchvision", "tensorboard", "tomli_w", *_TOML),
}
"""Modules of the extra `train` without which a command cannot work."""
_EXPORT = ("torch", "torchvision", "onnx", "onnxscript", "safetensors")
"""Those without which a checkpoint cannot be exported; a .onnx file can still be bundled."""
_EVERY = {"numpy": "numpy", "PIL": "pillow"}
_CHECKPOINTS = ("torch", "torchvision", "safetensors")
_OPTIONAL = {
    "bench": ("onnx", "no --explain", _TRAIN_EXTRA),
    "eval": ("matplotlib", "no --cmc plot", _TRAIN_EXTRA),
    "embed": ("pyarrow", "no .parquet files", "pip install 'pmm-edge[parquet]'"),
}


@dataclass(frozen=True)
class Readiness:
    """Whether a command can work here."""

    command: str
    missing: list[str] = field(default_factory=list)
    """Why it cannot work."""
    limits: list[str] = field(default_factory=list)
    """What of it does not work."""
    remedies: list[str] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        return not self.missing

    @property
    def words(self) -> str:
        """`ready`, `cannot work: ...` or `ready, but ...`."""
        if self.missing:
            return f"cannot work: {'; '.join(self.missing)}"
        return f"ready, but {'; '.join(self.limits)}" if self.limits else "ready"


def check_commands(names: Sequence[str]) -> None:
    """Refuse names that are no commands.

    Raises:
        PmmError: one is not in `COMMANDS`.
    """
    for name in names:
        if name not in COMMANDS:
            raise PmmError(f"there is no command '{name}' to examine", f"Choose of {', '.join(COMMANDS)}")


def readiness(onnxruntime: dict[str, Any], tensorrt: dict[str, Any]) -> list[Readiness]:
    """Whether each command can work.

    Args:
        onnxruntime: what the probe of ONNX Runtime found.
        tensorrt: what the probe of TensorRT found.
    """
    engines = _engines(onnxruntime, tensorrt)
    return [_ready(command, engines) for command in COMMANDS]


@dataclass(frozen=True)
class _Engine:
    files: str
    problem: str | None
    remedy: str


def _engines(onnxruntime: dict[str, Any], tensorrt: dict[str, Any]) -> list[_Engine]:
    """The three engines with the files that each runs, and what is wrong with it."""
    absent = [module for module in _CHECKPOINTS if not importable(module)]
    torch = f"{absent[0]} is not installed" if absent else None
    trt = tensorrt.get("error") or tensorrt.get("cuda_error")
    return [
        _Engine(".onnx", _onnxruntime_problem(onnxruntime), _BASE),
        _Engine(".pt and .safetensors", torch, _TRAIN_EXTRA),
        _Engine(".engine", trt, tensorrt.get("remedy") or tensorrt.get("cuda_remedy") or ""),
    ]


def _onnxruntime_problem(found: dict[str, Any]) -> str | None:
    if "error" in found:
        return "onnxruntime is not installed" if not importable("onnxruntime") else f"onnxruntime: {found['error']}"
    cpu = found["providers"].get("CPUExecutionProvider", "it has no CPU provider")
    return f"onnxruntime: {cpu}" if cpu else None


def _ready(command: str, engines: list[_Engine]) -> Readiness:
    onnx, torch, trt = engines
    missing, limits, remedies = _absent(command), list[str](), list[str]()
    if command in ("export", "trt") and onnx.problem:  # every engine is built from a file that ONNX Runtime has read
        missing[onnx.problem] = onnx.remedy
    if command == "export" and (absent := [module for module in _EXPORT if not importable(module)]):
        limits.append(f"only --triton and --deepstream of a .onnx file ({', '.join(absent)} not installed)")
        remedies.append(_TRAIN_EXTRA)
    if command == "trt" and trt.problem:
        missing[trt.problem] = trt.remedy
    if command in _ENGINES:
        broken = [engine for engine in engines if engine.problem]
        if len(broken) == len(engines):
            missing["no engine that runs models"] = f"{_BASE}, or {_TRAIN_EXTRA}"
        else:
            limits += [f"no {engine.files} files ({engine.problem})" for engine in broken]
            # An engine that needs a GPU is nothing to install where there is none.
            remedies += [engine.remedy for engine in broken if engine is not trt]
    if command in _OPTIONAL and not importable(_OPTIONAL[command][0]):
        _, lost, remedy = _OPTIONAL[command]
        limits.append(lost)
        remedies.append(remedy)
    if command == "bench" and torch.problem and not onnx.problem:
        limits.append("needs --reference MODEL.onnx, as the usual reference is a checkpoint")
    if command == "visualize" and torch.problem:
        limits.append("no cams and no mixing, which are of checkpoints")
    found = list(dict.fromkeys([*missing.values()] if missing else remedies))
    return Readiness(command, list(missing), limits, [remedy for remedy in found if remedy])


def _absent(command: str) -> dict[str, str]:
    """Why a command cannot work for want of packages, with what installs them."""
    groups = (
        ([package for module, package in _EVERY.items() if not importable(module)], _BASE),
        ([module for module in _MODULES.get(command, ()) if not importable(module)], _TRAIN_EXTRA),
    )
    return {f"{', '.join(absent)} not installed": remedy for absent, remedy in groups if absent}
