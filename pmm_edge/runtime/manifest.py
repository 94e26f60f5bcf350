"""TensorRT engines: how to build one, and the manifest next to it that says what it is and where it runs."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pmm_edge.errors import ModelError, PmmError
from pmm_edge.files import decode_json, encode_json, sha256
from pmm_edge.spec import ModelSpec

_LARGEST_FILE = 1 << 20
"""In bytes; manifests and certificates are a few kB."""
_AMPERE = (8, 0)


@dataclass(frozen=True)
class BatchProfile:
    """The batch sizes that an engine accepts, and the one that it is optimized for."""

    minimum: int = 1
    optimal: int = 16
    maximum: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimal <= self.maximum:
            raise PmmError(
                f"invalid batch profile {self}",
                "Give minimum,optimal,maximum with 1 <= minimum <= optimal <= maximum, for example 1,16,64",
            )

    @staticmethod
    def parse(text: str) -> BatchProfile:
        """Parse `1,16,64`."""
        parts = text.split(",")
        if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
            raise PmmError(f"invalid batch profile '{text}'", "Give minimum,optimal,maximum, for example 1,16,64")
        return BatchProfile(*map(int, parts))

    @staticmethod
    def chosen(given: BatchProfile | str | None, static_batch: int | None) -> BatchProfile:
        """Return the given profile, or that of a graph with a static batch."""
        profile = BatchProfile.parse(given) if isinstance(given, str) else given
        if static_batch is None:
            return profile or BatchProfile()
        only = BatchProfile(static_batch, static_batch, static_batch)
        if profile not in (None, only):
            raise PmmError(
                f"batch profile {profile} contradicts the static batch {static_batch} of the graph",
                f"Omit --batch-profile, or give {only}",
            )
        return only

    def __str__(self) -> str:
        return f"{self.minimum},{self.optimal},{self.maximum}"


@dataclass(frozen=True)
class BuildSettings:
    """How an engine is built from an ONNX file."""

    batch: BatchProfile = BatchProfile()
    workspace_gib: float | None = None
    """Limit of the scratch memory of a layer; None for all memory of the GPU."""
    optimization_level: int = 3
    """0 builds fastest, 5 searches longest; 3 is the default of TensorRT."""
    hardware_compatible: bool = False
    """Run on every GPU from Ampere on, slower. Not supported on Jetson."""
    version_compatible: bool = False
    """Run with later versions of TensorRT, slower."""
    timing_cache: bool = True
    """Reuse layer timings in the next build with the same GPU and TensorRT."""

    def __post_init__(self) -> None:
        if self.workspace_gib is not None and not 0 < self.workspace_gib <= 1 << 20:  # also refuses NaN
            raise PmmError(f"invalid workspace of {self.workspace_gib:g} GiB", "Give at most the GPU memory")
        if not 0 <= self.optimization_level <= 5:
            raise PmmError(f"invalid optimization level {self.optimization_level}", "Give 0 to 5")

    def command(self, onnx: Path, engine: Path | None = None, also: Sequence[str] = ()) -> str:
        """Return the `pmm` command that builds `engine`, by default next to `onnx`, with further arguments `also`."""
        words = ["pmm", "export", str(onnx), "--trt", "--batch-profile", str(self.batch)]
        if engine and engine != onnx.with_suffix(".engine"):
            words += ["--out", str(engine)]
        if self.workspace_gib is not None:
            words += ["--workspace", f"{self.workspace_gib:g}"]
        if self.optimization_level != BuildSettings.optimization_level:
            words += ["--optimization-level", str(self.optimization_level)]
        words += ["--hardware-compatible"] * self.hardware_compatible
        words += ["--version-compatible"] * self.version_compatible
        words += ["--no-timing-cache"] * (not self.timing_cache)
        return shlex.join([*words, *also])


@dataclass(frozen=True)
class Machine:
    """What an engine depends on; `driver` is the newest CUDA that it supports, and its version if known."""

    gpu: str
    compute_capability: str
    tensorrt: str
    cuda: str
    driver: str


@dataclass(frozen=True)
class PrecisionCount:
    """Number of layers per data type (`FP32`, `FP16`, `INT8`, ..., `unknown`), as the engine reports it.

    `layers` are all that compute, without copies; `products` are convolutions and matrix products only.
    """

    layers: dict[str, int]
    products: dict[str, int]


@dataclass(frozen=True)
class EngineManifest:
    """Everything known about an engine."""

    spec: ModelSpec
    onnx: str
    """Path of the ONNX file relative to the folder of the engine. It is only named and hashed."""
    onnx_sha256: str
    engine_sha256: str
    engine_size: int
    """In bytes."""
    machine: Machine
    settings: BuildSettings
    precision: PrecisionCount
    build_seconds: float
    schema: Literal[1] = 1

    def __post_init__(self) -> None:
        if not Path(self.onnx).name or Path(self.onnx).is_absolute() or "\0" in self.onnx:
            raise ValueError(f"{self.onnx!r} is not a relative path of a file")

    def to_json(self) -> str:
        return encode_json(self)


def relative_onnx(engine: Path, onnx: Path) -> str:
    """Return the path of an ONNX file as a manifest stores it: both files can be moved or mounted together."""
    return Path(os.path.relpath(onnx.parent.resolve() / onnx.name, engine.parent.resolve())).as_posix()


def onnx_of(manifest: EngineManifest, engine: Path) -> Path:
    """Return where the ONNX file of an engine is, if it still exists."""
    if "/" not in manifest.onnx:
        return engine.with_name(manifest.onnx)  # shown as the user wrote the path
    # Resolve first: `..` of a symbolic link to a folder is not the folder of the link.
    return Path(os.path.normpath(engine.parent.resolve() / manifest.onnx))


def manifest_path(engine: Path) -> Path:
    """Return `model.manifest.json` for `model.engine`."""
    return engine.with_suffix(".manifest.json")


def read_untrusted(path: Path) -> bytes:
    """Read a small file that may come from anyone; raise OSError if it is large."""
    if path.stat().st_size > _LARGEST_FILE:
        raise OSError(f"it is larger than {_LARGEST_FILE} bytes")
    return path.read_bytes()


def read_manifest(engine: Path) -> EngineManifest:
    """Read the manifest of an engine; raise ModelError if either is missing or the manifest is invalid."""
    command = BuildSettings().command(engine.with_suffix(".onnx"))
    if not engine.is_file():
        raise ModelError(f"{engine} does not exist", f"Build it here: {command}")
    path, rebuild = manifest_path(engine), f"Build it again: {command}"
    try:
        return decode_json(EngineManifest, read_untrusted(path), str(path), ModelError, rebuild)
    except FileNotFoundError as error:
        raise ModelError(f"{engine} has no manifest {path.name} next to it", rebuild) from error
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error}", rebuild) from error
    except PmmError as error:  # BatchProfile and BuildSettings do not know the file
        text = error.problem if isinstance(error, ModelError) else f"{path} is not valid: {error.problem}"
        raise ModelError(text, rebuild) from error


def check_files(manifest: EngineManifest, engine: Path) -> None:
    """Raise ModelError if the engine, or its ONNX file if that still exists, is not the one in the manifest."""
    if engine.stat().st_size != manifest.engine_size or sha256(engine) != manifest.engine_sha256:
        raise _outdated(manifest, engine, f"{engine} is not the engine that {manifest_path(engine).name} describes")
    onnx = onnx_of(manifest, engine)
    if onnx.is_file() and sha256(onnx) != manifest.onnx_sha256:
        raise _outdated(manifest, engine, f"{onnx} has changed since {engine.name} was built from it")


def check_machine(manifest: EngineManifest, engine: Path, here: Machine) -> None:
    """Raise ModelError if the engine was built for another GPU or TensorRT and is not compatible with this one."""
    built, settings = manifest.machine, manifest.settings
    if settings.hardware_compatible:
        gpu_fits = _numbers(here.compute_capability) >= _AMPERE
    else:
        gpu_fits = (here.gpu, here.compute_capability) == (built.gpu, built.compute_capability)
    if not gpu_fits:
        first, second = (f"{machine.gpu} ({machine.compute_capability})" for machine in (built, here))
        raise _outdated(manifest, engine, f"{engine} was built for {first}, this GPU is {second}")
    old, new = _numbers(built.tensorrt), _numbers(here.tensorrt)
    # Version-compatible engines run with later versions, and those of TensorRT 10 also with 11 (NVIDIA's rule).
    later = settings.version_compatible and bool(old) and old <= new and new[0] - old[0] <= 1
    if not later and here.tensorrt != built.tensorrt:
        problem = f"{engine} was built with TensorRT {built.tensorrt}, this is TensorRT {here.tensorrt}"
        raise _outdated(manifest, engine, problem)


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers of `10.13.0.35`; an untrusted manifest may contain any text."""
    return tuple(int(part) for part in version.split(".") if part.isdecimal() and len(part) < 10)


def _outdated(manifest: EngineManifest, engine: Path, problem: str) -> ModelError:
    return ModelError(problem, f"Build it again: {manifest.settings.command(onnx_of(manifest, engine), engine)}")
