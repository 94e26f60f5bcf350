"""Build TensorRT engines from ONNX files, in whatever precision the graph has. Does not need torch."""

import hashlib
import json
import re
import shlex
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmm_edge.console import Report, silent
from pmm_edge.errors import CheckFailedError, ModelError, OutputError
from pmm_edge.files import cache_folder, written_whole
from pmm_edge.runtime.certificate import open_model
from pmm_edge.runtime.cuda import Cuda, NotOnThisMachineError
from pmm_edge.runtime.embedder import INPUT
from pmm_edge.runtime.manifest import (
    BuildSettings,
    EngineManifest,
    Machine,
    PrecisionCount,
    manifest_path,
    relative_onnx,
)
from pmm_edge.runtime.model_file import ModelFile
from pmm_edge.runtime.onnx_backend import OnnxEmbedder
from pmm_edge.runtime.tensorrt_backend import (
    error_logger,
    import_rtx,
    import_tensorrt,
    last_error,
    load_engine,
    this_machine,
)
from pmm_edge.spec import ModelSpec


@dataclass(frozen=True)
class BuiltEngine:
    """An engine and its manifest."""

    path: Path
    manifest: EngineManifest
    trtexec: str
    """The command that builds such an engine with NVIDIA's `trtexec` and times it; empty for TensorRT for RTX."""


def build_engine(
    onnx_path: Path,
    out: Path,
    settings: BuildSettings = BuildSettings(),
    report: Report = silent,
    also: Sequence[str] = (),
) -> BuiltEngine:
    """Build an engine from a file of `pmm export`, and its manifest: for the GPU of this machine, or for RTX GPUs.

    With `settings.gpus`, TensorRT for RTX builds a portable engine for these; it needs neither a GPU nor a driver, and
    the precision of layers is not read back.

    The network is strongly typed: every layer runs in the type that the graph gives it, so that the ONNX file alone
    decides the precision. TF32 is off. `also` are further arguments of the command for another machine.

    Raises ModelError if TensorRT cannot parse or build the file, NotOnThisMachineError, whose remedy is the command to
    run elsewhere, if a GPU, driver or package is missing, GpuError if the GPU failed, CheckFailedError if the graph is
    FP16 or INT8 but most of the engine is not. Then nothing is written.
    """
    file = open_model(onnx_path)
    graph = OnnxEmbedder(file, "cpu")
    spec = graph.spec
    try:
        if settings.gpus:
            trt, machine = import_rtx(), Machine("RTX", ",".join(settings.gpus), import_rtx().__version__, "")
        else:
            trt, cuda = import_tensorrt(), Cuda()  # its GPU stays the current one of this thread
            machine = this_machine(trt, cuda)
            cuda.release()
    except NotOnThisMachineError as error:
        if settings.gpus:  # what is missing can be installed here
            remedy = f"Then run: {settings.command(onnx_path, out, also)}"
        else:  # folders of this machine do not exist on the target
            command = settings.command(Path(onnx_path.name), Path(out.name), also)
            remedy = f"Copy it to the target and run: {command}"
        problem = f"{onnx_path} is ready, but its engine cannot be built here: {error}"
        raise NotOnThisMachineError(problem, remedy) from error
    logger, started, cache = error_logger(trt), time.perf_counter(), None
    if settings.timing_cache and not settings.gpus:  # TensorRT for RTX measures nothing when it builds
        key = re.sub(r"[^A-Za-z0-9.]+", "-", f"{machine.tensorrt} {machine.gpu}").strip("-")
        with suppress(OutputError):  # without a cache folder, the build only takes longer
            cache = cache_folder() / "tensorrt" / f"{key}.timing"
    plan = compile_network(trt, logger, file, out.name, spec, settings, report, cache)
    seconds = time.perf_counter() - started
    precision = PrecisionCount({}, {}) if settings.gpus else read_precision(trt, logger, plan, out, spec, settings)
    manifest = EngineManifest(
        spec=spec,
        onnx=relative_onnx(out, onnx_path),
        onnx_sha256=file.sha256,
        engine_sha256=hashlib.sha256(plan).hexdigest(),
        engine_size=plan.nbytes,
        machine=machine,
        settings=settings,
        precision=precision,
        build_seconds=round(seconds, 1),
    )
    # If the process is killed between the two renames, the hashes differ and loading fails.
    with written_whole(out) as engine_file, written_whole(manifest_path(out)) as manifest_file:
        engine_file.write_bytes(plan)
        manifest_file.write_text(manifest.to_json(), encoding="utf-8")
    trtexec = "" if settings.gpus else trtexec_command(graph, settings, trt.__version__)
    return BuiltEngine(out, manifest, trtexec)


def trtexec_command(graph: OnnxEmbedder, settings: BuildSettings, version: str) -> str:
    """Return the command that builds the engine of a graph with the `trtexec` of a TensorRT version and times it."""
    words, batch = ["trtexec", f"--onnx={graph.path}"], settings.batch
    if not graph.profile:  # trtexec refuses shapes for a static graph
        for name, size in (("min", batch.minimum), ("opt", batch.optimal), ("max", batch.maximum)):
            words.append(f"--{name}Shapes={INPUT}:{'x'.join(map(str, graph.spec.input.shape(size)))}")
    # Types are those of the graph: TensorRT 11 has no --fp16 and --int8, and its networks are always strongly typed.
    words += ["--stronglyTyped"] * (int(version.split(".")[0]) < 11)
    words += ["--noTF32", "--useCudaGraph", f"--builderOptimizationLevel={settings.optimization_level}"]
    if settings.workspace_gib is not None:
        words.append(f"--memPoolSize=workspace:{int(settings.workspace_gib * (1 << 30))}B")
    if settings.hardware_compatible:
        level = {"ampere": "ampere+", "same": "sameComputeCapability"}[settings.hardware_compatible]
        words.append(f"--hardwareCompatibilityLevel={level}")
    return shlex.join(words + ["--versionCompatible"] * settings.version_compatible)


def read_precision(
    trt: Any, logger: Any, plan: Any, out: Path, spec: ModelSpec, settings: BuildSettings
) -> PrecisionCount:
    """Return what the inspector says about an engine; raise CheckFailedError if most of it is in another precision."""
    engine = load_engine(trt, logger, plan, out, settings)
    inspector, context = engine.create_engine_inspector(), engine.create_execution_context()
    if context is not None and context.set_input_shape(INPUT, spec.input.shape(settings.batch.optimal)):
        inspector.execution_context = context  # without a shape, the types of dynamic tensors are not reported
    information = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    precision = count_layers(information.get("Layers", []))

    if spec.precision != "fp32":
        # Conversions into a type and back would count as layers of it, so count products if there are any.
        wanted, counted = spec.precision.upper(), precision.products or precision.layers
        kept = len(spec.quantization.float_layers) if spec.quantization else 0
        number, total = counted.get(wanted, 0), sum(counted.values())
        if 2 * number <= max(total - kept, 1):
            raise CheckFailedError(
                f"{out} was not written: the graph is {wanted}, but only {number} of {total} layers of the engine are"
                f" ({', '.join(f'{count} {kind}' for kind, count in counted.items())}; {kept} stay in float)",
                "Try another version of TensorRT",
            )
    return precision


def compile_network(
    trt: Any,
    logger: Any,
    file: ModelFile,
    name: str,
    spec: ModelSpec,
    settings: BuildSettings,
    report: Report = silent,
    timing_cache: Path | None = None,
) -> Any:
    """Compile an ONNX file into a serialized engine, a buffer of TensorRT; this step alone needs no CUDA calls.

    `name` is that of the engine, for progress; `timing_cache` is a file with layer timings to use and update.
    """
    builder = trt.Builder(logger)
    # TensorRT 11 has only strongly typed networks and ignores the flag; TensorRT 10 needs it.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser, monitor = trt.OnnxParser(network, logger), progress_monitor(trt, name, report)
    with _cancelled_by_ctrl_c(monitor):
        is_parsed = parser.parse(file.content)
    if not is_parsed:
        problems = []
        for problem in (parser.get_error(index) for index in range(parser.num_errors)):
            node = f"{problem.node_operator()} {problem.node_name()}".strip()
            problems.append(f"node {node}: {problem.desc()}" if node else problem.desc())
        reason = " ".join("; ".join(problems).split()) or last_error(logger)
        raise ModelError(
            f"{settings.compiler} {trt.__version__} cannot parse {file.path}: {reason}",
            "Export it again with pmm export, or upgrade TensorRT",
        )
    config = builder.create_builder_config()
    config.builder_optimization_level = settings.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # otherwise the inspector reports no data types
    config.clear_flag(trt.BuilderFlag.TF32)
    if settings.workspace_gib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(settings.workspace_gib * (1 << 30)))
    if settings.hardware_compatible:
        levels = trt.HardwareCompatibilityLevel
        same = getattr(levels, "SAME_COMPUTE_CAPABILITY", None)
        if settings.hardware_compatible == "same" and same is None:
            raise NotOnThisMachineError(
                f"TensorRT {trt.__version__} has no --hardware-compatible same, which came with 10.9",
                "Upgrade TensorRT, or use --hardware-compatible ampere",
            )
        config.hardware_compatibility_level = same if settings.hardware_compatible == "same" else levels.AMPERE_PLUS
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.gpus:
        config.num_compute_capabilities = len(settings.gpus)
        for index, gpu in enumerate(settings.gpus):
            config.set_compute_capability(getattr(trt.ComputeCapability, gpu.upper()), index)
    batch, shape = settings.batch, spec.input.shape
    profile = builder.create_optimization_profile()
    profile.set_shape(INPUT, shape(batch.minimum), shape(batch.optimal), shape(batch.maximum))
    config.add_optimization_profile(profile)
    config.progress_monitor = monitor
    if timing_cache:
        # TensorRT returns None for a damaged cache and False for one of another device; both mean to start afresh.
        known = timing_cache.read_bytes() if timing_cache.is_file() else b""
        cache = config.create_timing_cache(known)
        if cache is None or not config.set_timing_cache(cache, False):
            config.set_timing_cache(config.create_timing_cache(b""), False)
    with _cancelled_by_ctrl_c(monitor):
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ModelError(
            f"{settings.compiler} {trt.__version__} cannot build {file.path}{last_error(logger)}",
            "Turing (sm75) needs --precision fp16; omit it or export FP16"
            if "sm75" in settings.gpus and spec.precision != "fp16"
            else "If memory ran out, choose a smaller --batch-profile or --workspace",
        )
    if timing_cache:
        with suppress(OutputError), written_whole(timing_cache) as temporary:  # without it, builds only take longer
            temporary.write_bytes(config.get_timing_cache().serialize())
    return plan


def progress_monitor(trt: Any, name: str, report: Report) -> Any:
    """Return a progress monitor that reports each outermost phase, with the current inner phase as detail.

    An exception cannot pass through TensorRT: it cancels the build and is in `caught` after it.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._lock = threading.Lock()  # TensorRT calls from several threads
            self._root: dict[str | None, str] = {}
            self._progress: dict[str, tuple[int, int]] = {}
            self.caught: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._root[phase_name] = self._root.get(parent_phase, phase_name)
            self._show(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._show(phase_name, step + 1, self._progress[phase_name][1])
            return self.caught is None

        def phase_finish(self, phase_name: str) -> None:
            steps = self._progress[phase_name][1]  # a phase may finish before its last step
            self._show(phase_name, steps, steps)

        def _show(self, phase: str, done: int, steps: int) -> None:
            try:
                with self._lock:
                    self._progress[phase] = done, steps
                    root = self._root[phase]
                    report(f"{name}: {root}", *self._progress[root], "" if root == phase else f"{phase} {done}/{steps}")
            except BaseException as error:
                self.caught = self.caught or error

    return Monitor()


@contextmanager
def _cancelled_by_ctrl_c(monitor: Any) -> Iterator[None]:
    """Let Ctrl-C cancel what TensorRT does; raise what `monitor` has caught after it.

    Python would raise KeyboardInterrupt in the next method that TensorRT calls, which prints it and goes on.
    """
    default = signal.default_int_handler
    is_default = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is default
    if is_default:
        signal.signal(signal.SIGINT, lambda *_: setattr(monitor, "caught", monitor.caught or KeyboardInterrupt()))
    try:
        yield
    finally:
        if is_default:
            signal.signal(signal.SIGINT, default)
    if monitor.caught:
        raise monitor.caught


# What an engine says about its precision: the inspectors of TensorRT 10 and 11 describe layers in different words.

_NARROWEST_FIRST = ("FP4", "INT4", "FP8", "INT8", "FP16", "BF16", "FP32")
_ALIASES = {"HALF": "FP16", "BFLOAT16": "BF16", "FLOAT": "FP32", "TF32": "FP32"}
_TYPE = re.compile(rf"\b({'|'.join((*_NARROWEST_FIRST, *_ALIASES))})\b", re.IGNORECASE)
_TACTICS = {"i8": "INT8", "int8": "INT8", "f16": "FP16", "h": "FP16", "bf16": "BF16", "tf32": "FP32", "f32": "FP32"}
_TACTIC = re.compile(r"(?:^|_)(i8|int8|f16|bf16|tf32|f32|h(?=\d+gemm))", re.IGNORECASE)
_MOVES = {"Reformat", "NoOp", "Shuffle", "Constant", "Identity", "Cast", "Quantize", "Dequantize", "Slice"}
"""Types of layers that compute nothing."""
_PRODUCT = re.compile(r"conv(?!ert)|gemm|matmul|matrixmultiply|fullyconnected", re.IGNORECASE)
_GENERATED = "__myl_"
"""Prefix of generated kernels, whose names say what they compute; other names come from the graph."""

Layer = Mapping[str, Any]


def count_layers(layers: Sequence[Layer | str]) -> PrecisionCount:
    """Count the layers that the inspector lists by data type; without details, a layer is only a name."""
    computing: Counter[str] = Counter()
    products: Counter[str] = Counter()
    for layer in ({"Name": layer} if isinstance(layer, str) else layer for layer in layers):
        if layer.get("LayerType") not in _MOVES:
            computing[layer_type(layer)] += 1
            said = [layer.get(field) or "" for field in ("Name", "LayerType", "ParameterType", "TacticName")]
            words = " ".join(said if said[0].startswith(_GENERATED) else said[1:])
            products[layer_type(layer)] += "Weights" in layer or bool(_PRODUCT.search(words))
    return PrecisionCount(dict(computing.most_common()), dict((+products).most_common()))


def layer_type(layer: Layer) -> str:
    """Return the data type of a layer: of its weights, else its inputs, else its outputs, else its tactic."""
    weights = [layer["Weights"]] if isinstance(layer.get("Weights"), Mapping) else []
    for tensors in (weights, layer.get("Inputs", []), layer.get("Outputs", [])):
        # The field is Type, Datatype, DataType or Format/Datatype.
        said = " ".join(str(value) for tensor in tensors for field, value in tensor.items() if "type" in field.lower())
        names = [name.upper() for name in _TYPE.findall(said)]
        if names:
            return min((_ALIASES.get(name, name) for name in names), key=_NARROWEST_FIRST.index)
    tactic = _TACTIC.search(layer.get("TacticName") or "")
    return _TACTICS[tactic.group(1).lower()] if tactic else "unknown"
