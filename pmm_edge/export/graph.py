"""An exported graph in three parts: what stays in float32 before and behind the network, and the network."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import onnx
import torch
import torch.nn.functional as F  # noqa: N812
from onnx import compose, helper, numpy_helper, utils
from onnx.helper import tensor_dtype_to_np_dtype
from onnxruntime.quantization.onnx_model import ONNXModel
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from pmm_edge import __version__
from pmm_edge.export.options import OPSET
from pmm_edge.model.network import Head, ReidNetwork
from pmm_edge.runtime.embedder import INPUT, OUTPUT
from pmm_edge.runtime.torch_backend import Preprocess
from pmm_edge.spec import METADATA_KEY, InputSpec, ModelSpec


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


class Stripped(nn.Module):
    """A network without classifiers and mixing. Forward: (N, 3, H, W) normalised -> (N, D).

    Batch normalisation is folded into the layers before it. Heads that read one pooled vector are one layer: when
    nothing is mixed, PMM's stages II and III are one 2048->1024.
    """

    def __init__(self, network: ReidNetwork) -> None:
        super().__init__()
        network = copy.deepcopy(network).eval()
        self.backbone = fold_batch_norm(network.backbone)
        self.average = _side_by_side(network.average_heads)
        self.maximum: nn.Linear | None = None
        if network.max_heads:
            self.bottleneck = fold_batch_norm(network.bottleneck)
            self.maximum = _side_by_side(network.max_heads)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        # Plain reductions export as one node each; torch's adaptive pooling brings shape arithmetic with it.
        embeddings = self.average(features.mean(dim=(2, 3)))
        if self.maximum is not None:
            maximum = self.maximum(self.bottleneck(features).amax(dim=(2, 3)))
            embeddings = torch.cat([embeddings, maximum], dim=1)
        # One ReLU behind all: ONNX Runtime 1.31 leaves an INT8 linear layer in float where a ReLU of its own follows.
        return F.relu(embeddings)


class UnitLength(nn.Module):
    """Embeddings (N, D) over their L2 norm. All zeros stay so."""

    def forward(self, embeddings: Tensor) -> Tensor:
        # Not F.normalize, whose export brings shape arithmetic with it.
        return embeddings / torch.linalg.vector_norm(embeddings, dim=1, keepdim=True).clamp_min(1e-12)


def inference_network(network: ReidNetwork, spec: InputSpec, normalize_output: bool = False) -> nn.Module:
    """The network to deploy, from the spec's input form to embeddings; the trained one is left as it is.

    The normalisation of the forms `uint8` and `raw` stays a scale and a shift of its own: folded into the first
    convolution it would be wrong at the border, where zeros are padded after it.
    """
    behind = [UnitLength()] if normalize_output else []
    return nn.Sequential(Preprocess(spec), Stripped(network), *behind).eval()


def fold_batch_norm(module: nn.Module) -> nn.Module:
    """Fold each batch normalisation into the convolution that is registered right before it, in place."""
    for (name, layer), (norm_name, norm) in pairwise(list(module.named_children())):
        if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(layer, norm))
            setattr(module, norm_name, nn.Identity())
    for child in module.children():
        fold_batch_norm(child)
    return module


def _side_by_side(heads: list[Head]) -> nn.Linear:
    """The heads' reductions, batch normalisation folded, as one layer that gives their outputs one behind another."""
    layers = [fuse_linear_bn_eval(head.linear, head.bn) for head in heads]
    if len(layers) == 1:
        return layers[0]
    together = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers))
    together.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]))
    together.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]))
    return together


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


MANIFEST_KEY = "pmm_edge.manifest"
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


def onnx_graph(network: nn.Module, spec: ModelSpec, opset: int = OPSET) -> onnx.ModelProto:
    """Trace a network into an ONNX model with one input, one output, a dynamic batch and the spec as metadata.

    Args:
        network: in evaluation mode, from `spec.input`'s form to embeddings.
        opset: 17 to 20.
    """
    # Two images: torch specialises a graph that was traced with one.
    example = torch.zeros(spec.input.shape(2), dtype=getattr(torch, spec.input.dtype))
    with warnings.catch_warnings():
        # The exporter warns of torch's own internals; what it wrote is checked by running it.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            (example,),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=max(opset, OPSET),  # asked for less, torch writes 18 and only logs that it did
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None  # only the exporter before torch.export returns nothing
    model = program.model_proto
    _drop_notes(model)
    if opset < OPSET:
        _lower_to_opset_17(model)
    return finished(model, spec)


def finished(
    model: onnx.ModelProto, spec: ModelSpec, static_batch: int | None = None, metadata: Mapping[str, str] | None = None
) -> onnx.ModelProto:
    """Sign a model, give it its spec, other metadata and its batch, and check it; it is changed in place."""
    model.producer_name, model.producer_version = "pmm-edge", __version__
    model.graph.name, model.graph.doc_string = "pmm-edge", ""
    model.ClearField("metadata_props")
    onnx.helper.set_model_props(model, {METADATA_KEY: spec.to_json(), **(metadata or {})})
    if static_batch is not None:
        model.graph.ClearField("value_info")  # of the dynamic batch
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = static_batch
    onnx.checker.check_model(model, full_check=True)
    return model


def _lower_to_opset_17(model: onnx.ModelProto) -> None:
    """Of what these graphs hold, opset 18 changed reductions alone: their axes were an attribute and are an input."""
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type.startswith("Reduce"):
            values, axes = node.input
            kept_attributes = [given for given in node.attribute if given.name != "noop_with_empty_axes"]  # new as well
            del node.attribute[:]
            node.attribute.extend(kept_attributes)
            node.attribute.append(onnx.helper.make_attribute("axes", constants[axes].tolist()))
            node.input[:] = [values]
    read = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    model.graph.ClearField("initializer")
    model.graph.initializer.extend(kept)
    model.opset_import[0].version = 17


def _drop_notes(model: onnx.ModelProto) -> None:
    """Remove what the exporter notes at each node and value: Python stack traces, with the paths of this machine."""
    graph = model.graph
    for noted in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        noted.ClearField("metadata_props")
        noted.ClearField("doc_string")
