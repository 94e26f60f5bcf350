"""What a user chooses for a TensorRT engine, and the command that makes the same engine again."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from pmm_edge.errors import ModelError, PmmError
from pmm_edge.files import sha256
from pmm_edge.spec import ModelSpec

OPTIMIZATION_LEVELS = range(6)
MOST_GIB = 1 << 20
"""More memory than any machine has; infinity and what no number of bytes can say lie above."""


@dataclass(frozen=True)
class BatchProfile:
    """The batch sizes that an engine takes, and the one that it is tuned for.

    Raises:
        PmmError: not 1 <= minimum <= optimal <= maximum.
    """

    minimum: int = 1
    optimal: int = 16
    maximum: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimal <= self.maximum:
            raise PmmError(
                f"batch profile {self} is out of order",
                "Give minimum,optimal,maximum with 1 <= minimum <= optimal <= maximum, like 1,16,64",
            )

    @staticmethod
    def parse(text: str) -> BatchProfile:
        """Read `1,16,64`.

        Raises:
            PmmError: not three whole numbers in order.
        """
        parts = text.split(",")
        if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
            raise PmmError(
                f"batch profile '{text}' is not three whole numbers", "Give minimum,optimal,maximum, like 1,16,64"
            )
        return BatchProfile(*map(int, parts))

    @staticmethod
    def chosen(text: str | None, static_batch: int | None) -> BatchProfile:
        """The profile that was asked for; of a graph with one batch size that size alone.

        Args:
            text: such as `1,16,64`; None where none was given.
            static_batch: the only batch size that the graph takes; None for any.

        Raises:
            PmmError: `text` is not three whole numbers in order, or contradicts the batch of the graph.
        """
        asked = BatchProfile() if text is None else BatchProfile.parse(text)
        if static_batch is None:
            return asked
        only = BatchProfile(static_batch, static_batch, static_batch)
        if text is not None and asked != only:
            raise PmmError(
                f"--batch {asked} contradicts the graph's static batch of {static_batch}",
                f"Leave it out, or give --batch {only}",
            )
        return only

    def __str__(self) -> str:
        return f"{self.minimum},{self.optimal},{self.maximum}"


@dataclass(frozen=True)
class BuildSettings:
    """How an engine is built from an ONNX file.

    Raises:
        PmmError: a value outside of its range.
    """

    batch: BatchProfile = BatchProfile()
    workspace_gib: float | None = None
    """Limit of the scratch memory that a layer may use; None leaves it to TensorRT: all that the GPU has."""
    optimization_level: int = 3
    """0 builds fastest, 5 searches longest; 3 is TensorRT's default."""
    hardware_compatible: bool = False
    """Runs on every GPU from Ampere on, at some loss of speed. Not for Jetson boards."""
    version_compatible: bool = False
    """Runs with later versions of TensorRT as well, at some loss of speed."""
    timing_cache: bool = True
    """Keep the timings of layers for the next build on the same GPU and TensorRT."""

    def __post_init__(self) -> None:
        if self.workspace_gib is not None and not 0 < self.workspace_gib <= MOST_GIB:  # NaN is neither
            raise PmmError(
                f"a workspace of {self.workspace_gib:g} GiB cannot be had",
                "Give more than 0 and no more than the GPU has, or leave it out",
            )
        if self.optimization_level not in OPTIMIZATION_LEVELS:
            raise PmmError(f"optimization level {self.optimization_level} does not exist", "Give 0 to 5")

    def command(self, onnx: Path, engine: Path | None = None, also: Sequence[str] = ()) -> str:
        """The `pmm` command that builds `onnx` with these settings.

        Args:
            onnx: the file.
            engine: what it writes; None for the default place, beside `onnx`.
            also: further words, such as `--triton models`.
        """
        words = ["pmm", "export", str(onnx), "--trt", "--batch", str(self.batch)]
        if engine and engine != onnx.with_suffix(".engine"):
            words += ["--out", str(engine)]
        if self.workspace_gib is not None:
            words += ["--workspace", f"{self.workspace_gib:g}"]
        if self.optimization_level != BuildSettings.optimization_level:
            words += ["--optimization-level", str(self.optimization_level)]
        if self.hardware_compatible:
            words.append("--hardware-compatible")
        if self.version_compatible:
            words.append("--version-compatible")
        if not self.timing_cache:
            words.append("--no-timing-cache")
        return shlex.join([*words, *also])


def parse_object(text: str) -> dict[str, Any]:
    """A JSON object without repeated names, NaN, infinity, or text that a terminal would obey.

    Raises:
        ValueError: it is something else.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name stands twice in it")
        for word in (*found, *found.values()):
            _check_text(word)
        return found

    def no_number(name: str) -> Any:
        raise ValueError(f"{name} is no figure")

    try:
        content = json.loads(text, object_pairs_hook=once, parse_constant=no_number)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    return content


def strictly(kind: Any, value: Any, where: str = "it") -> Any:
    """Build `kind` from plain JSON values.

    Args:
        kind: a dataclass, ModelSpec, str, int, float, bool, `list[T]`, `dict[str, T]`, or `T | None` of one of them.
        value: what JSON gave.
        where: what to call the value in messages.

    Raises:
        ValueError: an entry is missing, unknown, of another type, or not finite.
        ModelError: the spec in it cannot be read.
    """
    if kind is ModelSpec:
        return ModelSpec.from_json(json.dumps(value))
    if is_dataclass(kind):
        return _dataclass(kind, value, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else strictly(inner, value, where)
    if origin is list and isinstance(value, list):
        for entry in value:
            _check_text(entry)
        return [strictly(arguments[0], entry, where) for entry in value]
    if origin is dict and isinstance(value, dict):
        return {name: strictly(arguments[1], entry, f"{where}.{name}") for name, entry in value.items()}
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind in (str, int, bool) and type(value) is kind:
        return value
    raise ValueError(f"{where} is not what it must be")


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not what it must be")
    hints, names = get_type_hints(kind), {field.name for field in fields(kind)}
    if missing := names - value.keys():
        raise ValueError(f"{where} lacks {', '.join(sorted(missing))}")
    if unknown := value.keys() - names:
        raise ValueError(f"{where} has unknown entries: {', '.join(map(ascii, sorted(unknown)[:5]))}")
    return kind(**{name: strictly(hints[name], value[name], name) for name in names})


def _check_text(value: Any) -> None:
    if isinstance(value, str) and not value.isprintable():
        raise ValueError("it holds characters that a terminal would obey")


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
