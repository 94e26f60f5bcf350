"""Reduce a network's precision: cast it to FP16, or quantize it to INT8 with as many layers as mAP allows."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import CalibrationMethod as TensorsKind
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.transformers.float16 import convert_float_to_float16

from pmm_edge.console import Report, silent
from pmm_edge.data.dataset import ReidDataset, problems
from pmm_edge.errors import CheckFailedError
from pmm_edge.export.calibration import METHODS, Calibration, Ranges, value_ranges
from pmm_edge.export.graph import LAYERS, Parts, copy_model, finalize, layer_names, multiply_adds
from pmm_edge.files import temporary_folder
from pmm_edge.images import Pixels
from pmm_edge.retrieval.distances import cosines
from pmm_edge.runtime import Embedder, embed_files
from pmm_edge.runtime.embed_files import evaluate_dataset
from pmm_edge.runtime.onnx_backend import OnnxEmbedder
from pmm_edge.spec import FLOAT16_MAX, CalibrationMethod, InputSpec, ModelSpec, Quantization, QuantizationTarget


def cast_to_fp16(network: onnx.ModelProto) -> onnx.ModelProto:
    """Cast weights and values of a copy of a network to float16; input and output stay float32.

    Raises CheckFailedError for a weight that exceeds the range of float16.
    """
    for tensor in network.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            _check_fits_float16(tensor.name, float(np.abs(numpy_helper.to_array(tensor)).max(initial=0)))
    return convert_float_to_float16(copy_model(network), keep_io_types=True, op_block_list=[])


def largest_value(network: onnx.ModelProto, ranges: Ranges) -> float:
    """Return the largest absolute value between the nodes of a float32 network.

    Raises CheckFailedError, which names the node, for a value that exceeds the range of float16.
    """
    largest = 0.0
    for node in network.graph.node:
        for output in ranges.keys() & node.output:
            size = max(map(abs, ranges[output]))
            _check_fits_float16(f"{node.name} ({node.op_type})", size)
            largest = max(largest, size)
    return largest


def _check_fits_float16(name: str, size: float) -> None:
    if not size <= FLOAT16_MAX:
        raise CheckFailedError(
            f"{name} has a value of {size:.4g}, and the largest float16 is {FLOAT16_MAX:.0f}",
            "Export FP32 or INT8, or train with more weight decay",
        )


# TensorRT fuses the residual addition into the convolution and adds biases in float; ONNX Runtime has INT8 kernels for
# additions and pooling.
_OPERATORS = {"tensorrt": list(LAYERS), "cpu": [*LAYERS, "Add", "MaxPool", "Relu"]}
_ACTIVATIONS = {"tensorrt": QuantType.QInt8, "cpu": QuantType.QUInt8}
_OPTIONS: dict[str, dict[str, Any]] = {
    "tensorrt": {
        "ActivationSymmetric": True,
        "QuantizeBias": False,
        "OpTypesToExcludeOutputQuantization": list(LAYERS),
    },
    "cpu": {"OpTypesToExcludeOutputQuantization": ["Gemm"]},
}


def int8_ranges(
    network: onnx.ModelProto,
    crops: Pixels,
    spec: InputSpec,
    target: QuantizationTarget,
    method: CalibrationMethod,
    report: Report = silent,
) -> Ranges:
    """Measure the ranges that `quantize` needs for a target."""
    operators = sorted({*_OPERATORS[target], "Add"})
    return value_ranges(network, crops, spec, method, target == "tensorrt", operators, report)


def quantize(
    network: onnx.ModelProto,
    ranges: Ranges,
    target: QuantizationTarget,
    float_layers: Collection[str] = (),
    only: Collection[str] = (),
) -> onnx.ModelProto:
    """Insert explicit Q/DQ nodes for INT8 into a copy of `Parts.network`.

    Weights are symmetric int8 with one scale per output channel, see `round_weights`. Activations are symmetric int8
    for TensorRT and asymmetric uint8 for CPUs, which have a uint8 × int8 instruction.

    Layers whose nodes are in `float_layers` stay in float32, together with the operators between them and the next
    layer. `only` names the only nodes to quantize; empty for all.
    """
    copied = onnx.shape_inference.infer_shapes(network)
    layers = [node for node in copied.graph.node if node.op_type in LAYERS and node.name not in float_layers]
    weights = {node.input[1] for node in layers if not only or node.name in only}
    quantizer = QDQQuantizer(
        copied,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=_ACTIVATIONS[target],
        tensors_range=TensorsData(
            TensorsKind.MinMax, {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
        ),
        nodes_to_quantize=list(only),
        nodes_to_exclude=[*float_layers, *_followers(copied, float_layers)],
        op_types_to_quantize=_OPERATORS[target],
        extra_options={
            "WeightSymmetric": True,
            "TensorQuantOverrides": _round_layers(copied, weights, target),
            **_OPTIONS[target],
        },
    )
    if target == "tensorrt":
        for tensor in _shortcuts(copied, float_layers, only):
            quantizer.quantize_activation_tensor(tensor)
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it warns about biases and ranges that need no action
    try:
        return quantizer.quantize_model()
    finally:
        logging.root.setLevel(level)


def _round_layers(
    network: onnx.ModelProto, weights: set[str], target: QuantizationTarget
) -> dict[str, list[dict[str, Any]]]:
    """Round weights, in place, to whole multiples of their INT8 scales, and return these scales for the quantizer."""
    scales: dict[str, list[dict[str, Any]]] = {}
    for tensor in network.graph.initializer:
        if tensor.name in weights:
            values = numpy_helper.to_array(tensor)
            rounded, scale = round_weights(values, safe_pairs=target == "cpu")
            steps = scale.reshape(-1, *[1] * (values.ndim - 1))
            tensor.CopyFrom(numpy_helper.from_array(rounded.astype(np.float32) * steps, tensor.name))
            scales[tensor.name] = [{"scale": step, "zero_point": np.int8(0)} for step in scale]
            scales[tensor.name][0] |= {"quant_type": QuantType.QInt8, "axis": 0}
    return scales


def round_weights(weights: NDArray[np.float32], safe_pairs: bool) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantize weights with one scale per output channel, preserving each channel's sum.

    Activations after ReLU are positive, so rounding errors that do not cancel would shift a channel's output. The
    weights with the largest fractional parts are rounded up, as many as keep the sum (largest remainder method).

    With `safe_pairs`, two neighboring weights of a channel add up to at most 128. x86-64 processors without VNNI
    multiply uint8 by int8 with `vpmaddubsw`, which adds two products in saturating 16 bits: 255 × 128 fits, 255 × 254
    does not. ONNX Runtime pairs input channels; other engines may pair neighbors in the file's own layout.

    Takes (out, in, ...) float32; returns (out, in, ...) int8 and (out,) float32 scales.
    """
    rows = weights.reshape(len(weights), -1)
    largest = np.abs(rows).max(axis=1)
    for layout in (weights, np.moveaxis(weights, 1, -1)) if safe_pairs else ():
        flat = layout.reshape(len(weights), -1)
        pairs = np.pad(flat, ((0, 0), (0, rows.shape[1] % 2))).reshape(len(weights), -1, 2)
        largest = np.maximum(largest, np.abs(pairs.sum(axis=2)).max(axis=1))
    scale = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
    steps = rows / scale[:, None]
    below = np.floor(steps)
    fractions = steps - below
    rank = np.argsort(np.argsort(-fractions, axis=1, kind="stable"), axis=1)
    rounded = below + (rank < np.rint(fractions.sum(axis=1))[:, None])
    return np.clip(rounded, -127, 127).astype(np.int8).reshape(weights.shape), scale


def _followers(network: onnx.ModelProto, float_layers: Collection[str]) -> list[str]:
    """Find the nodes between layers whose values come from a float layer: INT8 there would undo its precision.

    An addition follows only its convolutions. Through the shortcut, float32 would spread to all following blocks.
    """
    producer = {name: node for node in network.graph.node for name in node.output}
    followers: list[str] = []
    for node in network.graph.node:  # in topological order
        if node.op_type in LAYERS:
            continue
        sources = [producer[name] for name in node.input if name in producer]
        if node.op_type == "Add":
            sources = [source for source in sources if source.op_type in LAYERS]
        if any(source.name in float_layers or source.name in followers for source in sources):
            followers.append(node.name)
    return followers


def _shortcuts(network: onnx.ModelProto, float_layers: Collection[str], only: Collection[str]) -> Iterator[str]:
    """Yield the shortcut of each residual addition after an INT8 convolution: TensorRT fuses them if it is INT8 too."""
    nodes = network.graph.node
    uses = Counter(name for node in nodes for name in node.input)
    producer = {name: node for node in nodes for name in node.output}
    for node in nodes:
        if node.op_type != "Add":
            continue
        for main, shortcut in (node.input, reversed(node.input)):
            conv = producer.get(main)
            if conv is None or conv.op_type != "Conv" or uses[main] != 1:
                continue
            if conv.name not in float_layers and (not only or conv.name in only):
                yield shortcut
            break


@dataclass(frozen=True)
class LayerSensitivity:
    """What quantizing one layer costs."""

    layer: str
    loss: float
    """1 - mean cosine of the embeddings to float32 with only this layer in INT8."""
    work: float
    """Share of the network's multiply-adds, 0..1."""
    float32: bool
    """Whether the layer stays in float32."""


@dataclass(frozen=True)
class SensitivitySearch:
    """Result of a search for the layers to keep in float32; mAP in 0..1."""

    map_float32: float
    map_int8: float
    """Of the exported network."""
    layers: list[LayerSensitivity]
    """Most sensitive first; empty if mAP holds with all layers in INT8."""


def search_float_layers(
    network: onnx.ModelProto,
    quantized: Callable[[Collection[str], Collection[str]], onnx.ModelProto],
    loss: Callable[[onnx.ModelProto], float],
    mean_ap: Callable[[onnx.ModelProto], float],
    max_drop: float,
    report: Report = silent,
) -> tuple[onnx.ModelProto, SensitivitySearch]:
    """Keep the fewest, most sensitive layers in float32 so that mAP drops by at most `max_drop` points of 100.

    Layers are ordered by their loss with only that layer in INT8. Their number is doubled until mAP holds, then
    bisected: about 2 log2(number of layers) evaluations of mAP. `quantized` takes the nodes that stay in float32 and
    the only nodes to quantize (none for all). Raises CheckFailedError if mAP drops by more with all layers but one in
    float32.
    """
    names, work = layer_names(network), multiply_adds(network)
    baseline = mean_ap(network)
    tried: dict[int, tuple[onnx.ModelProto, float]] = {}
    order: list[str] = []

    def holds(count: int) -> bool:
        candidate = quantized(order[:count], ())
        tried[count] = candidate, mean_ap(candidate)
        return 100 * (baseline - tried[count][1]) <= max_drop

    losses: dict[str, float] = {}
    fewest = 0
    if not holds(0):
        for number, node in enumerate(names):
            report("sensitivity of layers", number, len(names), names[node])
            losses[node] = loss(quantized((), (node,)))
        report("sensitivity of layers", len(names), len(names))
        order = sorted(losses, key=lambda node: -losses[node])
        fewest = _fewest(holds, len(order) - 1)
    candidate, reached = tried[fewest]
    total = sum(work.values())
    layers = [
        LayerSensitivity(names[node], losses[node], work[node] / total, float32=number < fewest)
        for number, node in enumerate(order)
    ]
    return candidate, SensitivitySearch(baseline, reached, layers)


def _fewest(holds: Callable[[int], bool], most: int) -> int:
    """Find the smallest number in 1..most that holds, given that larger ones hold as well."""
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


def mean_average_precision(embedder: Embedder, dataset: ReidDataset, report: Report = silent) -> float:
    """Return mAP, 0..1, on query and gallery."""
    paths = [*dataset.query.paths, *dataset.gallery.paths]
    return evaluate_dataset(dataset, embed_files(embedder, paths, report=report).embeddings).mAP


def quantize_network(
    parts: Parts,
    spec: ModelSpec,
    calibration: Calibration,
    method: CalibrationMethod | None = None,
    max_map_drop: float | None = None,
    report: Report = silent,
) -> tuple[onnx.ModelProto, Quantization, SensitivitySearch | None]:
    """Calibrate and quantize a float32 network to INT8 for the target in `spec.quantization`.

    `method` None tries all and keeps the one with the highest mean cosine to float32 on the selection crops.
    `max_map_drop` is how many points of mAP may be lost on the data set's query and gallery; None skips the search.
    Raises DataError if they cannot evaluate mAP, CheckFailedError if it drops by more in any case.
    """
    assert spec.quantization
    if max_map_drop is not None:
        for problem in problems(calibration.dataset):
            raise problem
    network, target = parts.network, spec.quantization.target
    with temporary_folder() as folder:

        def load(candidate: onnx.ModelProto) -> OnnxEmbedder:
            path = folder / "candidate.onnx"
            path.write_bytes(finalize(parts.join(candidate), spec).SerializeToString())
            return OnnxEmbedder(path, "cpu")

        reference = load(network).embed(calibration.selection)

        def loss(candidate: onnx.ModelProto) -> float:
            return float(1 - cosines(load(candidate).embed(calibration.selection), reference).mean())

        methods = (method,) if method else METHODS
        calibrated = {
            name: int8_ranges(network, calibration.ranges, spec.input, target, name, report) for name in methods
        }
        candidates = {name: quantize(network, ranges, target) for name, ranges in calibrated.items()}
        best = methods[0] if method else min(methods, key=lambda name: loss(candidates[name]))
        quantized, search = candidates[best], None
        if max_map_drop is not None:
            quantized, search = search_float_layers(
                network,
                lambda float_layers, only: quantize(network, calibrated[best], target, float_layers, only),
                loss,
                lambda candidate: mean_average_precision(load(candidate), calibration.dataset, report),
                max_map_drop,
                report,
            )
    float_layers = tuple(layer.layer for layer in search.layers if layer.float32) if search else ()
    quantization = Quantization(target, best, len(calibration.ranges), calibration.dataset.name, float_layers)
    return quantized, quantization, search
