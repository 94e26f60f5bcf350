"""From an FP32 graph to FP16 or INT8: made with real crops, judged with others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import onnx

from pmm_edge.data.dataset import ReidDataset
from pmm_edge.export.calibration import METHODS, read_calibration, value_ranges
from pmm_edge.export.fp16 import cast_to_fp16, check_range
from pmm_edge.export.int8 import calibrated_operators, quantize
from pmm_edge.export.onnx_graph import finished
from pmm_edge.export.options import Fp16, Int8, Precision
from pmm_edge.export.parts import Parts, layers_of, multiply_adds, parts_of
from pmm_edge.export.rows import row_preprocessing
from pmm_edge.export.sensitivity import LayerLoss, hold_map, mean_average_precision
from pmm_edge.files import temporary_folder
from pmm_edge.progress import Report, silent
from pmm_edge.retrieval.distances import cosines
from pmm_edge.runtime.crops import Pixels
from pmm_edge.runtime.onnx_backend import OnnxEmbedder
from pmm_edge.spec import FLOAT16_MAX, ModelSpec

Open = Callable[[onnx.ModelProto], OnnxEmbedder]
"""Loads a network part, with what belongs around it."""


@dataclass(frozen=True, eq=False)
class Reduced:
    """A model in a lower precision."""

    model: onnx.ModelProto
    network: onnx.ModelProto
    """Its part between preprocessing and normalisation, the only one in the lower precision (`Parts.network`)."""
    spec: ModelSpec
    """With `precision` and how it was reached."""
    images: Pixels | None
    """Crops that nothing was tuned on, to judge it with; None where there was no data set."""
    layers: list[LayerLoss]
    """Of a sensitivity search; empty where none was needed."""
    warnings: list[str]


def reduced(
    model: onnx.ModelProto,
    spec: ModelSpec,
    precision: Precision,
    judged_on: ReidDataset | None = None,
    report: Report = silent,
    made: Reduced | None = None,
) -> Reduced:
    """Put a model of `onnx_graph` in a lower precision; the one given is left as it is.

    Args:
        model: in float32.
        spec: of it.
        precision: which, and how.
        judged_on: the data set that will judge it; calibration images that are in its query or gallery are told.
        made: what this gave for the same network with another input form: its network is taken, nothing calibrated.

    Raises:
        DataError: the calibration data cannot be used.
        CheckFailedError: a value is larger than float16 holds; no choice of layers holds the mAP that was asked for.
    """
    if made:
        parts = _parts(model, spec, precision)
        reached = made.spec
        spec = replace(
            spec, precision=reached.precision, precision_method=reached.precision_method, target=reached.target
        )
        return replace(made, model=finished(parts.around_other(made.network), spec), spec=spec)
    if isinstance(precision, Fp16):
        return _fp16(model, spec, precision, judged_on, report)
    return _int8(model, spec, precision, judged_on, report)


def _fp16(
    model: onnx.ModelProto, spec: ModelSpec, precision: Fp16, judged_on: ReidDataset | None, report: Report
) -> Reduced:
    parts, checked, images = _parts(model, spec, precision), "values not checked on images", None
    warnings = [
        f"nothing was checked on images, for there is no data set: a value above {FLOAT16_MAX:.0f} would become"
        " infinite in float16. Name a data set with --calibration"
    ]
    network = cast_to_fp16(parts.network)
    if precision.calibration:
        calibration = read_calibration(precision.calibration, spec.input, precision.layout, judged_on)
        images, warnings = calibration.everything, calibration.warnings
        ranges = value_ranges(parts.network, images, spec.input, report=report)
        largest = check_range(ranges, parts.network)
        checked = (
            f"largest value {largest:.4g} of {FLOAT16_MAX:.0f} on {len(images)} crops of {calibration.dataset.name}"
        )
    spec = replace(spec, precision="fp16", precision_method=f"weights and values cast to float16; {checked}")
    return Reduced(finished(parts.around(network), spec), network, spec, images, [], warnings)


def _int8(
    model: onnx.ModelProto, spec: ModelSpec, precision: Int8, judged_on: ReidDataset | None, report: Report
) -> Reduced:
    parts, target = _parts(model, spec, precision), precision.target
    calibration = read_calibration(precision.calibration, spec.input, precision.layout, judged_on)
    layers: list[LayerLoss] = []
    with _opener(parts, spec) as opened:
        reference = opened(parts.network).embed(calibration.choosing)

        def loss(network: onnx.ModelProto) -> float:
            return float(1 - cosines(opened(network).embed(calibration.choosing), reference).mean())

        operators, symmetric = calibrated_operators(target), target == "tensorrt"
        tried = []
        for method in (precision.method,) if precision.method else METHODS:
            ranges = value_ranges(
                parts.network, calibration.crops, spec.input, method, symmetric, operators, report=report
            )
            network = quantize(parts.network, ranges, target)
            lost = 0.0 if precision.method else loss(network)  # nothing is to be chosen
            tried.append((lost, method, ranges, network))
        _, method, ranges, network = min(tried, key=lambda candidate: candidate[0])
        notes = [
            f"Q/DQ for {target}",
            f"{method} calibration on {len(calibration.crops)} crops of {calibration.dataset.name}",
        ]
        if precision.max_map_drop is not None:
            held = hold_map(
                names=layers_of(parts.network),
                costs=multiply_adds(parts.network),
                requantize=lambda in_float, only: quantize(parts.network, ranges, target, in_float, only),
                loss=loss,
                mean_ap=lambda net: mean_average_precision(opened(net), calibration.dataset, report),
                unreduced=parts.network,
                max_drop=precision.max_map_drop,
                report=report,
            )
            network, layers = held.network, held.layers
            notes.append(held.outcome)
        judged = cosines(opened(network).embed(calibration.judging), opened(parts.network).embed(calibration.judging))
        notes.append(f"mean cosine {judged.mean():.5f} on {len(judged)} crops that nothing was chosen on")
    spec = replace(spec, precision="int8", precision_method="; ".join(notes), target=target)
    finished_model = finished(parts.around(network), spec)
    return Reduced(finished_model, network, spec, calibration.judging, layers, calibration.warnings)


def _parts(model: onnx.ModelProto, spec: ModelSpec, precision: Precision) -> Parts:
    """A model's parts, with the preprocessing that suits the precision."""
    parts = parts_of(model)
    rows = isinstance(precision, Int8) and precision.target == "cpu" and spec.input.form == "uint8"
    return replace(parts, before=row_preprocessing(parts.before, spec.input)) if rows and parts.before else parts


@contextmanager
def _opener(parts: Parts, spec: ModelSpec) -> Iterator[Open]:
    with temporary_folder() as folder:
        path = folder / "candidate.onnx"

        def opened(network: onnx.ModelProto) -> OnnxEmbedder:
            path.write_bytes(finished(parts.around(network), spec).SerializeToString())
            return OnnxEmbedder(path, "cpu")

        yield opened
