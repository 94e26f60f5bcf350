"""What one `pmm export` will write: decided, and held against all that can be known, before anything is begun.

An export with a sensitivity search and an engine take minutes; what would be refused behind them is refused here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pmm_edge.errors import OutputError, PmmError
from pmm_edge.export.bundles import deepstream, triton
from pmm_edge.export.bundles.bundle import check_feeding
from pmm_edge.export.options import Fp16, Graph, Int8, Precision
from pmm_edge.export.tensorrt.builder import check_quantised_for_tensorrt, what_builds
from pmm_edge.files import check_new_folder, check_place
from pmm_edge.runs import EXPORT_FOLDER
from pmm_edge.runtime.build_settings import BatchProfile, BuildSettings
from pmm_edge.runtime.cuda import NotOnThisMachineError
from pmm_edge.runtime.onnx_backend import OnnxEmbedder
from pmm_edge.spec import InputForm, ModelSpec


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
        return replace(spec, precision="int8", target=asked.precision.target)
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
