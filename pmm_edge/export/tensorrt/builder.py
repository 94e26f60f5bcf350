"""Build an engine: one way for TensorRT 10.3 to 11, checked before it gets its name."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmm_edge.errors import CheckFailedError, ModelError, PmmError
from pmm_edge.export.options import KEPT_IN_FLOAT
from pmm_edge.export.tensorrt import timing
from pmm_edge.export.tensorrt.elsewhere import commands_for_target
from pmm_edge.export.tensorrt.inspection import count_precision
from pmm_edge.export.tensorrt.network import parsed_network
from pmm_edge.export.tensorrt.progress import BuildProgress, progress_monitor
from pmm_edge.files import sha256, written_whole
from pmm_edge.progress import Report, silent
from pmm_edge.runtime.build_settings import BuildSettings
from pmm_edge.runtime.cuda import Cuda, NotOnThisMachineError
from pmm_edge.runtime.embedder import INPUT
from pmm_edge.runtime.engine_manifest import EngineManifest, PrecisionCount, manifest_path, onnx_seen_from
from pmm_edge.runtime.onnx_backend import OnnxEmbedder
from pmm_edge.runtime.tensorrt_library import error_logger, import_tensorrt, last_error, load_engine, this_machine
from pmm_edge.spec import ModelSpec

_GIB = 1 << 30
_TYPES = {"fp16": "FP16", "int8": "INT8"}
"""The type that most products of an engine have where its graph has this precision."""


@dataclass(frozen=True)
class BuiltEngine:
    """What a build wrote."""

    path: Path
    manifest: EngineManifest


def build_engine(
    onnx_path: Path,
    out: Path,
    settings: BuildSettings = BuildSettings(),
    report: Report = silent,
    also: Sequence[str] = (),
) -> BuiltEngine:
    """Build a TensorRT engine for this machine's GPU, with its manifest beside it.

    The network is strongly typed: every layer runs in the type that the graph gives it, so precision is decided by
    the ONNX file alone. TF32 is off, for it is not FP32.

    Args:
        onnx_path: of `pmm export`, with the spec in its metadata.
        out: a file that ends in `.engine`.
        also: further words of the command that is told where the engine cannot be built here, such as
            `--triton models`.

    Raises:
        ModelError: the ONNX file is missing, not ours or quantised for CPUs, or TensorRT cannot parse or build it.
        PmmError: the graph has a static batch, and the profile is another.
        NotOnThisMachineError: TensorRT, cuda-python, the driver or the GPU is missing; says what to run elsewhere.
        GpuError: the GPU refuses.
        CheckFailedError: the graph is FP16 or INT8, and most of the engine's products do not run in it. Nothing is
            written then.
        OutputError: `out` cannot be written.
    """
    if out.suffix != ".engine":
        raise PmmError(f"{out} does not end in .engine", f"Name it {out.with_suffix('.engine')}: loading goes by it")
    exported = OnnxEmbedder(onnx_path, "cpu")
    spec, only = exported.spec, exported.profile
    check_quantised_for_tensorrt(spec, onnx_path)
    if only and settings.batch != only:
        raise PmmError(
            f"{onnx_path} has a fixed batch of {only.maximum}, the batch profile is {settings.batch}",
            f"Build it with --batch {only}",
        )
    trt, cuda = what_builds(onnx_path, out, spec, settings, also)
    try:
        return _build(trt, cuda, onnx_path, out, spec, settings, report)
    finally:
        cuda.release()


def what_builds(
    onnx_path: Path, out: Path, spec: ModelSpec, settings: BuildSettings, also: Sequence[str] = ()
) -> tuple[Any, Cuda]:
    """TensorRT and this machine's GPU, which the caller releases.

    Raises:
        NotOnThisMachineError: one of them is missing; says what to run elsewhere.
    """
    try:
        return import_tensorrt(), Cuda()
    except NotOnThisMachineError as error:
        raise NotOnThisMachineError(
            f"{onnx_path} is ready, its engine cannot be built here: {error}",
            commands_for_target(onnx_path, out, spec, settings, also),
        ) from error


def check_quantised_for_tensorrt(spec: ModelSpec, onnx_path: Path) -> None:
    """Refuse what TensorRT does not parse, whoever calls it: we, DeepStream or Triton.

    Raises:
        ModelError: the graph is INT8 for CPUs.
    """
    if spec.target == "cpu":
        raise ModelError(
            f"{onnx_path} is INT8 for CPUs: its zero points are not 0, which TensorRT refuses",
            "Export it with --target tensorrt",
        )


def _build(
    trt: Any, cuda: Cuda, onnx_path: Path, out: Path, spec: ModelSpec, settings: BuildSettings, report: Report
) -> BuiltEngine:
    logger, started = error_logger(trt), time.perf_counter()
    onnx_sha256 = sha256(onnx_path)
    plan = _serialized(trt, cuda, logger, onnx_path, out.name, spec, settings, report)
    seconds = time.perf_counter() - started
    engine = load_engine(trt, logger, plan, out, settings.version_compatible)
    precision = count_precision(trt, engine, spec.input.shape(settings.batch.optimal))
    _check_precision(spec, precision, out)
    manifest = EngineManifest(
        spec=spec,
        onnx=onnx_seen_from(out, onnx_path),
        onnx_sha256=onnx_sha256,
        engine_sha256=hashlib.sha256(plan).hexdigest(),
        engine_size=plan.nbytes,
        machine=this_machine(trt, cuda),
        settings=settings,
        precision=precision,
        build_seconds=round(seconds, 1),
    )
    # Both are whole before either is renamed; killed between the two, their SHA-256 differ, and loading says so.
    with written_whole(out) as engine_file, written_whole(manifest_path(out)) as manifest_file:
        engine_file.write_bytes(plan)
        manifest_file.write_text(manifest.to_json(), encoding="utf-8")
    return BuiltEngine(out, manifest)


def _serialized(
    trt: Any,
    cuda: Cuda,
    logger: Any,
    onnx_path: Path,
    name: str,
    spec: ModelSpec,
    settings: BuildSettings,
    report: Report,
) -> Any:
    """The engine as TensorRT's buffer."""
    builder = trt.Builder(logger)
    network = parsed_network(trt, builder, logger, onnx_path)
    config = _config(trt, builder, spec, settings)
    monitor = progress_monitor(trt, BuildProgress(name, report))
    config.progress_monitor = monitor
    cache = timing.cache_file(trt.__version__, cuda.name) if settings.timing_cache else None
    if cache:
        timing.attach(config, cache)
    plan = builder.build_serialized_network(network, config)
    monitor.raise_caught()
    if plan is None:
        raise ModelError(
            f"TensorRT {trt.__version__} cannot build {onnx_path}{last_error(logger)}",
            "If memory ran out: a smaller --batch or --workspace",
        )
    if cache:
        timing.keep(config, cache)
    return plan


def _config(trt: Any, builder: Any, spec: ModelSpec, settings: BuildSettings) -> Any:
    config = builder.create_builder_config()
    config.builder_optimization_level = settings.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # without it the inspector names layers, not types
    config.clear_flag(trt.BuilderFlag.TF32)
    if settings.workspace_gib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(settings.workspace_gib * _GIB))
    if settings.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    batch, shape = settings.batch, spec.input.shape
    profile = builder.create_optimization_profile()
    profile.set_shape(INPUT, shape(batch.minimum), shape(batch.optimal), shape(batch.maximum))
    config.add_optimization_profile(profile)
    return config


def _check_precision(spec: ModelSpec, found: PrecisionCount, out: Path) -> None:
    wanted = _TYPES.get(spec.precision)
    if wanted is None:
        return
    # Copies into a type and back would look like it: where there are products, they must run in it.
    counted = found.products or found.layers
    kept = _kept_in_float(spec)
    number, meant = counted.get(wanted, 0), max(sum(counted.values()) - kept, 1)
    if 2 * number <= meant:
        told = ", ".join(f"{number} {kind}" for kind, number in counted.items()) or "none"
        raise CheckFailedError(
            f"{out} was not written: its graph is {wanted}, but {number} of the engine's {sum(counted.values())}"
            f" {'products' if found.products else 'layers'} run in it ({told}; the graph keeps {kept} in float)",
            "Another version of TensorRT may build it rightly",
        )


def _kept_in_float(spec: ModelSpec) -> int:
    """How many layers of an INT8 graph its sensitivity search left as they were."""
    _, _, told = spec.precision_method.partition(KEPT_IN_FLOAT)
    names = told.partition(";")[0]
    return 0 if names in ("", "none") else len(names.split(", "))
