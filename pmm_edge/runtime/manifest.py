"""TensorRT engines: how to build one, and the manifest next to it that says what it is and where it runs."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pmm_edge.errors import ModelError, PmmError
from pmm_edge.files import decode_sealed, encode_sealed
from pmm_edge.runtime.model_file import ModelFile, read_model
from pmm_edge.spec import HardwareCompatibility, ModelSpec

RTX_GPUS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""Compute capabilities that TensorRT for RTX compiles for: Turing, Ampere (two), Ada, Blackwell, DGX Spark."""
RTX_DEFAULT = ("sm80", "sm86", "sm89", "sm120")
"""The default of TensorRT for RTX. Turing restricts what all GPUs of an engine can run."""
_PROFILE = "Give minimum,optimal,maximum with 1 <= minimum <= optimal <= maximum, for example 1,16,64"


@dataclass(frozen=True)
class BatchProfile:
    """The batch sizes that an engine accepts, and the one that it is optimized for."""

    minimum: int = 1
    optimal: int = 16
    maximum: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimal <= self.maximum:
            raise PmmError(f"invalid batch profile {self}", _PROFILE)

    def __str__(self) -> str:
        return f"{self.minimum},{self.optimal},{self.maximum}"

    @staticmethod
    def parse(text: str) -> BatchProfile:
        """Parse `1,16,64`."""
        try:
            minimum, optimal, maximum = map(int, text.split(","))
        except ValueError as error:
            raise PmmError(f"invalid batch profile '{text}'", _PROFILE) from error
        return BatchProfile(minimum, optimal, maximum)

    @staticmethod
    def chosen(given: BatchProfile | str | None, static_batch: int | None) -> BatchProfile:
        """Return the given profile, or that of a graph with a static batch, which it must not contradict."""
        profile = BatchProfile.parse(given) if isinstance(given, str) else given
        static = BatchProfile(static_batch, static_batch, static_batch) if static_batch else None
        if profile and static and profile != static:
            raise PmmError(f"batch profile {profile} contradicts the static batch of the graph", f"Give {static}")
        return static or profile or BatchProfile()


@dataclass(frozen=True)
class BuildSettings:
    """How an engine is built from an ONNX file."""

    batch: BatchProfile = BatchProfile()
    workspace_gib: float | None = None  # limit of the scratch memory of a layer; None for all memory of the GPU
    optimization_level: int = 3  # 0 builds fastest, 5 searches longest; 3 is the default of TensorRT
    hardware_compatible: HardwareCompatibility | None = None  # run on other GPUs too, slower. Not supported on Jetson
    version_compatible: bool = False  # run with later versions of TensorRT, slower
    timing_cache: bool = True  # reuse layer timings in the next build with the same GPU and TensorRT
    gpus: tuple[str, ...] = ()  # of an engine of TensorRT for RTX, out of RTX_GPUS; empty for TensorRT

    def __post_init__(self) -> None:
        if self.workspace_gib is not None and not 0 < self.workspace_gib <= 1 << 20:  # also refuses NaN
            raise PmmError(f"invalid workspace of {self.workspace_gib:g} GiB", "Give at most the GPU memory")
        if not 0 <= self.optimization_level <= 5:
            raise PmmError(f"invalid optimization level {self.optimization_level}", "Give 0 to 5")
        if unknown := ",".join(name for name in self.gpus if name not in RTX_GPUS):
            raise PmmError(f"TensorRT for RTX has no GPU '{unknown}'", f"Choose from {','.join(RTX_GPUS)}")

    @property
    def compiler(self) -> str:
        """`TensorRT` or `TensorRT for RTX`; their engines are not interchangeable."""
        return "TensorRT for RTX" if self.gpus else "TensorRT"

    def engine_path(self, onnx: Path) -> Path:
        """Return where the engine of an ONNX file is written by default: `model.engine` or `model-rtx.engine`."""
        return onnx.with_name(f"{onnx.stem}-rtx.engine") if self.gpus else onnx.with_suffix(".engine")

    def command(self, onnx: Path, engine: Path | None = None, also: Sequence[str] = ()) -> str:
        """Return the `pmm` command that builds `engine`, by default next to `onnx`, with further arguments `also`."""
        words = ["pmm", "export", str(onnx), *(["--rtx", "--gpu", ",".join(self.gpus)] if self.gpus else ["--trt"])]
        words += ["--batch-profile", str(self.batch)]
        words += ["--out", str(engine)] * (engine not in (None, self.engine_path(onnx)))
        words += ["--workspace", f"{self.workspace_gib or 0:g}"] * (self.workspace_gib is not None)
        words += ["--optimization-level", str(self.optimization_level)] * (self.optimization_level != 3)
        words += ["--hardware-compatible", self.hardware_compatible] if self.hardware_compatible else []
        words += ["--version-compatible"] * self.version_compatible
        words += ["--no-timing-cache"] * (not self.timing_cache)
        return shlex.join([*words, *also])


@dataclass(frozen=True)
class Machine:
    """What an engine depends on. TensorRT for RTX needs no GPU to build: `gpu` is `RTX`, `cuda` is empty."""

    gpu: str
    compute_capability: str
    tensorrt: str
    cuda: str


@dataclass(frozen=True)
class PrecisionCount:
    """Number of layers per data type (`FP32`, `FP16`, `INT8`, ..., `unknown`), as the engine reports it.

    Empty for TensorRT for RTX, which chooses kernels on the GPU that runs the engine.
    """

    layers: dict[str, int]  # all that compute, without copies
    products: dict[str, int]  # convolutions and matrix products only


@dataclass(frozen=True)
class EngineManifest:
    """Everything known about an engine."""

    spec: ModelSpec
    onnx: str  # path of the ONNX file relative to the folder of the engine. It is only named and hashed
    onnx_sha256: str
    engine_sha256: str
    engine_size: int  # in bytes
    machine: Machine
    settings: BuildSettings
    precision: PrecisionCount
    build_seconds: float
    schema: Literal[1] = 1

    def __post_init__(self) -> None:
        if not Path(self.onnx).name or Path(self.onnx).is_absolute() or "\0" in self.onnx:
            raise ValueError(f"{self.onnx!r} is not a relative path of a file")

    def to_json(self) -> str:
        return encode_sealed(self)


def manifest_path(engine: Path) -> Path:
    """Return `model.manifest.json` for `model.engine`."""
    return engine.with_suffix(".manifest.json")


def relative_onnx(engine: Path, onnx: Path) -> str:
    """Return the path of an ONNX file as a manifest stores it: both files can be moved or mounted together."""
    return Path(os.path.relpath(onnx.parent.resolve() / onnx.name, engine.parent.resolve())).as_posix()


def onnx_of(manifest: EngineManifest, engine: Path) -> Path:
    """Return where the ONNX file of an engine is, if it still exists."""
    if "/" not in manifest.onnx:
        return engine.with_name(manifest.onnx)  # shown as the user wrote the path
    # Resolve first: `..` of a symbolic link to a folder is not the folder of the link.
    return Path(os.path.normpath(engine.parent.resolve() / manifest.onnx))


def read_manifest(engine: Path) -> EngineManifest:
    """Read the manifest of an engine; raise ModelError if it is missing, invalid or changed."""
    path, remedy = manifest_path(engine), f"Build it here: {BuildSettings().command(engine.with_suffix('.onnx'))}"
    try:
        return decode_sealed(EngineManifest, path.read_bytes(), path.name, ModelError, remedy)
    except (OSError, PmmError) as error:
        problem = error.problem if isinstance(error, PmmError) else error
        raise ModelError(f"cannot use {path}, the manifest of {engine}: {problem}", remedy) from error


def check_files(manifest: EngineManifest, file: ModelFile) -> None:
    """Raise ModelError if the engine, or its ONNX file if that still exists, is not the one in the manifest."""
    engine = file.path
    if file.sha256 != manifest.engine_sha256:
        raise _outdated(manifest, engine, f"{engine} is not the engine that {manifest_path(engine).name} describes")
    onnx = onnx_of(manifest, engine)
    if onnx.is_file() and read_model(onnx).sha256 != manifest.onnx_sha256:
        raise _outdated(manifest, engine, f"{onnx} has changed since {engine.name} was built from it")


def check_machine(manifest: EngineManifest, engine: Path, here: Machine) -> None:
    """Raise ModelError if the engine was built for another GPU or TensorRT and is not compatible with this one."""
    built, settings = manifest.machine, manifest.settings
    old, new = _numbers(built.tensorrt), _numbers(here.tensorrt)
    if settings.gpus:
        gpu_fits = f"sm{here.compute_capability.replace('.', '')}" in settings.gpus
    elif settings.hardware_compatible == "ampere":
        gpu_fits = _numbers(here.compute_capability) >= (8, 0)
    elif settings.hardware_compatible == "same":
        gpu_fits = here.compute_capability == built.compute_capability
    else:
        gpu_fits = (here.gpu, here.compute_capability) == (built.gpu, built.compute_capability)
    # Version-compatible engines run with later versions, and those of TensorRT 10 also with 11 (NVIDIA's rule).
    later = settings.version_compatible and bool(old) and old <= new and new[0] - old[0] <= 1
    if not gpu_fits or not (later or here.tensorrt == built.tensorrt):
        first, second = (
            f"{one.gpu} ({one.compute_capability}) and {settings.compiler} {one.tensorrt}" for one in (built, here)
        )
        raise _outdated(manifest, engine, f"{engine} was built for {first}; this machine has {second}")


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers of `10.13.0.35`; an untrusted manifest may contain any text."""
    return tuple(map(int, re.findall(r"\d{1,9}", version)))


def _outdated(manifest: EngineManifest, engine: Path, problem: str) -> ModelError:
    return ModelError(problem, f"Build it again: {manifest.settings.command(onnx_of(manifest, engine), engine)}")
