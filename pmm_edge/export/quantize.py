"""A network in FP16: every weight and every value between its nodes is float16, its input and output stay float32."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.transformers.float16 import convert_float_to_float16

from pmm_edge.console import Report, silent
from pmm_edge.data.dataset import ReidDataset, problems
from pmm_edge.errors import CheckFailedError
from pmm_edge.export.calibration import METHODS, Ranges, read_calibration, value_ranges
from pmm_edge.export.graph import Parts, finished, layers_of, multiply_adds, parts_of, row_preprocessing
from pmm_edge.export.options import Fp16, Int8, Precision, Target
from pmm_edge.files import temporary_folder
from pmm_edge.images import Pixels
from pmm_edge.retrieval import evaluate
from pmm_edge.retrieval.distances import cosines
from pmm_edge.retrieval.metrics import JUNK_PID
from pmm_edge.runtime import Embedder, embed_files
from pmm_edge.runtime.onnx_backend import OnnxEmbedder
from pmm_edge.spec import FLOAT16_MAX, ModelSpec, Quantization


def cast_to_fp16(network: onnx.ModelProto) -> onnx.ModelProto:
    """Cast a network to float16; the one given is left as it is.

    Raises:
        CheckFailedError: a weight is larger than float16 holds.
    """
    for tensor in network.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            _check(tensor.name, float(np.abs(numpy_helper.to_array(tensor)).max(initial=0)), "weight")
    copy = onnx.ModelProto()
    copy.CopyFrom(network)
    return convert_float_to_float16(copy, keep_io_types=True, op_block_list=[])


def check_range(ranges: Ranges, network: onnx.ModelProto) -> float:
    """The largest value between the nodes of a float32 network, that float16 must hold.

    Raises:
        CheckFailedError: it is larger than float16 holds; the first node that gives such a value is named.
    """
    largest = 0.0
    for node in network.graph.node:
        for output in node.output:
            if output in ranges:
                size = max(map(abs, ranges[output]))
                _check(f"{node.name} ({node.op_type})", size, "value")
                largest = max(largest, size)
    return largest


def _check(name: str, size: float, what: str) -> None:
    if not size <= FLOAT16_MAX:
        raise CheckFailedError(
            f"{name} has a {what} of {size:.4g}, float16 holds {FLOAT16_MAX:.0f}",
            "Export FP32 or INT8, or train with more weight decay",
        )


_LAYERS = ["Conv", "Gemm"]
_OPERATORS = {"tensorrt": _LAYERS, "cpu": [*_LAYERS, "Add", "MaxPool", "Relu"]}
_ACTIVATIONS = {"tensorrt": QuantType.QInt8, "cpu": QuantType.QUInt8}
_OPTIONS: dict[str, dict[str, Any]] = {
    "tensorrt": {
        "ActivationSymmetric": True,
        "QuantizeBias": False,
        "OpTypesToExcludeOutputQuantization": _LAYERS,
    },
    "cpu": {"OpTypesToExcludeOutputQuantization": ["Gemm"]},
}


def calibrated_operators(target: Target) -> list[str]:
    """Those whose inputs and outputs `quantize` needs the ranges of."""
    return sorted({*_OPERATORS[target], "Add"})


def quantize(
    network: onnx.ModelProto,
    ranges: Ranges,
    target: Target,
    in_float: Collection[str] = (),
    only: Collection[str] = (),
) -> onnx.ModelProto:
    """Put a network in INT8; the one given is left as it is.

    Args:
        network: from normalised images to embeddings (`Parts.network`).
        ranges: of its values (`value_ranges`), calibrated for `target`.
        in_float: names of the layers that stay in float32, and with them what follows them up to the next layer.
        only: names of the only nodes to quantise; empty for all.
    """
    copy = onnx.shape_inference.infer_shapes(network)
    quantizer = QDQQuantizer(
        copy,
        True,  # a scale for each channel of the weights
        False,  # all 8 bits
        QuantType.QInt8,
        _ACTIVATIONS[target],
        TensorsData(
            CalibrationMethod.MinMax, {name: (np.float32(a), np.float32(b)) for name, (a, b) in ranges.items()}
        ),
        list(only),
        [*in_float, *_followers(copy, in_float)],
        _OPERATORS[target],
        {"WeightSymmetric": True, **_OPTIONS[target]},
    )
    if target == "tensorrt":
        for tensor in _skipping_branches(copy, in_float, only):
            quantizer.quantize_activation_tensor(tensor)
    before = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it warns of biases and of ranges that need no action
    try:
        return quantizer.quantize_model()
    finally:
        logging.root.setLevel(before)


def _followers(network: onnx.ModelProto, in_float: Collection[str]) -> list[str]:
    """The nodes between layers whose values come from a layer in float32: in INT8 they would undo what it is there for.

    An addition follows its convolutions alone. Through the branch that skips it would pass float32 on to all blocks
    behind it.
    """
    maker = {name: node for node in network.graph.node for name in node.output}
    followers: list[str] = []
    for node in network.graph.node:  # each behind what makes its inputs
        if node.op_type in _LAYERS:
            continue
        makers = [maker[name] for name in node.input if name in maker]
        if node.op_type == "Add":
            makers = [made for made in makers if made.op_type in _LAYERS]
        if any(made.name in in_float or made.name in followers for made in makers):
            followers.append(node.name)
    return followers


def _skipping_branches(network: onnx.ModelProto, in_float: Collection[str], only: Collection[str]) -> Iterator[str]:
    """Of each residual addition that follows an INT8 convolution, the input that is not that convolution's output."""
    nodes = network.graph.node
    uses = Counter(name for node in nodes for name in node.input)
    maker = {name: node for node in nodes for name in node.output}
    for node in nodes:
        if node.op_type != "Add":
            continue
        for main, skip in (node.input, reversed(node.input)):
            conv = maker.get(main)
            if conv is None or conv.op_type != "Conv" or uses[main] != 1:
                continue
            if conv.name not in in_float and (not only or conv.name in only):
                yield skip
            break


@dataclass(frozen=True)
class LayerLoss:
    """One layer, and what it means to quantise it."""

    layer: str
    loss: float
    """1 - mean cosine of the embeddings, with this layer alone in INT8."""
    cost: float
    """Its share of the network's multiply-adds, 0..1: what staying in float32 costs."""
    in_float: bool
    """Whether it stays in float32."""


@dataclass(frozen=True, eq=False)
class Held:
    """A network that holds its mAP."""

    network: onnx.ModelProto
    layers: list[LayerLoss]
    """Those that lose most first; empty where all layers could be quantised."""


def hold_map(
    names: Mapping[str, str],
    costs: Mapping[str, int],
    requantize: Callable[[Collection[str], Collection[str]], onnx.ModelProto],
    loss: Callable[[onnx.ModelProto], float],
    mean_ap: Callable[[onnx.ModelProto], float],
    unreduced: onnx.ModelProto,
    max_drop: float,
    report: Report = silent,
) -> Held:
    """Quantise as many layers as hold the mAP.

    The number of layers in float32 is doubled until mAP holds, then halved in on: about 2 log2 of the number of
    layers evaluations, not one for each layer.

    Args:
        names: of the layers, by node.
        costs: multiply-adds, by node.
        requantize: (nodes that stay in float32, the only nodes to quantise or none for all) -> a network.
        loss: of a network, on the crops that choose.
        mean_ap: of a network, in 0..1.
        unreduced: the network in float32.
        max_drop: in points of 100.

    Raises:
        CheckFailedError: mAP drops by more with every layer in float32 but one.
    """
    base = mean_ap(unreduced)
    tried: dict[int, tuple[onnx.ModelProto, float]] = {}
    order: list[str] = []

    def holds(count: int) -> bool:
        network = requantize(order[:count], ())
        tried[count] = network, 100 * (base - mean_ap(network))
        return tried[count][1] <= max_drop

    losses: dict[str, float] = {}
    least = 0
    if not holds(0):
        for number, node in enumerate(names):
            report("sensitivity", number, len(names), names[node])
            losses[node] = loss(requantize((), (node,)))
        report("sensitivity", len(names), len(names))
        order = sorted(losses, key=lambda node: -losses[node])
        least = _least(holds, len(order) - 1)
    network, _ = tried[least]
    total = sum(costs.values())
    layers = [
        LayerLoss(names[node], losses[node], costs[node] / total, number < least) for number, node in enumerate(order)
    ]
    return Held(network, layers)


def mean_average_precision(embedder: Embedder, dataset: ReidDataset, report: Report = silent) -> float:
    """The mAP, 0..1, on a data set's query and gallery.

    Raises:
        DataError: the splits cannot judge a network, or an image cannot be read.
    """
    for problem in problems(dataset):
        raise problem
    query, gallery, count = dataset.query, dataset.gallery, len(dataset.query)
    kept = np.flatnonzero(gallery.pids != JUNK_PID)  # junk counts for nothing: it is not embedded either
    embeddings = embed_files(
        embedder, [*query.paths, *(gallery.paths[index] for index in kept)], report=report
    ).embeddings
    pids, camids = gallery.pids[kept], gallery.camids[kept]
    return evaluate(embeddings[:count], embeddings[count:], query.pids, pids, query.camids, camids).mAP


def _least(holds: Callable[[int], bool], most: int) -> int:
    """The least number, 1 to `most`, that holds, if more never hold less."""
    failed, number = 0, 1
    while not holds(number):
        if number >= most:
            raise CheckFailedError(
                f"mAP drops by more than allowed even with {number} layers in float32", "Allow a larger --max-map-drop"
            )
        failed, number = number, min(2 * number, most)
    while number - failed > 1:
        middle = (failed + number) // 2
        if holds(middle):
            number = middle
        else:
            failed = middle
    return number


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
        spec = replace(spec, precision=reached.precision, quantization=reached.quantization)
        return replace(made, model=finished(parts.around_other(made.network), spec), spec=spec)
    if isinstance(precision, Fp16):
        return _fp16(model, spec, precision, judged_on, report)
    return _int8(model, spec, precision, judged_on, report)


def _fp16(
    model: onnx.ModelProto, spec: ModelSpec, precision: Fp16, judged_on: ReidDataset | None, report: Report
) -> Reduced:
    parts, images = _parts(model, spec, precision), None
    warnings = [
        f"nothing was checked on images, for there is no data set: a value above {FLOAT16_MAX:.0f} would become"
        " infinite in float16. Name a data set with --calibration"
    ]
    network = cast_to_fp16(parts.network)
    if precision.calibration:
        calibration = read_calibration(precision.calibration, spec.input, precision.layout, judged_on)
        images, warnings = calibration.everything, calibration.warnings
        ranges = value_ranges(parts.network, images, spec.input, report=report)
        check_range(ranges, parts.network)
    spec = replace(spec, precision="fp16")
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
    kept = tuple(layer.layer for layer in layers if layer.in_float)
    how = Quantization(target, method, len(calibration.crops), calibration.dataset.name, kept)
    spec = replace(spec, precision="int8", quantization=how)
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
