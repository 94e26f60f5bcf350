"""A network in INT8: explicit quantise/dequantise pairs, placed where the engine that will run it fuses them.

`tensorrt`: signed activations around zero. The inputs of convolutions and linear layers are quantised, the stem's
included, and of a residual addition the branch that skips: TensorRT then runs convolution, addition and ReLU as one
INT8 kernel. Biases stay float, as TensorRT wants them.
`cpu`: unsigned activations with a zero point, which the VNNI instructions multiply at full speed; everything between
the layers is quantised as well.
Both: a scale for each output channel of the weights; embeddings leave the last layers in float.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from pmm_edge.export.calibration import Ranges
from pmm_edge.export.options import Target

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
