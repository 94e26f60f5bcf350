"""Preprocessing over whole rows of pixels, which a CPU computes several times faster than pixel by pixel."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from pmm_edge.runtime.embedder import INPUT
from pmm_edge.spec import InputSpec


def row_preprocessing(before: onnx.ModelProto, spec: InputSpec) -> onnx.ModelProto:
    """The same arithmetic with the scale and shift of a colour repeated for each pixel of a row.

    ONNX Runtime moves the change of layout behind the arithmetic where INT8 convolutions follow, which read images
    as they come. Then three numbers at a time meet three constants, which takes as long as three of ResNet-50's
    convolutions; here it is all numbers of a row.

    Args:
        before: cast, transpose, scale and shift (`Parts.before`) of the input form `uint8`.

    Returns:
        (N, height, width, 3) uint8 -> (N, 3, height, width) float32, with the names of the one given.
    """
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in before.graph.initializer}
    scale, shift = (
        next(constants[name] for node in before.graph.node if node.op_type == kind for name in node.input[1:])
        for kind in ("Mul", "Add")
    )
    initializers = {
        "row.scale": np.tile(scale.reshape(3), spec.width),
        "row.shift": np.tile(shift.reshape(3), spec.width),
        "row.shape": np.array([0, 0, 3 * spec.width]),  # 0 keeps the batch and the height
        "image.shape": np.array([0, 0, spec.width, 3]),
    }
    nodes = [
        helper.make_node("Reshape", [INPUT, "row.shape"], ["rows"], "rows"),
        helper.make_node("Cast", ["rows"], ["rows_float"], "rows_float", to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["rows_float", "row.scale"], ["rows_scaled"], "rows_scaled"),
        helper.make_node("Add", ["rows_scaled", "row.shift"], ["rows_shifted"], "rows_shifted"),
        helper.make_node("Reshape", ["rows_shifted", "image.shape"], ["pixels"], "pixels"),
        helper.make_node("Transpose", ["pixels"], [before.graph.output[0].name], "planes", perm=[0, 3, 1, 2]),
    ]
    rewritten = onnx.ModelProto()
    rewritten.CopyFrom(before)
    for part in ("node", "initializer", "value_info"):
        rewritten.graph.ClearField(part)
    rewritten.graph.node.extend(nodes)
    rewritten.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in initializers.items())
    return rewritten
