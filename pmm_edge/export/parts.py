"""An exported graph in three parts: what stays in float32 before and behind the network, and the network."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import onnx
from onnx import compose, utils
from onnxruntime.quantization.onnx_model import ONNXModel

from pmm_edge.runtime.embedder import INPUT, OUTPUT


@dataclass(frozen=True, eq=False)
class Parts:
    """A graph that is cut at its first convolution's input and at its embeddings before they are normalised."""

    before: onnx.ModelProto | None
    """Preprocessing; None where the input is normalised already."""
    network: onnx.ModelProto
    """(N, 3, H, W) float32 normalised -> (N, D) float32. Only this part is ever put in a lower precision."""
    behind: onnx.ModelProto | None
    """Normalisation of the embeddings, if any; squares of 1536 values may be more than float16 holds."""

    def around(self, network: onnx.ModelProto) -> onnx.ModelProto:
        """The whole graph with another network in the middle, which has the same input and output."""
        joined = _copy(network)
        ONNXModel(joined).topological_sort()  # what changes a network appends its new nodes
        if self.before:
            joined = _join(self.before, joined)
        return _join(joined, self.behind) if self.behind else joined

    def around_other(self, network: onnx.ModelProto) -> onnx.ModelProto:
        """The same with a network that was cut out of a graph with another input form: names there are others."""
        network, before = _copy(network), None
        if self.before:
            before = compose.add_prefix(self.before, "input.")
            _rename_input(before, INPUT)
        _rename_input(network, before.graph.output[0].name if before else INPUT)
        return replace(self, before=before).around(network)


def parts_of(model: onnx.ModelProto) -> Parts:
    """Cut a graph of `onnx_graph`; the model itself is left as it is."""
    nodes = model.graph.node
    first = next(node for node in nodes if node.op_type == "Conv").input[0]
    last = next((node.input[0] for node in nodes if node.op_type == "ReduceL2"), OUTPUT)
    extractor = utils.Extractor(model)
    return Parts(
        before=extractor.extract_model([INPUT], [first]) if first != INPUT else None,
        network=extractor.extract_model([first], [last]),
        behind=extractor.extract_model([last], [OUTPUT]) if last != OUTPUT else None,
    )


def layers_of(network: onnx.ModelProto) -> dict[str, str]:
    """Node name -> the trained network's name for it, of each convolution and linear layer, in their order."""
    return {
        node.name: node.input[1].removesuffix(".weight").partition(".")[2]
        for node in network.graph.node
        if node.op_type in ("Conv", "Gemm")
    }


def multiply_adds(network: onnx.ModelProto) -> dict[str, int]:
    """Node name -> multiply-adds for one image, of each convolution and linear layer."""
    network = onnx.shape_inference.infer_shapes(network)
    weights = {tensor.name: list(tensor.dims) for tensor in network.graph.initializer}
    values = (*network.graph.value_info, *network.graph.output)
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}
    counts = {}
    for node in network.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            positions = math.prod(shapes[node.output[0]][2:])
            counts[node.name] = math.prod(weights[node.input[1]]) * positions
    return counts


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _rename_input(model: onnx.ModelProto, name: str) -> None:
    (entry,) = model.graph.input
    for node in model.graph.node:
        node.input[:] = [name if read == entry.name else read for read in node.input]
    entry.name = name


def _join(first: onnx.ModelProto, second: onnx.ModelProto) -> onnx.ModelProto:
    (output,), (entry,) = first.graph.output, second.graph.input
    for part in (first, second):
        part.graph.ClearField("value_info")  # both know the value at the cut, which merging refuses
    joined = compose.merge_models(first, second, io_map=[(output.name, entry.name)])
    versions = {entry.domain: entry.version for entry in joined.opset_import}  # merging lists those of either
    del joined.opset_import[:]
    joined.opset_import.extend(onnx.helper.make_opsetid(*entry) for entry in versions.items())
    return joined
