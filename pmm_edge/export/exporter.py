"""Export a checkpoint: strip and fuse, write ONNX, reduce precision, verify; then build engines and bundles.

Importing this module does not import torch: engines and bundles are made from an exported ONNX file without it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import onnxruntime

from pmm_edge import __version__
from pmm_edge.console import Report, silent
from pmm_edge.errors import (
    EXPORT_MODULES,
    CheckFailedError,
    DataError,
    ModelError,
    PmmError,
    PmmWarning,
    absent,
    install,
)
from pmm_edge.export import bundles
from pmm_edge.export.tensorrt import BuiltEngine, build_engine
from pmm_edge.files import check_new_folder, check_place, sha256, written_whole
from pmm_edge.images import Pixels
from pmm_edge.retrieval.distances import cosines, unit_length
from pmm_edge.runs import EXPORT_FOLDER, data_of, resolve_checkpoint
from pmm_edge.runtime.certificate import open_model
from pmm_edge.runtime.embedder import Embedder
from pmm_edge.runtime.manifest import RTX_DEFAULT, BatchProfile, BuildSettings
from pmm_edge.runtime.model_file import DIGEST_KEY, parse_model
from pmm_edge.runtime.onnx_backend import OnnxEmbedder
from pmm_edge.spec import (
    METADATA_KEY,
    CalibrationMethod,
    HardwareCompatibility,
    InputForm,
    ModelSpec,
    Precision,
    Quantization,
    QuantizationTarget,
)

if TYPE_CHECKING:
    from pmm_edge.export.quantize import SensitivitySearch

_NAME = "[A-Za-z0-9_][A-Za-z0-9_.-]*"  # of a model in Triton: valid as a folder and in config.pbtxt
OPSET, INT8_OPSET, OPSETS = 18, 19, range(17, 21)
"""Default, default and lowest of INT8 for TensorRT, and supported opsets.

The default is what torch's exporter writes without conversion. Opset 19 introduced Q/DQ nodes of float16 values."""
TOLERANCE = 1e-3
"""Largest allowed difference of an FP32 export, as a share of the largest value; rounding stays far below."""
MIN_COSINE = {"fp16": 0.999, "int8": 0.95}
"""Smallest allowed cosine to the checkpoint: of any image in FP16 (0.99 with float16 sums), the mean in INT8."""


@dataclass(frozen=True)
class ExportedFile:
    """A file that `export` wrote, compared with the checkpoint on calibration crops (held out) or random images."""

    path: Path
    spec: ModelSpec
    size: int
    """In bytes."""
    departure: float = 0.0
    """Largest difference of an embedding value, as a share of the largest value."""
    cosine_mean: float = 1.0
    cosine_min: float = 1.0
    largest_value: float | None = None
    """Largest value between the nodes of an FP16 network on the calibration crops; float16 ends at 65504."""
    search: SensitivitySearch | None = None


@dataclass(frozen=True)
class ExportResult:
    """What `export` wrote."""

    checkpoint: Path
    """The checkpoint, with `embedding_size` the reduced one, or the ONNX file that was exported before."""
    files: list[ExportedFile]
    """The requested input form first."""
    engine: BuiltEngine | None
    """Of the first file."""
    served_engine: BuiltEngine | None
    """The engine that Triton serves, if that is another one."""
    bundles: dict[str, Path]
    """Folders of `deepstream` and `triton`."""
    failures: list[PmmError]
    """Why engines or bundles are missing; the files are complete all the same."""


def export(
    checkpoint: Path | str | None = None,
    *,
    out: Path | str | None = None,
    input_form: InputForm | None = None,
    opset: int | None = None,
    embedding_size: int | None = None,
    whiten: bool = False,
    normalize_output: bool = False,
    static_batch: int | None = None,
    precision: Precision = "fp32",
    calibration: Path | str | None = None,
    layout: str | None = None,
    target: QuantizationTarget | None = None,
    calibration_method: CalibrationMethod | None = None,
    max_map_drop: float | None = None,
    safetensors: bool = False,
    deepstream: Path | str | None = None,
    triton: Path | str | None = None,
    triton_name: str | None = None,
    trt: bool = False,
    batch_profile: BatchProfile | str | None = None,
    workspace_gib: float | None = None,
    optimization_level: int | None = None,
    hardware_compatible: HardwareCompatibility | None = None,
    version_compatible: bool = False,
    timing_cache: bool = True,
    rtx: bool = False,
    gpu: str | None = None,
    report: Report = silent,
) -> ExportResult:
    """Export a checkpoint to ONNX, and optionally to TensorRT, DeepStream and Triton.

    Every ONNX file is run and compared with the checkpoint before it gets its name. Engines and bundles that fail are
    listed in the result's `failures`; they do not affect other outputs.

        pmm.export()                                                  # the newest run's best checkpoint
        pmm.export("runs/20261122-174200-quick", precision="int8", target="cpu", max_map_drop=0.5)
        pmm.export("model.onnx", trt=True, batch_profile="1,16,64")

    Args:
        checkpoint: a checkpoint or run folder; default: the newest run. With `trt`, `deepstream` or `triton` also an
            ONNX file that was exported before, which needs no torch.
        out: the ONNX file to write; default: in the run's `export` folder. For an ONNX file: the engine to write.
        input_form: `uint8` (default), `raw` or `normalized`; see `InputSpec`.
        opset: 17 to 20, for INT8 for TensorRT 19 or 20; default: 18 and 19.
        embedding_size: reduce the embedding to this many values by PCA of the training images. The reduced checkpoint
            is written to `reduced-SIZE/best.pt` next to the full one, and exported from there.
        whiten: also center the reduced embedding and scale each value to a variance of 1.
        normalize_output: scale embeddings to unit L2 length.
        static_batch: the only batch size that the graph accepts; default: any.
        precision: `fp32`, `fp16` or `int8`.
        calibration: data set (of `layout`, if that is not detected) whose training images calibrate INT8, check FP16
            and set the axes of PCA; default: the run's data set.
        target: engine of the INT8 graph, `tensorrt` (default) or `cpu`.
        calibration_method: of INT8; default: the best of all.
        max_map_drop: keep the layers that INT8 affects most in floating point until mAP drops by at most this many
            points.
        safetensors: also write the weights, without classifiers, for PyTorch.
        deepstream: folder to write for DeepStream's tracker.
        triton: model repository to add the network (or, with `trt`, the engine) to.
        triton_name: name of the model there; default such as `pmm_resnet50_fp16_trt`.
        trt: build a TensorRT engine for this machine's GPU. The options after it are those of `BuildSettings`.
        rtx: build an engine for RTX GPUs with TensorRT for RTX, on any machine.
        gpu: the compute capabilities of these, such as `sm86,sm89`; default: `sm80,sm86,sm89,sm120`.

    Raises PmmError if options contradict each other, ModelError, DataError or OutputError if the network, the
    calibration data or a place to write to cannot be used, CheckFailedError if the export differs from the checkpoint
    or cannot reach the precision.
    """
    # Validate the request before any work.
    int8 = {"--target": target, "--calibration-method": calibration_method, "--max-map-drop": max_map_drop}
    build = {"--batch-profile": batch_profile, "--workspace": workspace_gib, "--optimization-level": optimization_level}
    of_data = {"--calibration": calibration, "--layout": layout}
    only_trt = {"--hardware-compatible": hardware_compatible, "--version-compatible": version_compatible}
    if trt and rtx:
        raise PmmError("--trt and --rtx build different engines", "Run pmm export once for each")
    for is_used, option, dependents in (
        (precision == "int8", "--precision int8", int8),
        (precision != "fp32" or embedding_size, "--precision fp16 or int8, or --embedding-size", of_data),
        (embedding_size, "--embedding-size", {"--whiten": whiten}),
        (triton, "--triton", {"--triton-name": triton_name}),
        (trt or rtx, "--trt or --rtx", build),
        (trt, "--trt", only_trt | {"--no-timing-cache": not timing_cache}),
        (rtx, "--rtx", {"--gpu": gpu}),
    ):
        given = [name for name, value in dependents.items() if value is not None and value is not False]
        if given and not is_used:
            raise PmmError(f"{', '.join(given)} has no effect without {option}", f"Add {option}")
    float16_scales = precision == "int8" and target != "cpu"
    opsets = range(INT8_OPSET if float16_scales else OPSETS[0], OPSETS[-1] + 1)
    graph_opset = opset or (INT8_OPSET if float16_scales else OPSET)
    choices: tuple[tuple[str, str | None, Any], ...] = (
        ("precision", precision, Precision),
        ("input form", input_form, InputForm),
        ("target", target, QuantizationTarget),
        ("calibration method", calibration_method, CalibrationMethod),
    )
    for is_valid, value, remedy in (
        *(
            (value is None or value in get_args(kind), f"{name} '{value}'", f"Choose {', '.join(get_args(kind))}")
            for name, value, kind in choices
        ),
        (opset is None or opset in opsets, f"opset {opset} for this precision", f"Choose {opsets[0]} to {opsets[-1]}"),
        (embedding_size is None or embedding_size >= 1, f"embedding size {embedding_size}", "Choose 1 or more"),
        (static_batch is None or static_batch >= 1, f"static batch {static_batch}", "Choose 1 or more"),
        (max_map_drop is None or 0 <= max_map_drop <= 100, f"mAP drop {max_map_drop}", "Choose a value such as 0.5"),
        (re.fullmatch(_NAME, triton_name or "default"), f"model name '{triton_name}'", "Use letters, digits, . _ -"),
    ):
        if not is_valid:
            raise PmmError(f"invalid {value}", remedy)

    # Describe the network, and name a file for each input form that is needed.
    source = resolve_checkpoint(Path(checkpoint) if checkpoint else None)
    paths = out, deepstream, triton, calibration
    out, deepstream, triton, calibration = (Path(path) if path else None for path in paths)
    loaded = smaller = None
    if source.suffix == ".onnx":
        embedder = OnnxEmbedder(open_model(source), "cpu")
        spec, form = embedder.spec, embedder.spec.input.form
        wanted = (opset, embedding_size, normalize_output, static_batch, precision, safetensors, input_form or form)
        is_changed = wanted != (None, None, False, None, "fp32", False, form)
        to_engine = trt or rtx
        is_misnamed = out is not None and not (to_engine and out.suffix == ".engine")
        if is_changed or is_misnamed or not (to_engine or deepstream or triton):
            raise PmmError(
                f"{source} is exported already: only engines and bundles can be made from it, in the form {form}",
                "Add --trt, --rtx, --deepstream or --triton (--out names an .engine), or name the checkpoint",
            )
        files, static_batch = {form: source}, embedder.profile.maximum if embedder.profile else None
    else:
        if missing := absent(*EXPORT_MODULES):
            remedy = f"{install('train')}; pmm export model.onnx --trt works without it"
            raise PmmError(f"{source} cannot be exported: {missing}", remedy)
        # All that the export of a checkpoint imports, before any work.
        from pmm_edge.export import graph, quantize, reduce
        from pmm_edge.model import load_checkpoint
        from pmm_edge.runtime.torch_backend import CLASSIFIER, TorchEmbedder

        loaded, form = load_checkpoint(source, open_model(source).content), input_form or "uint8"
        # Method and images are filled in after calibration.
        how = Quantization(target or "tensorrt", "minmax", 0, float_type="fp16" if float16_scales else "fp32")
        spec = replace(loaded.spec, precision=precision, quantization=how if precision == "int8" else None)
        smaller = reduce.reduced_path(source, embedding_size, whiten) if embedding_size else None
        main = out or (smaller or source).parent / EXPORT_FOLDER / _file_name(spec, form)
        if main.suffix != ".onnx":
            raise PmmError(f"{main} does not end in .onnx", f"Name it {main.with_suffix('.onnx')}")
        files = {form: main}
    first = files[form]
    wanted_by = (("deepstream", bundles.DEEPSTREAM_FORM, deepstream), ("triton", bundles.TRITON_FORM, triton))
    for option, needed, folder in wanted_by:
        if folder and static_batch is not None:
            raise ModelError(
                f"{first} has a static batch of {static_batch}, but DeepStream and Triton use any batch size",
                "Export it without --static-batch",
            )
        if folder and needed not in files:
            if loaded is None:
                raise ModelError(
                    f"{first} has the input form {form}, but --{option} needs {needed}",
                    f"Name the checkpoint, or an export with --input-form {needed} and --{option} alone",
                )
            files[needed] = first.with_name(f"{first.stem}-{needed}.onnx" if out else _file_name(spec, needed))
    if (trt or rtx or deepstream) and spec.quantization and spec.quantization.target == "cpu":
        raise ModelError(
            f"{first} is INT8 for CPUs, with zero points that TensorRT refuses", "Export it with --target tensorrt"
        )

    # Check what engines and bundles need, and every place to write to.
    level = BuildSettings.optimization_level if optimization_level is None else optimization_level
    batch = BatchProfile.chosen(batch_profile, static_batch)
    gpus = tuple(gpu.lower().split(",")) if gpu else RTX_DEFAULT if rtx else ()
    settings = BuildSettings(batch, workspace_gib, level, hardware_compatible, version_compatible, timing_cache, gpus)
    if rtx and spec.precision == "int8":
        if "sm75" in gpus:
            raise PmmError("NVIDIA lists no INT8 for Turing (sm75)", "Omit it, or export with --precision fp16")
        text = "TensorRT for RTX may not run INT8 convolutions in INT8: NVIDIA lists only INT8 weights"
        warnings.warn(f"{text}. --precision fp16 is the one to use", PmmWarning, stacklevel=2)
    if trt and triton and batch.minimum != 1:
        raise PmmError(
            f"Triton sends single requests, but the smallest batch of the engine is {batch.minimum}",
            f"Build it with --batch-profile {replace(batch, minimum=1)}",
        )
    of_engine = out if out and loaded is None else settings.engine_path(first)
    engine_paths = {form: of_engine} if trt or rtx else {}
    if trt and triton:
        engine_paths.setdefault(bundles.TRITON_FORM, files[bundles.TRITON_FORM].with_suffix(".engine"))
    weights = first.with_suffix(".safetensors")
    for path in (*(files.values() if loaded else ()), *engine_paths.values(), *([weights] * safetensors), smaller):
        if path:
            check_place(path)
    if deepstream:
        check_new_folder(deepstream)
    model_folder = triton / (triton_name or bundles.triton_name(spec, as_engine=trt)) if triton else None
    if model_folder:
        check_new_folder(model_folder, "Give the model another name with --triton-name")

    exported: list[ExportedFile] = []
    if loaded:
        # Read the images to calibrate and to compare on.
        crops = None
        if precision != "fp32":
            data = calibration
            with suppress(DataError):  # the checkpoint is not in a run
                data, layout = data_of(source, calibration, layout)
            if data and (calibration or data.is_dir()):
                fewest = quantize.MIN_IMAGES if precision == "int8" else 1
                most = quantize.MAX_IMAGES_TENSORRT if float16_scales else quantize.MAX_IMAGES
                crops = quantize.read_calibration(data, spec.input, layout, fewest, most)
            elif precision == "int8":
                raise DataError("INT8 needs calibration images, and the run has no data set", "Add --calibration")
            else:
                text = "FP16 was not checked on images: a value beyond its range would become infinite"
                warnings.warn(f"{text}. Add --calibration", PmmWarning, stacklevel=2)
        if crops and precision == "int8":
            images = crops.held_out
        elif crops:
            images = np.concatenate([crops.ranges, crops.selection, crops.held_out])
        else:
            shape = (4, spec.input.height, spec.input.width, 3)
            images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

        if embedding_size and smaller:
            loaded = reduce.reduce_checkpoint(source, loaded, embedding_size, whiten, calibration, layout, report)
            source = smaller

        # Write one ONNX file for each input form. They share one network, whose precision is reduced once.
        reference = TorchEmbedder(loaded.network(), loaded.spec, source, "cpu")
        tools = _versions("torch", "onnx", "onnxscript") | {
            "onnxruntime": onnxruntime.__version__,
            "opset": str(graph_opset),
        }
        spec = replace(
            loaded.spec,
            precision=precision,
            quantization=spec.quantization,
            checkpoint_sha256=loaded.spec.checkpoint_sha256 or sha256(source),
            normalized_output=normalize_output,
            tools=tools,
        )
        if normalize_output:  # the Euclidean distance of such embeddings ranks as their cosine does
            thresholds = spec.calibration and spec.calibration.of_unit_length()
            spec = replace(spec, retrieval=spec.retrieval_cosine, calibration=thresholds)
        reduced = largest = search = None
        for file_form, path in files.items():
            report(f"exporting {path.name}", 0, 2, "writing the graph")
            spec = replace(spec, input=replace(spec.input, form=file_form))
            network = graph.inference_network(loaded.network(), spec.input, normalize_output)
            model = graph.onnx_graph(network, spec, graph_opset)
            parts = graph.split(model)
            gflops, parameters = graph.count_work(parts.network)
            spec = replace(spec, gflops=gflops, parameters=parameters)
            if target == "cpu" and file_form == "uint8" and parts.before:
                parts = replace(parts, before=graph.row_preprocessing(parts.before, spec.input))
            if precision == "fp16" and reduced is None:
                ranges = quantize.value_ranges(parts.network, images, spec.input, report=report) if crops else None
                reduced, largest = quantize.cast_to_fp16(parts.network, ranges)
            elif crops and reduced is None:
                reduced, quantization, search = quantize.quantize_network(
                    parts, spec, crops, calibration_method, max_map_drop, report
                )
                spec = replace(spec, quantization=quantization)
            content = graph.finalize(parts.join(reduced) if reduced else model, spec, static_batch).SerializeToString()
            with written_whole(path) as temporary:  # reports every OSError of this block as one of `path`
                temporary.write_bytes(content)
                report(f"exporting {path.name}", 1, 2, "comparing it with the checkpoint")
                closeness = _verify(reference, OnnxEmbedder(parse_model(path, content), "cpu"), images, path)
            report(f"exporting {path.name}", 2, 2)
            exported.append(ExportedFile(path, spec, len(content), *closeness, largest, search))
        if safetensors:
            from safetensors.torch import save

            copied = {name: getattr(spec, name) for name in ("checkpoint_sha256", "gflops", "parameters")}
            of_weights = replace(loaded.spec, **copied, tools=_versions("torch", "safetensors"))
            # Training keeps weights in channels_last, which the format does not support.
            kept = {name: tensor.contiguous() for name, tensor in loaded.weights.items() if CLASSIFIER not in name}
            metadata = {METADATA_KEY: of_weights.to_json()}
            metadata[DIGEST_KEY] = parse_model(weights, save(kept, metadata)).digest
            content = save(kept, metadata)
            with written_whole(weights) as temporary:
                temporary.write_bytes(content)
            exported.insert(1, ExportedFile(weights, of_weights, len(content)))

    # Build engines and bundles. One that fails does not prevent the others.
    engines: dict[InputForm, BuiltEngine] = {}
    written: dict[str, Path] = {}
    failures: list[PmmError] = []
    for engine_form, path in engine_paths.items():
        also = ["--triton", str(triton)] if triton and engine_form == bundles.TRITON_FORM else []
        also += ["--triton-name", triton_name] if also and triton_name else []
        with _collect(failures):
            engines[engine_form] = build_engine(files[engine_form], path, settings, report, also)
    if deepstream:
        with _collect(failures):
            bundles.deepstream_bundle(files[bundles.DEEPSTREAM_FORM], deepstream)
            written["deepstream"] = deepstream
    served = engines.get(bundles.TRITON_FORM) if trt else None  # Triton does not run engines of TensorRT for RTX
    if model_folder and (served or not trt):
        with _collect(failures):
            bundles.triton_bundle(files[bundles.TRITON_FORM], model_folder, served)
            written["triton"] = model_folder
    engine = engines.get(form)
    return ExportResult(source, exported, engine, served if served is not engine else None, written, failures)


@contextmanager
def _collect(failures: list[PmmError]) -> Iterator[None]:
    try:
        yield
    except PmmError as failure:
        failures.append(failure)


def _file_name(spec: ModelSpec, form: InputForm) -> str:
    """Return a file name such as `model.onnx`, `model-raw-fp16.onnx` or `model-int8-cpu.onnx`."""
    words = ["model", *[form] * (form != "uint8"), *[spec.precision] * (spec.precision != "fp32")]
    return "-".join([*words, spec.quantization.target] if spec.quantization else words) + ".onnx"


def _versions(*packages: str) -> dict[str, str]:
    return {"pmm-edge": __version__} | {package: version(package) for package in packages}


def _verify(reference: Embedder, candidate: Embedder, images: Pixels, out: Path) -> tuple[float, float, float]:
    """Compare an export with its checkpoint at batch 1 and at a larger batch: departure, mean and smallest cosine."""
    expected = reference.embed(images)
    if not np.isfinite(expected).all():
        raise CheckFailedError(f"{reference.path} produces NaN or infinity", "Train again with a lower learning rate")
    if candidate.spec.normalized_output:
        expected = unit_length(expected)
    actual = np.concatenate([candidate.embed(images[:1]), candidate.embed(images[1:])])
    departure = float(np.abs(actual - expected).max() / (float(np.abs(expected).max()) or 1.0))
    cosine = cosines(expected, actual)
    mean, smallest = float(cosine.mean()), float(cosine.min())
    fp16 = 0.99 if candidate.float16_sums else MIN_COSINE["fp16"]
    passed, limit, remedy = {  # a comparison with NaN fails
        "fp32": (departure <= TOLERANCE, f"a difference of {TOLERANCE:g}", "Try another version of torch"),
        "fp16": (smallest >= fp16, f"a smallest cosine of {fp16:g}", "Export FP32"),
        "int8": (mean >= MIN_COSINE["int8"], f"a mean cosine of {MIN_COSINE['int8']:g}", "Calibrate on similar images"),
    }[candidate.spec.precision]
    if not passed:
        raise CheckFailedError(
            f"{out} was not written: it differs from {reference.path} (largest difference {departure:.2g} of the"
            f" largest value, cosine {mean:.4f}, smallest {smallest:.4f}; the limit is {limit})",
            remedy,
        )
    return departure, mean, smallest
