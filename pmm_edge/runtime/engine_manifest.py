"""What lies beside every TensorRT engine: what it is, from what and on what it was built; checked before it loads.

An engine is a program for one GPU and one TensorRT. Loaded elsewhere it fails with a message from deep inside, or
runs and is wrong about which network it is. The manifest answers both before TensorRT sees the file.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from pmm_edge.errors import ModelError
from pmm_edge.files import sha256
from pmm_edge.runtime.build_settings import BuildSettings
from pmm_edge.runtime.strict import parse_object, strictly
from pmm_edge.spec import ModelSpec

SCHEMA = 1
_SUFFIX = ".manifest.json"
_AMPERE = (8, 0)


@dataclass(frozen=True)
class Machine:
    """What an engine depends on."""

    gpu: str
    compute_capability: str
    """`8.7`: major.minor."""
    tensorrt: str
    cuda: str
    """Of the CUDA runtime in use."""
    driver: str
    """The newest CUDA that the driver supports, and the driver's own version where the system tells it."""


@dataclass(frozen=True)
class PrecisionCount:
    """How many of an engine's layers run in which type (`FP32`, `FP16`, `INT8`, ..., `unknown`), as it says itself."""

    layers: dict[str, int]
    """All that compute: copies and changes of format are left out."""
    products: dict[str, int]
    """Convolutions and matrix products alone, where nearly all the time goes."""


@dataclass(frozen=True)
class EngineManifest:
    """All that is known of an engine."""

    spec: ModelSpec
    onnx: str
    """Path of the ONNX file that it was built from, seen from the engine's folder: `model.onnx`, `../fp16/model.onnx`.
    It is only ever named and hashed."""
    onnx_sha256: str
    engine_sha256: str
    engine_size: int
    """In bytes."""
    machine: Machine
    settings: BuildSettings
    precision: PrecisionCount
    build_seconds: float
    schema: int = SCHEMA

    def to_json(self) -> str:
        raw = asdict(self) | {"spec": json.loads(self.spec.to_json())}
        return json.dumps(raw, indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> EngineManifest:
        """Read what `to_json` wrote.

        Raises:
            ValueError: it is something else, or names no relative path of an ONNX file.
            PmmError: the spec or the settings in it are of another version or out of range.
        """
        content = parse_object(text)
        if (found := content.get("schema")) != SCHEMA:
            raise ValueError(f"schema {found if isinstance(found, int) else 'unknown'} instead of {SCHEMA}")
        manifest: EngineManifest = strictly(EngineManifest, content)
        if not Path(manifest.onnx).name or Path(manifest.onnx).is_absolute():
            raise ValueError(f"{manifest.onnx!r} is no relative path of a file")
        return manifest


def onnx_seen_from(engine: Path, onnx: Path) -> str:
    """How a manifest names the ONNX file: relative, so that both may be moved or mounted elsewhere together."""
    return Path(os.path.relpath(onnx.parent.resolve() / onnx.name, engine.parent.resolve())).as_posix()


def onnx_of(manifest: EngineManifest, engine: Path) -> Path:
    """Where the ONNX file of an engine lies, if it is still there."""
    if "/" not in manifest.onnx:
        return engine.with_name(manifest.onnx)
    # Of a folder behind a symbolic link `..` is another than the one that the name shows.
    return Path(os.path.normpath(engine.parent.resolve() / manifest.onnx))


def manifest_path(engine: Path) -> Path:
    """`model.manifest.json` for `model.engine`."""
    return engine.with_suffix(_SUFFIX)


def read_manifest(engine: Path) -> EngineManifest:
    """The manifest of an engine.

    Raises:
        ModelError: the engine or its manifest is missing, or the manifest cannot be read.
    """
    onnx = engine.with_suffix(".onnx")
    command = BuildSettings().command(onnx)
    if not engine.is_file():
        raise ModelError(f"{engine} does not exist", f"Build it here: {command}")
    rebuild = f"Build it again: {command}"
    path = manifest_path(engine)
    try:
        return EngineManifest.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{engine} has no {path.name} beside it: nothing says what it is", rebuild) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read ({type(error).__name__}: {error})", rebuild) from error


def check_files(manifest: EngineManifest, engine: Path) -> None:
    """Hold the engine, and the ONNX file where it is still there, against the manifest.

    Raises:
        ModelError: the engine is truncated or another, or the ONNX file has changed since.
    """
    size = engine.stat().st_size
    if size != manifest.engine_size:
        raise _rebuild(manifest, engine, f"{engine} has {size} bytes instead of {manifest.engine_size}: truncated?")
    if sha256(engine) != manifest.engine_sha256:
        raise _rebuild(manifest, engine, f"{engine} is not the engine that {manifest_path(engine).name} describes")
    onnx = onnx_of(manifest, engine)
    if onnx.is_file() and sha256(onnx) != manifest.onnx_sha256:
        raise _rebuild(manifest, engine, f"{onnx} has changed since {engine.name} was built from it")


def check_machine(manifest: EngineManifest, engine: Path, here: Machine) -> None:
    """Hold this machine against the one that the engine was built on.

    Raises:
        ModelError: another GPU or another TensorRT, and the engine was not built to be compatible.
    """
    built = manifest.machine
    if not _gpu_fits(manifest, here):
        raise _rebuild(
            manifest,
            engine,
            f"{engine} was built on {built.gpu} (compute capability {built.compute_capability}), this is"
            f" {here.gpu} ({here.compute_capability})",
        )
    if not _tensorrt_fits(manifest, here):
        raise _rebuild(
            manifest, engine, f"{engine} was built with TensorRT {built.tensorrt}, this is TensorRT {here.tensorrt}"
        )


def _gpu_fits(manifest: EngineManifest, here: Machine) -> bool:
    if manifest.settings.hardware_compatible:
        return _numbers(here.compute_capability) >= _AMPERE
    built = manifest.machine
    return (here.gpu, here.compute_capability) == (built.gpu, built.compute_capability)


def _tensorrt_fits(manifest: EngineManifest, here: Machine) -> bool:
    built = manifest.machine.tensorrt
    if not manifest.settings.version_compatible:
        return here.tensorrt == built
    # NVIDIA's rule: version-compatible engines run with later versions, and those of 10 with 11 as well.
    (old, new) = (_numbers(built), _numbers(here.tensorrt))
    return bool(old) and old <= new and new[0] - old[0] <= 1


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers of `10.13.0.35`; none of a text that is no version, as a stranger's manifest may hold."""
    return tuple(int(part) for part in version.split(".") if part.isdecimal() and len(part) < 10)


def _rebuild(manifest: EngineManifest, engine: Path, problem: str) -> ModelError:
    return ModelError(problem, f"Build it again: {manifest.settings.command(onnx_of(manifest, engine), engine)}")
