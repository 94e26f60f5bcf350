"""Whether a graph computes in the precision that its spec claims: a tool that converts in silence leaves FP32."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

_LAYERS = ("Conv", "Gemm", "MatMul")
_INTEGER_LAYERS = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "QGemm")
_MOST = 0.9
"""Of the weights, in FP32 and FP16. An INT8 graph may keep any layers in float, but not all."""


def precision_failure(model: Path, claimed: str) -> str | None:
    """The sentence where an ONNX graph is of another precision than its spec says; None where it is of that one.

    Args:
        model: an ONNX file. Of an engine its manifest counts the layers, and a checkpoint is FP32.
        claimed: `fp32`, `fp16` or `int8`.

    Raises:
        ModuleNotFoundError: the onnx package is not installed.
    """
    if model.suffix != ".onnx":
        return None
    import onnx

    shares = _shares(onnx.load(model, load_external_data=False).graph)
    held = shares.get(claimed, 0.0)
    if (claimed == "int8" and held > 0) or held >= _MOST:
        return None
    found = ", ".join(f"{100 * share:.0f} % {kind}" for kind, share in sorted(shares.items(), key=lambda one: -one[1]))
    return f"says that it is {claimed}, and its weights are {found or 'none'}"


def _shares(graph: Any) -> dict[str, float]:
    """The share of each precision in the weights of all convolutions and matrix products."""
    sizes: Counter[str] = Counter()
    for kind, size in _weights(graph):
        sizes[kind] += size
    total = sum(sizes.values())
    return {kind: size / total for kind, size in sizes.items()}


def _weights(graph: Any) -> Iterator[tuple[str, int]]:
    import onnx

    stored = {tensor.name: tensor for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    kinds = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16"}
    for node in graph.node:
        if node.op_type not in (*_LAYERS, *_INTEGER_LAYERS):
            continue
        for name in node.input:
            maker = makers.get(name)
            quantised = maker is not None and maker.op_type == "DequantizeLinear"
            tensor = stored.get(maker.input[0] if quantised and maker else name)
            if tensor is None or len(tensor.dims) < 2:  # a bias, a scale, a value of the graph's
                continue
            integer = quantised or node.op_type in _INTEGER_LAYERS
            yield "int8" if integer else kinds.get(tensor.data_type, "another type"), prod(tensor.dims)
