"""From an FP32 graph to FP16 or INT8: made with real crops, judged with others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from numpy.typing import NDArray

from pmm_edge.export.calibration import METHODS, read_calibration, value_ranges
from pmm_edge.export.fp16 import LARGEST, cast_to_fp16, check_range
from pmm_edge.export.int8 import calibrated_operators, quantize
from pmm_edge.export.onnx_graph import finished
from pmm_edge.export.options import Fp16, Int8, Precision
from pmm_edge.export.parts import Parts, layers_of, multiply_adds, parts_of
from pmm_edge.export.sensitivity import LayerLoss, hold_map, mean_average_precision
from pmm_edge.progress import Report, silent
from pmm_edge.runtime.crops import Pixels
from pmm_edge.runtime.embedder import Embeddings
from pmm_edge.runtime.onnx_backend import OnnxEmbedder
from pmm_edge.spec import ModelSpec

Open = Callable[[onnx.ModelProto], OnnxEmbedder]
"""Loads a network part, with what belongs around it."""


@dataclass(frozen=True, eq=False)
class Reduced:
    """A model in a lower precision."""

    model: onnx.ModelProto
    spec: ModelSpec
    """With `precision` and how it was reached."""
    images: Pixels | None
    """Crops that nothing was tuned on, to judge it with; None where there was no data set."""
    layers: list[LayerLoss]
    """Of a sensitivity search; empty where none was needed."""
    warnings: list[str]


def reduced(model: onnx.ModelProto, spec: ModelSpec, precision: Precision, report: Report = silent) -> Reduced:
    """Put a model of `onnx_graph` in a lower precision; the one given is left as it is.

    Raises:
        DataError: the calibration data cannot be used.
        CheckFailedError: a value is larger than float16 holds; no choice of layers holds the mAP that was asked for.
    """
    if isinstance(precision, Fp16):
        return _fp16(model, spec, precision, report)
    return _int8(model, spec, precision, report)


def cosines(first: Embeddings, second: Embeddings) -> NDArray[np.float64]:
    """(N, D), (N, D) -> (N,); 0 where a row is all zeros or not finite."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    with np.errstate(all="ignore"):
        found = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return np.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0)


def _fp16(model: onnx.ModelProto, spec: ModelSpec, precision: Fp16, report: Report) -> Reduced:
    parts, checked, images, warnings = parts_of(model), "values not checked on images", None, []
    network = cast_to_fp16(parts.network)
    if precision.calibration:
        calibration = read_calibration(precision.calibration, spec.input)
        images, warnings = calibration.everything, calibration.warnings
        ranges = value_ranges(parts.network, images, spec.input, report=report)
        largest = check_range(ranges, parts.network)
        checked = f"largest value {largest:.4g} of {LARGEST:.0f} on {len(images)} crops of {calibration.dataset.name}"
    spec = replace(spec, precision="fp16", precision_method=f"weights and values cast to float16; {checked}")
    return Reduced(finished(parts.around(network), spec), spec, images, [], warnings)


def _int8(model: onnx.ModelProto, spec: ModelSpec, precision: Int8, report: Report) -> Reduced:
    parts, target = parts_of(model), precision.target
    calibration = read_calibration(precision.calibration, spec.input)
    layers: list[LayerLoss] = []
    with _opener(parts, spec) as opened:
        reference = opened(parts.network).embed(calibration.held_out)

        def loss(network: onnx.ModelProto) -> float:
            return float(1 - cosines(opened(network).embed(calibration.held_out), reference).mean())

        operators, symmetric = calibrated_operators(target), target == "tensorrt"
        tried = []
        for method in (precision.method,) if precision.method else METHODS:
            ranges = value_ranges(
                parts.network, calibration.crops, spec.input, method, symmetric, operators, report=report
            )
            network = quantize(parts.network, ranges, target)
            tried.append((loss(network), method, ranges, network))
        lost, method, ranges, network = min(tried, key=lambda candidate: candidate[0])
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
            network, layers, lost = held.network, held.layers, loss(held.network)
            notes.append(held.outcome)
        notes.append(f"mean cosine {1 - lost:.5f} on {len(calibration.held_out)} other crops")
    spec = replace(spec, precision="int8", precision_method="; ".join(notes))
    finished_model = finished(parts.around(network), spec)
    return Reduced(finished_model, spec, calibration.held_out, layers, calibration.warnings)


@contextmanager
def _opener(parts: Parts, spec: ModelSpec) -> Iterator[Open]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "candidate.onnx"

        def opened(network: onnx.ModelProto) -> OnnxEmbedder:
            path.write_bytes(finished(parts.around(network), spec).SerializeToString())
            return OnnxEmbedder(path, "cpu")

        yield opened
