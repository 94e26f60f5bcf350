"""Export a checkpoint: strip and fuse, write ONNX, reduce precision, verify; then build engines and bundles.

Importing this module does not import torch: engines and bundles are made from an exported ONNX file without it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime

from pmm_edge import __version__
from pmm_edge.console import Report, silent
from pmm_edge.errors import CheckFailedError, DataError, PmmError, PmmWarning, install
from pmm_edge.export import bundles
from pmm_edge.export.tensorrt import BuiltEngine, build_engine, check_quantized_for_tensorrt
from pmm_edge.files import check_new_folder, check_place, sha256, written_whole
from pmm_edge.images import Pixels
from pmm_edge.retrieval.distances import cosines, unit_length
from pmm_edge.runs import EXPORT_FOLDER, data_of, resolve_checkpoint
from pmm_edge.runtime.embedder import Embedder
from pmm_edge.runtime.manifest import BatchProfile, BuildSettings
from pmm_edge.runtime.onnx_backend import OnnxEmbedder
from pmm_edge.spec import (
    FLOAT16_MAX,
    METADATA_KEY,
    CalibrationMethod,
    InputForm,
    ModelSpec,
    Precision,
    Quantization,
    QuantizationTarget,
)

if TYPE_CHECKING:
    from pmm_edge.export.calibration import Calibration
    from pmm_edge.export.quantize import SensitivitySearch
    from pmm_edge.model import Checkpoint

OPSET = 18
"""Default opset: what torch's exporter writes without conversion."""
OPSETS = range(17, 21)

TOLERANCE = 1e-3
"""Largest allowed difference of an FP32 export, as a share of the largest value; rounding stays far below."""
MIN_COSINE = {"fp16": 0.999, "int8": 0.95}
"""Smallest allowed cosine to the checkpoint: of any image in FP16, the mean in INT8. `pmm bench` requires more."""


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
    """The checkpoint, or the ONNX file that was exported before."""
    files: list[ExportedFile]
    """The requested input form first."""
    engine: BuiltEngine | None
    """Of the first file."""
    served_engine: BuiltEngine | None
    """The engine that Triton serves, if that is another one."""
    bundles: list[bundles.Bundle]
    failures: list[PmmError]
    """Why engines or bundles are missing; the files are complete all the same."""


def export(
    checkpoint: Path | str | None = None,
    *,
    out: Path | str | None = None,
    input_form: InputForm | None = None,
    opset: int = OPSET,
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
    hardware_compatible: bool = False,
    version_compatible: bool = False,
    timing_cache: bool = True,
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
        opset: 17 to 20.
        normalize_output: scale embeddings to unit L2 length.
        static_batch: the only batch size that the graph accepts; default: any.
        precision: `fp32`, `fp16` or `int8`.
        calibration: data set (of `layout`, if that is not detected) whose training images calibrate INT8 and check
            FP16; default: the run's data set.
        target: engine of the INT8 graph, `tensorrt` (default) or `cpu`.
        calibration_method: of INT8; default: the best of all.
        max_map_drop: keep the layers that INT8 affects most in float32 until mAP drops by at most this many points.
        safetensors: also write the weights, without classifiers, for PyTorch.
        deepstream: folder to write for DeepStream's tracker.
        triton: model repository to add the network (or, with `trt`, the engine) to.
        triton_name: name of the model there; default such as `pmm_resnet50_fp16_trt`.
        trt: build a TensorRT engine for this machine's GPU. The options after it are those of `BuildSettings`.

    Raises PmmError if options contradict each other, ModelError, DataError or OutputError if the network, the
    calibration data or a place to write to cannot be used, CheckFailedError if the export differs from the checkpoint
    or cannot reach the precision.
    """
    # Check the options before any work.
    for is_used, option, dependents in (
        (
            precision == "int8",
            "--precision int8",
            {"--target": target, "--calibration-method": calibration_method, "--max-map-drop": max_map_drop},
        ),
        (precision != "fp32", "--precision fp16 or int8", {"--calibration": calibration, "--layout": layout}),
        (triton, "--triton", {"--triton-name": triton_name}),
        (
            trt,
            "--trt",
            {
                "--batch-profile": batch_profile,
                "--workspace": workspace_gib,
                "--optimization-level": optimization_level,
                "--hardware-compatible": hardware_compatible or None,
                "--version-compatible": version_compatible or None,
                "--no-timing-cache": None if timing_cache else True,
            },
        ),
    ):
        given = [name for name, value in dependents.items() if value is not None]
        if given and not is_used:
            raise PmmError(f"{', '.join(given)} has no effect without {option}", f"Add {option}")
    if opset not in OPSETS:
        raise PmmError(f"opset {opset} is not supported", f"Choose {OPSETS[0]} to {OPSETS[-1]}")
    if static_batch is not None and static_batch < 1:
        raise PmmError(f"a static batch of {static_batch} is invalid", "Choose 1 or more")
    if max_map_drop is not None and not 0 <= max_map_drop <= 100:
        raise PmmError(f"a mAP drop of {max_map_drop} points is invalid", "Choose a value such as 0.5")
    source = resolve_checkpoint(Path(checkpoint) if checkpoint else None)
    out = Path(out) if out else None
    deepstream = Path(deepstream) if deepstream else None
    triton = Path(triton) if triton else None

    # Describe the network, and name a file for each input form that is needed.
    loaded = None
    if source.suffix == ".onnx":
        embedder = OnnxEmbedder(source, "cpu")
        spec = embedder.spec
        changed = (opset, normalize_output, static_batch, precision, safetensors) != (OPSET, False, None, "fp32", False)
        if changed or input_form not in (None, spec.input.form):
            raise PmmError(
                f"{source} is exported already: its graph, input form ({spec.input.form}) and precision are fixed",
                "Name the checkpoint it was exported from",
            )
        if not (trt or deepstream or triton) or (out and not (trt and out.suffix == ".engine")):
            raise PmmError(
                f"{source} is exported already, so there is nothing to write to {out or 'a file'}",
                "Name an .engine with --trt, or a folder with --deepstream or --triton",
            )
        files, static_batch = {spec.input.form: source}, embedder.profile.maximum if embedder.profile else None
    else:
        loaded = _load(source)
        form = input_form or "uint8"
        spec = replace(
            loaded.spec,
            input=replace(loaded.spec.input, form=form),
            normalized_output=normalize_output,
            precision=precision,
            # Method and images are filled in after calibration.
            quantization=Quantization(target or "tensorrt", "minmax", 0) if precision == "int8" else None,
        )
        main = out or source.parent / EXPORT_FOLDER / _default_name(spec)
        if main.suffix != ".onnx":
            raise PmmError(f"{main} does not end in .onnx", f"Name it {main.with_suffix('.onnx')}")
        files = {form: main}
        for wanted, needed in ((bundles.DEEPSTREAM_FORM, deepstream), (bundles.TRITON_FORM, triton)):
            if needed and wanted not in files:
                name = f"{main.stem}-{wanted}.onnx" if out else _default_name(_with_form(spec, wanted))
                files[wanted] = main.with_name(name)
    main = next(iter(files.values()))

    # Check what engines and bundles need, and every place to write to.
    settings = None
    if trt:
        settings = BuildSettings(
            batch=BatchProfile.chosen(batch_profile, static_batch),
            workspace_gib=workspace_gib,
            optimization_level=BuildSettings.optimization_level if optimization_level is None else optimization_level,
            hardware_compatible=hardware_compatible,
            version_compatible=version_compatible,
            timing_cache=timing_cache,
        )
    if trt or deepstream:
        check_quantized_for_tensorrt(spec, main)
    for form, needed in ((bundles.DEEPSTREAM_FORM, deepstream), (bundles.TRITON_FORM, triton)):
        if needed:
            bundles.check_accepts(_with_form(spec, form) if form in files else spec, static_batch, main, form)
    engine_forms: list[InputForm] = [next(iter(files))] if settings else []
    model_name = ""
    if triton:
        model_name = bundles.check_triton_name(triton_name or bundles.triton_name(spec, as_engine=trt))
        if settings:
            bundles.check_batch_of_one(settings.batch)
            engine_forms = list(dict.fromkeys((*engine_forms, bundles.TRITON_FORM)))
    weights = main.with_suffix(".safetensors")
    engine_paths = {
        form: out if out and loaded is None else files[form].with_suffix(".engine") for form in engine_forms
    }
    for path in (*(files.values() if loaded else ()), *engine_paths.values(), *([weights] if safetensors else [])):
        check_place(path)
    if deepstream:
        check_new_folder(deepstream)
    if triton:
        check_new_folder(triton / model_name, bundles.NAME_TAKEN)

    # Write the ONNX files and the weights.
    exported: list[ExportedFile] = []
    if loaded:
        crops = None
        if precision != "fp32":
            crops = _read_calibration(source, spec, Path(calibration) if calibration else None, layout)
        exported = _write_onnx(
            loaded, source, files, spec, opset, static_batch, crops, calibration_method, max_map_drop, report
        )
        if safetensors:
            exported.insert(1, _write_safetensors(loaded, exported[0].spec, weights))

    # Build engines and bundles. One that fails does not prevent the others.
    engines: dict[InputForm, BuiltEngine] = {}
    written: list[bundles.Bundle] = []
    failures: list[PmmError] = []
    for form, path in engine_paths.items():
        also = ["--triton", str(triton)] if triton and form == bundles.TRITON_FORM else []
        also += ["--triton-name", triton_name] if also and triton_name else []
        with _collect(failures):
            engines[form] = build_engine(files[form], path, settings or BuildSettings(), report, also)
    if deepstream:
        with _collect(failures):
            written.append(bundles.deepstream_bundle(files[bundles.DEEPSTREAM_FORM], deepstream))
    served = engines.get(bundles.TRITON_FORM)
    if triton and (served or not settings):
        with _collect(failures):
            onnx, plan = files[bundles.TRITON_FORM], served.path if served else None
            written.append(bundles.triton_bundle(onnx, triton, plan, model_name))
    engine = engines.get(next(iter(files)))
    return ExportResult(source, exported, engine, served if served is not engine else None, written, failures)


@contextmanager
def _collect(failures: list[PmmError]) -> Iterator[None]:
    try:
        yield
    except PmmError as failure:
        failures.append(failure)


def _load(source: Path) -> Checkpoint:
    try:
        # What `_write_onnx` imports as well: a missing package is reported before any work.
        from pmm_edge.export import graph, quantize  # noqa: F401
        from pmm_edge.model import load_checkpoint
    except ModuleNotFoundError as error:
        raise PmmError(
            f"exporting a checkpoint needs {error.name}, which is not installed",
            f"{install('train')}; pmm export model.onnx --trt works without it",
        ) from error
    return load_checkpoint(source)


def _with_form(spec: ModelSpec, form: InputForm) -> ModelSpec:
    return replace(spec, input=replace(spec.input, form=form))


def _default_name(spec: ModelSpec) -> str:
    """Return a file name such as `model.onnx`, `model-raw-fp16.onnx` or `model-int8-cpu.onnx`."""
    words = ["model"] if spec.input.form == "uint8" else ["model", spec.input.form]
    if spec.precision != "fp32":
        words.append(spec.precision)
    if spec.quantization:
        words.append(spec.quantization.target)
    return "-".join(words) + ".onnx"


def _read_calibration(source: Path, spec: ModelSpec, data: Path | None, layout: str | None) -> Calibration | None:
    """Read the calibration crops; FP16 without a data set gives a warning and None."""
    from pmm_edge.export.calibration import read_calibration

    with suppress(DataError):  # the checkpoint is not in a run
        of_run, layout = data_of(source, data, layout)
        data = data or (of_run if of_run.is_dir() else None)
    if data:
        return read_calibration(data, spec.input, layout)
    if spec.precision == "int8":
        raise DataError("INT8 needs calibration images, and the run's data set does not exist", "Add --calibration")
    warnings.warn(
        f"FP16 was not checked on images: a value above {FLOAT16_MAX:.0f} would become infinite. Add --calibration",
        PmmWarning,
        stacklevel=2,
    )
    return None


def _write_onnx(
    checkpoint: Checkpoint,
    source: Path,
    files: dict[InputForm, Path],
    spec: ModelSpec,
    opset: int,
    static_batch: int | None,
    calibration: Calibration | None,
    method: CalibrationMethod | None,
    max_map_drop: float | None,
    report: Report,
) -> list[ExportedFile]:
    """Write one ONNX file for each input form. They share one network, whose precision is reduced once."""
    from pmm_edge.export import graph, quantize
    from pmm_edge.export.calibration import value_ranges
    from pmm_edge.runtime.torch_backend import TorchEmbedder

    reference = TorchEmbedder(checkpoint.network(), checkpoint.spec, source, "cpu")
    tools = _versions("torch", "onnx", "onnxscript") | {"onnxruntime": onnxruntime.__version__, "opset": str(opset)}
    spec = replace(spec, checkpoint_sha256=sha256(source), tools=tools)
    if calibration:
        images = calibration.held_out if spec.precision == "int8" else calibration.all
    else:
        shape = (4, spec.input.height, spec.input.width, 3)
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    reduced = largest = search = None
    exported = []
    for form, out in files.items():
        report(f"exporting {out.name}", 0, 2, "writing the graph")
        spec = _with_form(spec, form)
        stripped = graph.inference_network(checkpoint.network(), spec.input, spec.normalized_output)
        model = graph.onnx_graph(stripped, spec, opset)
        parts = graph.split(model)
        gflops, parameters = graph.count_work(parts.network)
        spec = replace(spec, gflops=gflops, parameters=parameters)
        if spec.precision == "fp16":
            if reduced is None and calibration:
                ranges = value_ranges(parts.network, calibration.all, spec.input, report=report)
                largest = quantize.largest_value(parts.network, ranges)
            reduced = reduced or quantize.cast_to_fp16(parts.network)
        elif spec.quantization and calibration:
            if spec.quantization.target == "cpu" and form == "uint8" and parts.before:
                parts = replace(parts, before=graph.row_preprocessing(parts.before, spec.input))
            if reduced is None:
                reduced, quantization, search = quantize.quantize_network(
                    parts, spec, calibration, method, max_map_drop, report
                )
                spec = replace(spec, quantization=quantization)
        content = graph.finalize(parts.join(reduced) if reduced else model, spec, static_batch).SerializeToString()
        with written_whole(out) as temporary:  # reports every OSError of this block as one of `out`
            temporary.write_bytes(content)
            report(f"exporting {out.name}", 1, 2, "comparing it with the checkpoint")
            closeness = _verify(reference, OnnxEmbedder(temporary, "cpu"), images, out)
        report(f"exporting {out.name}", 2, 2)
        exported.append(ExportedFile(out, spec, len(content), *closeness, largest, search))
    return exported


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
    figures = f"largest difference {departure:.2g} of the largest value, cosine {mean:.4f} (smallest {smallest:.4f})"
    passed, limit, remedy = {  # a comparison with NaN fails
        "fp32": (departure <= TOLERANCE, f"a difference of {TOLERANCE:g}", "Try another version of torch"),
        "fp16": (smallest >= MIN_COSINE["fp16"], f"a smallest cosine of {MIN_COSINE['fp16']:g}", "Export FP32"),
        "int8": (mean >= MIN_COSINE["int8"], f"a cosine of {MIN_COSINE['int8']:g}", "Calibrate on similar images"),
    }[candidate.spec.precision]
    if not passed:
        raise CheckFailedError(
            f"{out} was not written: it differs from {reference.path} ({figures}; the limit is {limit})", remedy
        )
    return departure, mean, smallest


def _write_safetensors(checkpoint: Checkpoint, exported: ModelSpec, out: Path) -> ExportedFile:
    """Write the weights without classifiers, with the spec as metadata."""
    from safetensors.torch import save

    from pmm_edge.runtime.torch_backend import CLASSIFIER

    copied = {name: getattr(exported, name) for name in ("checkpoint_sha256", "gflops", "parameters")}
    spec = replace(checkpoint.spec, **copied, tools=_versions("torch", "safetensors"))
    weights = {name: tensor for name, tensor in checkpoint.weights.items() if CLASSIFIER not in name}
    content = save(weights, metadata={METADATA_KEY: spec.to_json()})
    with written_whole(out) as temporary:
        temporary.write_bytes(content)
    return ExportedFile(out, spec, len(content))
