"""What an exported graph holds: in the file's metadata beside the spec, which says what the network means."""

from __future__ import annotations

import json
import math
from collections import Counter

import onnx
from onnx.helper import tensor_dtype_to_np_dtype

from pmm_edge.export.parts import multiply_adds, parts_of

METADATA_KEY = "pmm_edge.manifest"
SCHEMA = 1


def graph_manifest(model: onnx.ModelProto, unreduced: onnx.ModelProto) -> str:
    """Describe a graph as JSON, the same for the same graph.

    Args:
        model: the graph that is written.
        unreduced: the same network in float32, where multiply-adds and parameters are counted.

    Returns:
        `opset` and `ir_version` of ONNX; `nodes`, how many of which operator; `parameters` of the network, weights and
        biases; `multiply_adds` of its convolutions and linear layers for one image; `weight_bytes`, how many bytes of
        constants in which type the file holds.
    """
    network = parts_of(unreduced).network
    sizes: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        kind = tensor_dtype_to_np_dtype(tensor.data_type)
        sizes[kind.name] += math.prod(tensor.dims) * kind.itemsize
    described = {
        "schema": SCHEMA,
        "opset": next(entry.version for entry in model.opset_import if entry.domain == ""),
        "ir_version": model.ir_version,
        "nodes": Counter(node.op_type for node in model.graph.node),
        "parameters": sum(
            math.prod(tensor.dims) for tensor in network.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT
        ),
        "multiply_adds": sum(multiply_adds(network).values()),
        "weight_bytes": sizes,
    }
    return json.dumps(described, sort_keys=True)
