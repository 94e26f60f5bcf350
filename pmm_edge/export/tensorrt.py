"""From an ONNX file of ours to a TensorRT engine, whatever the graph's precision. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmm_edge.console import Report, silent
from pmm_edge.errors import CheckFailedError, ModelError, OutputError, PmmError
from pmm_edge.files import cache_folder, sha256, written_whole
from pmm_edge.runtime.cuda import Cuda, NotOnThisMachineError
from pmm_edge.runtime.embedder import INPUT
from pmm_edge.runtime.manifest import BuildSettings, EngineManifest, PrecisionCount, manifest_path, onnx_seen_from
from pmm_edge.runtime.onnx_backend import OnnxEmbedder
from pmm_edge.runtime.tensorrt_backend import error_logger, import_tensorrt, last_error, load_engine, this_machine
from pmm_edge.spec import ModelSpec

__all__ = ["BuiltEngine", "build_engine"]


_DIGEST = hashlib.sha256().digest_size


def cache_file(tensorrt: str, gpu: str) -> Path | None:
    """Where the timings of this TensorRT on this GPU are kept: they hold for no other. None without a cache folder."""
    key = re.sub(r"[^A-Za-z0-9.]+", "-", f"{tensorrt} {gpu}").strip("-")
    try:
        return cache_folder() / "tensorrt" / f"{key}.timing"
    except OutputError:  # as of one that cannot be written: it costs time
        return None


def attach(config: Any, file: Path) -> None:
    """Have a build use the kept timings and add to them; what cannot be used is as if it were not there."""
    cache = config.create_timing_cache(_kept(file))
    if cache is None or not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def keep(config: Any, file: Path) -> None:
    """Write the timings of a build, whole. The engine is what counts: a folder that takes no cache is no error."""
    timings = bytes(config.get_timing_cache().serialize())
    with suppress(OutputError), written_whole(file) as temporary:
        temporary.write_bytes(hashlib.sha256(timings).digest() + timings)


def _kept(file: Path) -> bytes:
    """Kept timings; nothing where there are none or the disk garbled them, which TensorRT need not notice."""
    try:
        content = file.read_bytes()
    except OSError:
        return b""
    digest, timings = content[:_DIGEST], content[_DIGEST:]
    return timings if hashlib.sha256(timings).digest() == digest else b""


UNKNOWN = "unknown"

_NARROWEST_FIRST = ("FP4", "INT4", "FP8", "INT8", "FP16", "BF16", "FP32")
_ALIASES = {"HALF": "FP16", "BFLOAT16": "BF16", "FLOAT": "FP32", "TF32": "FP32"}
_TYPE = re.compile(rf"\b({'|'.join((*_NARROWEST_FIRST, *_ALIASES))})\b", re.IGNORECASE)

_TACTICS = {"i8": "INT8", "int8": "INT8", "f16": "FP16", "h": "FP16", "bf16": "BF16", "tf32": "FP32", "f32": "FP32"}
_TACTIC = re.compile(r"(?:^|_)(i8|int8|f16|bf16|tf32|f32|h(?=\d+gemm))", re.IGNORECASE)

_MOVES = {"Reformat", "NoOp", "Shuffle", "Constant", "Identity", "Cast", "Quantize", "Dequantize", "Slice"}
"""Kinds of layer that compute nothing."""
_PRODUCT = re.compile(r"conv(?!ert)|gemm|matmul|matrixmultiply|fullyconnected", re.IGNORECASE)
_GENERATED = "__myl_"
"""Begins the names of kernels that TensorRT generates, which say what they compute; other names are the graph's."""

Layer = Mapping[str, Any]


def count_precision(trt: Any, engine: Any, shape: tuple[int, ...]) -> PrecisionCount:
    """Ask an engine, at one shape of its input, how many of its layers run in which type."""
    inspector = engine.create_engine_inspector()
    context = engine.create_execution_context()
    if context is not None and context.set_input_shape(INPUT, shape):
        inspector.execution_context = context  # with a shape set, types of dynamic tensors are told
    information = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return count_layers(json.loads(information).get("Layers", []))


def count_layers(layers: Iterable[Layer | str]) -> PrecisionCount:
    """Count the inspector's layers by type."""
    # A layer of an engine that tells no details is its name alone.
    described: list[Layer] = [{"Name": layer} if isinstance(layer, str) else layer for layer in layers]
    computing = [layer for layer in described if layer.get("LayerType") not in _MOVES]
    return PrecisionCount(
        layers=_counted(computing), products=_counted(layer for layer in computing if _is_product(layer))
    )


def layer_type(layer: Layer) -> str:
    """The type that one layer of the inspector's runs in."""
    weights = layer.get("Weights")
    told = (
        [weights.get("Type")] if isinstance(weights, Mapping) else [],
        [_told_type(tensor) for tensor in layer.get("Inputs", [])],
        [_told_type(tensor) for tensor in layer.get("Outputs", [])],
    )
    for descriptions in told:
        found = {
            _ALIASES.get(name.upper(), name.upper()) for text in descriptions for name in _TYPE.findall(text or "")
        }
        if found:
            return min(found, key=_NARROWEST_FIRST.index)
    tactic = _TACTIC.search(layer.get("TacticName") or "")
    return _TACTICS[tactic.group(1).lower()] if tactic else UNKNOWN


def _told_type(tensor: Layer) -> str | None:
    fields = {name.lower(): value for name, value in tensor.items()}
    return fields.get("datatype") or fields.get("format/datatype")


def _is_product(layer: Layer) -> bool:
    told = [layer.get(field) or "" for field in ("LayerType", "ParameterType", "TacticName")]
    name = layer.get("Name") or ""
    if name.startswith(_GENERATED):
        told.append(name)
    return "Weights" in layer or bool(_PRODUCT.search(" ".join(told)))


def _counted(layers: Iterable[Layer]) -> dict[str, int]:
    return dict(Counter(layer_type(layer) for layer in layers).most_common())


def parsed_network(trt: Any, builder: Any, logger: Any, onnx_path: Path) -> Any:
    """Parse an ONNX file into a strongly typed network.

    Raises:
        ModelError: TensorRT does not know what is in it.
    """
    # TensorRT 11 knows no other kind of network and ignores the flag; 10 needs it.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        problems = [_described(parser.get_error(index)) for index in range(parser.num_errors)]
        raise ModelError(
            f"TensorRT {trt.__version__} cannot parse {onnx_path}: {'; '.join(problems) or last_error(logger)}",
            "A newer TensorRT may know the operator; pmm export writes none that 10.3 lacks",
        )
    return network


def _described(problem: Any) -> str:
    """One parser error: its node's name and operator, and what is wrong with it."""
    text = " ".join(problem.desc().split())
    where = f"{problem.node_operator()} {problem.node_name()}".strip()
    return f"node {where}: {text}" if where else text


_PERCENT = 100


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class BuildProgress:
    """The phases of a build under way, each outermost one reported in percent with the inner one as the detail.

    TensorRT nests phases: a step of one is done when the phases within it are.
    """

    def __init__(self, name: str, report: Report) -> None:
        self._name, self._report = name, report
        self._running: dict[str, _Phase] = {}

    def start(self, name: str, parent: str | None, steps: int) -> None:
        self._running[name] = _Phase(parent, steps)
        self._show(name)

    def step(self, name: str, number: int) -> None:
        self._running[name].done = number + 1
        self._show(name)

    def finish(self, name: str) -> None:
        """A phase may finish before all its steps are done."""
        if self._root_of(name) == name:
            self._report(f"{self._name}: {name}", _PERCENT, _PERCENT)
        del self._running[name]

    def _show(self, name: str) -> None:
        root = self._root_of(name)
        done = int(_PERCENT * self._fraction(root))
        self._report(f"{self._name}: {root}", done, _PERCENT, "" if root == name else name)

    def _root_of(self, name: str) -> str:
        parent = self._running[name].parent
        return self._root_of(parent) if parent in self._running else name

    def _fraction(self, name: str) -> float:
        """Of a phase, in 0..1, with the share of the step under way that its inner phases have done."""
        phase = self._running[name]
        inner = [self._fraction(other) for other, candidate in self._running.items() if candidate.parent == name]
        return min(1.0, (phase.done + max(inner, default=0.0)) / max(phase.steps, 1))


def progress_monitor(trt: Any, progress: BuildProgress) -> Any:
    """TensorRT's progress monitor that tells `progress`.

    An exception cannot pass through TensorRT: the one that comes up in a callback (Ctrl-C, most likely) cancels the
    build, and is raised by the monitor's `raise_caught`, to be called after it.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._lock = threading.Lock()  # TensorRT calls from several threads
            self._caught: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._tell(progress.start, phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(progress.step, phase_name, step)
            return self._caught is None

        def phase_finish(self, phase_name: str) -> None:
            self._tell(progress.finish, phase_name)

        def _tell(self, event: Callable[..., None], *arguments: object) -> None:
            try:
                with self._lock:
                    event(*arguments)
            except BaseException as error:
                self._caught = self._caught or error

        def raise_caught(self) -> None:
            if self._caught:
                raise self._caught

    return Monitor()


def commands_for_target(
    onnx: Path, out: Path, spec: ModelSpec, settings: BuildSettings, also: Sequence[str] = ()
) -> str:
    """Say what builds the engine on the target: with `pmm`, or with `trtexec`, which writes no manifest.

    Args:
        also: further words for `pmm`; see `BuildSettings.command`.
    """
    pmm = settings.command(Path(onnx.name), Path(out.name), also)  # folders of this machine mean nothing there
    return f"Copy it to the target and run there: {pmm}   (or: {trtexec_command(onnx, out, spec, settings)})"


def trtexec_command(onnx: Path, out: Path, spec: ModelSpec, settings: BuildSettings) -> str:
    """The `trtexec` line that builds the same engine from a copy of the ONNX file."""
    batch = settings.batch
    sizes = {"min": batch.minimum, "opt": batch.optimal, "max": batch.maximum}
    words = ["trtexec", f"--onnx={onnx.name}", f"--saveEngine={out.name}", "--stronglyTyped", "--noTF32"]
    words += [f"--{name}Shapes={INPUT}:{'x'.join(map(str, spec.input.shape(size)))}" for name, size in sizes.items()]
    words += [f"--builderOptimizationLevel={settings.optimization_level}", "--profilingVerbosity=detailed"]
    if settings.workspace_gib is not None:
        words.append(f"--memPoolSize=workspace:{settings.workspace_gib * 1024:g}")
    if settings.hardware_compatible:
        words.append("--hardwareCompatibilityLevel=ampere+")
    if settings.version_compatible:
        words.append("--versionCompatible")
    return shlex.join(words)


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
    if spec.quantization and spec.quantization.target == "cpu":
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
    cache = cache_file(trt.__version__, cuda.name) if settings.timing_cache else None
    if cache:
        attach(config, cache)
    plan = builder.build_serialized_network(network, config)
    monitor.raise_caught()
    if plan is None:
        raise ModelError(
            f"TensorRT {trt.__version__} cannot build {onnx_path}{last_error(logger)}",
            "If memory ran out: a smaller --batch or --workspace",
        )
    if cache:
        keep(config, cache)
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
    """Number of layers that the sensitivity search kept in floating point."""
    return len(spec.quantization.float_layers) if spec.quantization else 0
