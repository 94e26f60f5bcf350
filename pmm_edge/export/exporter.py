"""Export a checkpoint: strip, write, and run what was written before it gets its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
from onnxruntime import __version__ as onnxruntime_version
from safetensors.torch import save

from pmm_edge import __version__
from pmm_edge.console import Report, silent
from pmm_edge.data.dataset import ReidDataset, read
from pmm_edge.errors import CheckFailedError, DataError, OutputError, PmmError
from pmm_edge.export.bundles import Bundle, deepstream, deepstream_bundle, triton, triton_bundle
from pmm_edge.export.bundles.bundle import check_feeding
from pmm_edge.export.graph import MANIFEST_KEY, finished, graph_manifest, inference_network, onnx_graph
from pmm_edge.export.options import Fp16, Graph, Int8, Precision
from pmm_edge.export.quantize import LayerLoss, Reduced, reduced
from pmm_edge.export.tensorrt import BuiltEngine, build_engine, check_quantised_for_tensorrt, what_builds
from pmm_edge.files import check_new_folder, check_place, sha256, written_whole
from pmm_edge.images import Pixels
from pmm_edge.model import Checkpoint, load_checkpoint
from pmm_edge.retrieval.distances import cosines, unit_length
from pmm_edge.runs import EXPORT_FOLDER, data_of
from pmm_edge.runtime.cuda import NotOnThisMachineError
from pmm_edge.runtime.embedder import Embedder
from pmm_edge.runtime.manifest import BatchProfile, BuildSettings
from pmm_edge.runtime.onnx_backend import OnnxEmbedder
from pmm_edge.runtime.torch_backend import CLASSIFIER, TorchEmbedder
from pmm_edge.spec import METADATA_KEY, InputForm, InputSpec, ModelSpec, Quantization

TOLERANCE = 1e-3
"""How far an export may depart, as a share of the largest embedding value: rounding stays a hundredfold below."""

LEAST_COSINE = {"fp16": 0.999, "int8": 0.95}
"""Of an export in a lower precision, below which it is no export of this network: of FP16 any image, of INT8 the mean.
`pmm bench` asks for more."""

_STEPS = ("reading the checkpoint", "tracing and writing the graph", "running it against the checkpoint", "done")


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    path: Path
    spec: ModelSpec
    size: int
    """Of the file, in bytes."""
    departure: float
    """The largest difference to the checkpoint's embeddings, as a share of their largest value: on random images,
    of a lower precision on crops of the calibration data that nothing was tuned on, where there are any."""
    cosine_mean: float = 1.0
    """Of the embeddings to the checkpoint's, on the same images."""
    cosine_min: float = 1.0
    layers: list[LayerLoss] = field(default_factory=list)
    """What a sensitivity search found, if there was one."""
    warnings: list[str] = field(default_factory=list)


def export_onnx(
    checkpoint_path: Path,
    out: Path,
    form: InputForm = "uint8",
    graph: Graph | None = None,
    precision: Precision | None = None,
    report: Report = silent,
) -> Exported:
    """Write a checkpoint as one ONNX file, checked against it in ONNX Runtime before it gets its name.

    Args:
        checkpoint_path: of `pmm train`.
        out: a file that ends in `.onnx`.
        form: of the input; see `InputSpec`.
        graph: opset, output and batch; None for the defaults.
        precision: FP16 or INT8, and how; None for FP32.

    Raises:
        ModelError: the checkpoint is missing, truncated or not ours.
        DataError: the calibration data cannot be used.
        OutputError: `out` cannot be written.
        CheckFailedError: the export's embeddings depart from the checkpoint's, the checkpoint gives NaN, or a
            precision cannot be reached.
    """
    (exported,) = export_forms(checkpoint_path, {form: out}, graph, precision, report)
    return exported


def export_forms(
    checkpoint_path: Path,
    outs: Mapping[InputForm, Path],
    graph: Graph | None = None,
    precision: Precision | None = None,
    report: Report = silent,
) -> list[Exported]:
    """Write a checkpoint as an ONNX file for each of several input forms, with one network in all of them.

    A lower precision is calibrated, and searched for, once: the files differ in their preprocessing alone.

    Args:
        outs: the file of each form, that ends in `.onnx`.

    The others, and what is raised: as of `export_onnx`.
    """
    for out in outs.values():
        _check_name(out, ".onnx")
        check_place(out)  # a plan has done so; this is for whoever calls without one
    report(f"exporting {next(iter(outs.values())).name}", 0, len(_STEPS) - 1, _STEPS[0])
    checkpoint = load_checkpoint(checkpoint_path)
    reference = TorchEmbedder(checkpoint.network(), checkpoint.spec, checkpoint_path, "cpu")
    made: Reduced | None = None
    exported = []
    for form, out in outs.items():
        one, made = _export_form(checkpoint, reference, out, form, graph or Graph(), precision, made, report)
        exported.append(one)
    return exported


def _export_form(
    checkpoint: Checkpoint,
    reference: TorchEmbedder,
    out: Path,
    form: InputForm,
    graph: Graph,
    precision: Precision | None,
    made: Reduced | None,
    report: Report,
) -> tuple[Exported, Reduced | None]:
    """One file, and the network in the lower precision, if any, for the forms that follow."""

    def step(number: int) -> None:
        report(f"exporting {out.name}", number, len(_STEPS) - 1, _STEPS[number])

    spec = _exported_spec(checkpoint, reference.path, ("torch", "onnx", "onnxscript"))
    spec = replace(
        spec,
        input=replace(spec.input, form=form),
        normalized_output=graph.normalize_output,
        tools={**spec.tools, "opset": str(graph.opset)},
    )
    step(1)
    network = inference_network(checkpoint.network(), spec.input, graph.normalize_output)
    model = unreduced = onnx_graph(network, spec, graph.opset)
    if precision:
        spec = replace(spec, tools={**spec.tools, "onnxruntime": onnxruntime_version})
        made = reduced(model, spec, precision, _judging_data(reference.path), report, made)
        model, spec = made.model, made.spec
    metadata = {MANIFEST_KEY: graph_manifest(model, unreduced)}
    content = finished(model, spec, graph.static_batch, metadata).SerializeToString()
    with written_whole(out) as temporary:  # nothing else in here: it takes every failure of a file for one of `out`
        temporary.write_bytes(content)
        step(2)
        candidate = OnnxEmbedder(temporary, "cpu")
        images = made.images if made and made.images is not None else _random_images(spec.input)
        closeness = _check(reference, candidate, images, out)
    step(3)
    exported = Exported(
        out,
        spec,
        out.stat().st_size,
        *closeness,
        layers=made.layers if made else [],
        warnings=made.warnings if made else [],
    )
    return exported, made


def export_safetensors(checkpoint_path: Path, out: Path) -> Exported:
    """Write a checkpoint's weights without classifiers, its spec in the file's metadata, as safetensors.

    Raises:
        ModelError: the checkpoint is missing, truncated or not ours.
        OutputError: `out` cannot be written.
    """
    _check_name(out, ".safetensors")
    checkpoint = load_checkpoint(checkpoint_path)
    spec = _exported_spec(checkpoint, checkpoint_path, ("torch", "safetensors"))
    weights = {name: tensor for name, tensor in checkpoint.weights.items() if CLASSIFIER not in name}
    with written_whole(out) as temporary:
        temporary.write_bytes(save(weights, metadata={METADATA_KEY: spec.to_json()}))
    return Exported(out, spec, out.stat().st_size, departure=0.0)


def _judging_data(checkpoint_path: Path) -> ReidDataset | None:
    """The data set of the checkpoint's run, whose query and gallery `pmm bench` judges with."""
    try:
        return read(*data_of(checkpoint_path))
    except DataError:
        return None  # there is no run, or its data set is gone or another now: nothing here can judge with it


def _check_name(out: Path, suffix: str) -> None:
    if out.suffix != suffix:
        raise PmmError(
            f"{out} does not end in {suffix}", f"Name it {out.with_suffix(suffix)}: loading goes by the name"
        )


def _exported_spec(checkpoint: Checkpoint, path: Path, tools: tuple[str, ...]) -> ModelSpec:
    versions = {"pmm-edge": __version__} | {tool: version(tool) for tool in tools}
    return replace(checkpoint.spec, checkpoint_sha256=sha256(path), precision="fp32", tools=versions)


def _random_images(size: InputSpec) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (4, size.height, size.width, 3), dtype=np.uint8)


def _check(reference: Embedder, candidate: Embedder, images: Pixels, out: Path) -> tuple[float, float, float]:
    """An export beside its checkpoint, at a batch of one and of several: largest difference, cosine mean and min.

    Raises:
        CheckFailedError: it departs too far, or the checkpoint gives NaN.
    """
    expected = reference.embed(images)
    if not np.isfinite(expected).all():
        raise CheckFailedError(f"{reference.path} gives NaN or infinity", "Train again, at a lower learning rate")
    if candidate.spec.normalized_output:
        expected = unit_length(expected)
    actual = np.concatenate([candidate.embed(images[:1]), candidate.embed(images[1:])])
    departures = np.abs(actual - expected).max(axis=1) / (float(np.abs(expected).max()) or 1.0)
    departure, cosine, precision = float(departures.max()), cosines(expected, actual), candidate.spec.precision
    if precision in LEAST_COSINE:
        least, kind = (cosine.min(), "least") if precision == "fp16" else (cosine.mean(), "mean")
        if least < LEAST_COSINE[precision]:
            raise CheckFailedError(
                f"{out} was not written: in {precision} the {kind} cosine of its embeddings to those of"
                f" {reference.path} is {least:.4f}, {LEAST_COSINE[precision]:g} is wanted",
                "Export FP32" if precision == "fp16" else "Is the calibration data like the training data?",
            )
    elif not departure <= TOLERANCE:  # so that NaN fails as well
        batch = 1 if not departures[0] <= TOLERANCE else len(images) - 1
        raise CheckFailedError(
            f"{out} was not written: at batch {batch} its embeddings depart from those of {reference.path}"
            f" by {departure:.2g} of the largest value, {TOLERANCE:g} is allowed",
            "Another version of torch or onnxscript may export it rightly",
        )
    return departure, float(cosine.mean()), float(cosine.min())


@dataclass(frozen=True)
class Asked:
    """The options of `pmm export` that decide what is written; None where one was not given."""

    source: Path
    """A checkpoint, or a .onnx that was exported before."""
    out: Path | None = None
    form: InputForm | None = None
    graph: Graph = field(default_factory=Graph)
    precision: Precision | None = None
    safetensors: bool = False
    settings: BuildSettings | None = None
    """Of an engine, but for its batches; None for no engine."""
    batch: str | None = None
    """The engine's, as typed."""
    deepstream: Path | None = None
    triton: Path | None = None
    """The model repository."""
    triton_name: str | None = None


@dataclass(frozen=True)
class PlannedEngine:
    """An engine, and the file that it is built from."""

    onnx: Path
    path: Path
    settings: BuildSettings
    served: bool
    """Triton is to serve it."""
    also: tuple[str, ...] = ()
    """What belongs to the command that builds it on another machine."""


@dataclass(frozen=True)
class Plan:
    """All that is written."""

    onnx: dict[InputForm, Path]
    """A file for each input form that something needs, the one that was asked for first."""
    to_export: bool
    """The files are still to be made, from a checkpoint."""
    safetensors: Path | None
    """The weights beside the first file."""
    engines: tuple[PlannedEngine, ...]
    deepstream: Path | None
    triton: Path | None
    """The model's folder in the repository."""


def planned(asked: Asked) -> Plan:
    """Decide what is written.

    Raises:
        ModelError: the source cannot be used, or what it gives is nothing that TensorRT, DeepStream or Triton take.
        OutputError: a file cannot be written where it is meant to be, or a bundle's folder has something in it.
        PmmError: options that contradict each other, or torch is missing where a checkpoint is read.
    """
    consumed = asked.settings or asked.deepstream or asked.triton
    if consumed and asked.source.suffix == ".onnx":
        return _of_exported(asked)
    form = asked.form or "uint8"
    forms = [form]
    forms += ["raw"] if asked.deepstream and "raw" not in forms else []
    forms += ["uint8"] if asked.triton and "uint8" not in forms else []
    onnx = {form: _name(asked, form, main=number == 0) for number, form in enumerate(forms)}
    if not consumed:
        plan = Plan(onnx, True, _safetensors(asked, onnx), (), None, None)
        _check_places(plan)
        return plan
    settings = _settings(asked, asked.graph.static_batch)
    return _checked(asked, onnx, settings, _spec_to_be(asked), asked.graph.static_batch)


def _of_exported(asked: Asked) -> Plan:
    """The plan for a file whose graph is what it is."""
    if asked.safetensors:
        raise PmmError(f"{asked.source} has no weights for --safetensors", "Name the checkpoint it was exported from")
    network = OnnxEmbedder(asked.source, "cpu")
    form = network.spec.input.form
    if asked.precision or asked.graph != Graph() or asked.form not in (None, form):
        raise PmmError(
            f"{asked.source} is exported already: its graph, input ({form}) and precision stay as they are",
            "Name the checkpoint it was exported from",
        )
    if asked.out and (not asked.settings or asked.out.suffix != ".engine"):
        raise PmmError(
            f"nothing would be written to {asked.out}: {asked.source} is exported already",
            "Leave --out out, or name an .engine with --trt",
        )
    static = network.profile.maximum if network.profile else None
    return _checked(asked, {form: asked.source}, _settings(asked, static), network.spec, static)


def _settings(asked: Asked, static: int | None) -> BuildSettings | None:
    return asked.settings and replace(asked.settings, batch=BatchProfile.chosen(asked.batch, static))


def _checked(
    asked: Asked,
    onnx: dict[InputForm, Path],
    settings: BuildSettings | None,
    spec: ModelSpec,
    static: int | None,
) -> Plan:
    """The plan for these files, held against what engines and bundles take.

    Args:
        asked: what it is for.
        onnx: of each input form its file; the first is what was asked for.
        settings: of an engine; None for no engine.
        spec: of the first file.
        static: the only batch size that the graph takes; None for any.
    """
    path = next(iter(onnx.values()))

    def of_form(wanted: InputForm) -> tuple[ModelSpec, int | None, Path]:
        if wanted not in onnx:
            return spec, static, path
        return replace(spec, input=replace(spec.input, form=wanted)), static, onnx[wanted]

    if settings or asked.deepstream:
        check_quantised_for_tensorrt(spec, path)
    if asked.deepstream:
        check_feeding(*of_form(deepstream.FORM), deepstream.FORM)
    model_folder = None
    if asked.triton:
        check_feeding(*of_form(triton.FORM), triton.FORM)
        if settings:
            triton.check_least_batch(settings.batch)
        name = asked.triton_name or triton.model_name(spec, settings is not None)
        model_folder = asked.triton / triton.checked_name(name)
    engines = _engines(asked, onnx, settings) if settings else ()
    plan = Plan(onnx, asked.source != path, _safetensors(asked, onnx), engines, asked.deepstream, model_folder)
    try:
        _check_places(plan)
    except OutputError as error:
        if plan.to_export or not plan.engines:
            raise
        _tell_what_is_missing(plan.engines[0], spec, error)
        raise
    return plan


def _safetensors(asked: Asked, onnx: dict[InputForm, Path]) -> Path | None:
    return next(iter(onnx.values())).with_suffix(".safetensors") if asked.safetensors else None


def _check_places(plan: Plan) -> None:
    """Refuse what could not be written in the end.

    Raises:
        OutputError: a file's folder cannot be written, or a bundle's has something in it.
    """
    files = [*plan.onnx.values()] if plan.to_export else []
    files += [plan.safetensors] if plan.safetensors else []
    for path in (*files, *(engine.path for engine in plan.engines)):
        check_place(path)
    if plan.deepstream:
        check_new_folder(plan.deepstream)
    if plan.triton:
        check_new_folder(plan.triton, triton.TAKEN)


def _engines(asked: Asked, onnx: dict[InputForm, Path], settings: BuildSettings) -> tuple[PlannedEngine, ...]:
    """The engine of the file that was asked for, and the one that Triton serves where that is another."""
    also: tuple[str, ...] = ()
    if asked.triton:
        also = ("--triton", str(asked.triton), *(("--triton-name", asked.triton_name) if asked.triton_name else ()))
    main = next(iter(onnx))
    engines = []
    for form in dict.fromkeys((main, triton.FORM) if asked.triton else (main,)):
        named = asked.out if asked.out and asked.out.suffix == ".engine" else onnx[form]
        served = asked.triton is not None and form == triton.FORM
        engines.append(
            PlannedEngine(onnx[form], named.with_suffix(".engine"), settings, served, also if served else ())
        )
    return tuple(engines)


def _tell_what_is_missing(engine: PlannedEngine, spec: ModelSpec, refused: OutputError) -> None:
    """Where no engine can be built here either, say so together with what was refused.

    Raises:
        OutputError: that.
    """
    try:
        _, cuda = what_builds(engine.onnx, engine.path, spec, engine.settings, engine.also)
    except NotOnThisMachineError as missing:
        raise OutputError(f"{refused.problem}; {missing.problem}", f"{refused.remedy}. {missing.remedy}") from missing
    cuda.release()


def _spec_to_be(asked: Asked) -> ModelSpec:
    """The spec of the first export, as far as anything is decided by it."""
    try:
        from pmm_edge.model import load_checkpoint
    except ModuleNotFoundError as error:
        raise without(error) from error
    spec = load_checkpoint(asked.source).spec
    spec = replace(spec, input=replace(spec.input, form=asked.form or "uint8"))
    if isinstance(asked.precision, Int8):
        return replace(spec, precision="int8", quantization=Quantization(asked.precision.target, "minmax", 0))
    return replace(spec, precision="fp16" if asked.precision else "fp32")


def without(missing: ModuleNotFoundError) -> PmmError:
    """What to say where a checkpoint is to be exported, and a package that it takes is not there."""
    return PmmError(
        f"exporting needs {missing.name}, which is not installed",
        "pip install 'pmm-edge[train]'; an engine from a .onnx needs none of it: pmm export model.onnx --trt",
    )


def _name(asked: Asked, form: InputForm, main: bool) -> Path:
    """Where the export with this input form goes."""
    if asked.out:
        return asked.out if main else asked.out.with_name(f"{asked.out.stem}-{form}.onnx")
    parts: Sequence[str] = ["model"] if form == "uint8" else ["model", form]
    if asked.precision:
        precision = "fp16" if isinstance(asked.precision, Fp16) else f"int8-{asked.precision.target}"
        parts = [*parts, precision]
    return asked.source.parent / EXPORT_FOLDER / ("-".join(parts) + ".onnx")


@dataclass(frozen=True)
class Made:
    """What there is now."""

    exported: list[Exported]
    engine: BuiltEngine | None
    """Of the input form that was asked for."""
    served_engine: BuiltEngine | None
    """What Triton serves, where that is another."""
    bundles: list[Bundle]
    failures: list[PmmError]
    """Why engines and bundles are missing. The networks are there all the same."""


def carry_out(asked: Asked, plan: Plan, report: Report = silent) -> Made:
    """Write what was planned. An engine or a bundle that fails does not keep the others from being written.

    Raises:
        ModelError, DataError, OutputError, CheckFailedError: a network cannot be exported; see `export_onnx`.
        PmmError: a package that exporting takes is missing.
    """
    exported = _export(asked, plan, report) if plan.to_export else []
    engines: list[BuiltEngine | None] = []
    bundles: list[Bundle] = []
    failures: list[PmmError] = []
    for engine in plan.engines:
        try:
            engines.append(build_engine(engine.onnx, engine.path, engine.settings, report, engine.also))
        except PmmError as failure:
            failures.append(failure)
            engines.append(None)
    to_write: list[Callable[[], Bundle]] = []
    if plan.deepstream:
        to_write.append(partial(deepstream_bundle, plan.onnx["raw"], plan.deepstream))
    served = next((built for engine, built in zip(plan.engines, engines, strict=True) if engine.served), None)
    if plan.triton and (served or not plan.engines):
        path = served.path if served else None
        to_write.append(partial(triton_bundle, plan.onnx["uint8"], plan.triton.parent, path, plan.triton.name))
    for write in to_write:
        try:
            bundles.append(write())
        except PmmError as failure:
            failures.append(failure)
    main, other = (*engines, None, None)[:2]
    return Made(exported, main, other, bundles, failures)


def _export(asked: Asked, plan: Plan, report: Report) -> list[Exported]:
    """Write the file of each input form, and the weights beside the first."""
    try:
        from pmm_edge.export.exporter import export_forms, export_safetensors
    except ModuleNotFoundError as error:
        raise without(error) from error

    exported = export_forms(asked.source, plan.onnx, asked.graph, asked.precision, report)
    if plan.safetensors:
        exported.insert(1, export_safetensors(asked.source, plan.safetensors))
    return exported
