"""A network in FP16: every weight and every value between its nodes is float16, its input and output stay float32."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16

from pmm_edge.errors import CheckFailedError
from pmm_edge.export.calibration import Ranges
from pmm_edge.spec import FLOAT16_MAX


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
