"""Export a checkpoint: strip, write, and run what was written before it gets its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from onnxruntime import __version__ as onnxruntime_version
from safetensors.torch import save

from pmm_edge import __version__
from pmm_edge.data.dataset import ReidDataset, read
from pmm_edge.errors import CheckFailedError, DataError, PmmError
from pmm_edge.export.manifest import METADATA_KEY as MANIFEST_KEY
from pmm_edge.export.manifest import graph_manifest
from pmm_edge.export.onnx_graph import finished, onnx_graph
from pmm_edge.export.options import Graph, Precision
from pmm_edge.export.precision import Reduced, reduced
from pmm_edge.export.sensitivity import LayerLoss
from pmm_edge.export.strip import inference_network
from pmm_edge.files import check_place, sha256, written_whole
from pmm_edge.model import Checkpoint, load_checkpoint
from pmm_edge.progress import Report, silent
from pmm_edge.retrieval.distances import cosines, unit_length
from pmm_edge.runs import data_of
from pmm_edge.runtime.crops import Pixels
from pmm_edge.runtime.embedder import Embedder
from pmm_edge.runtime.onnx_backend import OnnxEmbedder
from pmm_edge.runtime.torch_backend import CLASSIFIER, TorchEmbedder
from pmm_edge.spec import METADATA_KEY, InputForm, InputSpec, ModelSpec

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
