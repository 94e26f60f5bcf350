"""From a trained network to an ONNX graph: strip and fuse in PyTorch, trace, cut into parts, count the work."""

import math
import warnings
from collections.abc import Collection
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F  # noqa: N812
from onnx import compose, helper, numpy_helper, utils, version_converter
from onnxruntime.quantization.onnx_model import ONNXModel
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from pmm_edge import __version__
from pmm_edge.model.network import Head, ReidNetwork
from pmm_edge.runtime.embedder import INPUT, OUTPUT
from pmm_edge.runtime.model_file import DIGEST_KEY, parse_model
from pmm_edge.runtime.torch_backend import Preprocess
from pmm_edge.spec import METADATA_KEY, InputSpec, ModelSpec

LAYERS = ("Conv", "Gemm")  # the ONNX operators with trained weights


class StrippedNetwork(nn.Module):
    """A network without classifiers and mixing: normalized images (N, 3, H, W) -> embeddings (N, D).

    Batch normalization is folded into the preceding layers. Heads that read the same pooled vector become one layer:
    stages II and III of PMM are one 2048->1024 layer. Networks without such heads, as PCB, keep their own layers. Zero
    vectors stay zero when the output is normalized.
    """

    def __init__(self, network: ReidNetwork, normalize_output: bool = False) -> None:
        super().__init__()
        self.normalize_output = normalize_output
        network = deepcopy(network).eval()
        self.maximum: nn.Linear | None = None
        self.network: ReidNetwork | None = None
        if not network.average_heads:
            self.network = network
            _fold_batch_norm(network)
            return
        self.projection = network.projection
        self.backbone = _fold_batch_norm(network.backbone)
        self.average = _merge_heads(network.average_heads)
        if network.max_heads:
            self.bottleneck = _fold_batch_norm(network.bottleneck)
            self.maximum = _merge_heads(network.max_heads)

    def forward(self, images: Tensor) -> Tensor:
        embeddings = self.network(images) if self.network else self._merged(images)
        if self.normalize_output:  # F.normalize would export shape arithmetic as well
            embeddings = embeddings / torch.linalg.vector_norm(embeddings, dim=1, keepdim=True).clamp_min(1e-12)
        return embeddings

    def _merged(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        # Plain reductions export as one node each; adaptive pooling exports shape arithmetic as well.
        embeddings = self.average(features.mean(dim=(2, 3)))
        if self.maximum is not None:
            maximum = self.maximum(self.bottleneck(features).amax(dim=(2, 3)))
            embeddings = torch.cat([embeddings, maximum], dim=1)
        # One ReLU after the concatenation: ONNX Runtime 1.31 does not fuse an INT8 linear layer that a ReLU follows.
        embeddings = F.relu(embeddings)
        return self.projection(embeddings) if self.projection else embeddings


def inference_network(network: ReidNetwork, spec: InputSpec, normalize_output: bool = False) -> nn.Module:
    """Build the network to deploy, from `spec`'s input form to embeddings. `network` is not modified.

    Normalization of the forms `uint8` and `raw` stays a separate scale and shift: folded into the first convolution it
    would be wrong at the border, which is padded with zeros after normalization.
    """
    return nn.Sequential(Preprocess(spec), StrippedNetwork(network, normalize_output)).eval()


def _fold_batch_norm(module: nn.Module) -> nn.Module:
    """Fold each batch normalization into the convolution registered right before it, in place."""
    for (name, layer), (norm_name, norm) in pairwise(list(module.named_children())):
        if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(layer, norm))
            setattr(module, norm_name, nn.Identity())
    for child in module.children():
        _fold_batch_norm(child)
    return module


def _merge_heads(heads: list[Head]) -> nn.Linear:
    """Fold batch normalization into the heads' linear layers, and concatenate these into one layer."""
    layers = [fuse_linear_bn_eval(head.linear, head.bn) for head in heads]
    merged = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers))
    merged.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]))
    merged.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]))
    return merged


def onnx_graph(network: nn.Module, spec: ModelSpec, opset: int = 18) -> onnx.ModelProto:
    """Trace a network in evaluation mode into an ONNX model with a dynamic batch, which `finalize` completes."""
    # torch specializes a graph that was traced with a batch of one.
    example = torch.zeros(spec.input.shape(2), dtype=getattr(torch, spec.input.dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they concern torch's internals; the graph is verified by running it
        program = torch.onnx.export(
            network,
            (example,),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=max(opset, 18),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None  # only the older exporter returns None
    model = program.model_proto
    graph = model.graph
    # The exporter stores Python stack traces, with local paths, at every node and value.
    for entry in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        entry.ClearField("metadata_props")
        entry.ClearField("doc_string")
    if opset == 17:
        model = version_converter.convert_version(model, 17)
        for node in model.graph.node:  # the conversion keeps an attribute of reductions that opset 17 does not have
            for attribute in [entry for entry in node.attribute if entry.name == "noop_with_empty_axes"]:
                node.attribute.remove(attribute)
    return model


def finalize(model: onnx.ModelProto, spec: ModelSpec, static_batch: int | None = None) -> onnx.ModelProto:
    """Write producer, spec, batch size and digest into a model, in place, and run ONNX's checker on it."""
    model.producer_name, model.producer_version = "pmm-edge", __version__
    model.graph.name, model.graph.doc_string = "pmm-edge", ""
    if static_batch is not None:
        model.graph.ClearField("value_info")  # shapes with the dynamic batch
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = static_batch
    properties = {METADATA_KEY: spec.to_json()}
    helper.set_model_props(model, properties)
    digest = parse_model(Path("model.onnx"), model.SerializeToString()).digest
    helper.set_model_props(model, properties | {DIGEST_KEY: digest})
    onnx.checker.check_model(model, full_check=True)
    return model


@dataclass(frozen=True, eq=False)
class Parts:
    """A graph of `onnx_graph`, cut before its first convolution and before the normalization of its embeddings."""

    before: onnx.ModelProto | None
    """Preprocessing; None where the input form is `normalized`."""
    network: onnx.ModelProto
    """Normalized images (N, 3, H, W) float32 -> embeddings (N, D). The only part whose precision is ever reduced."""
    after: onnx.ModelProto | None
    """L2 normalization, if any; the sum of 1536 squares may exceed the range of float16."""

    def join(self, network: onnx.ModelProto) -> onnx.ModelProto:
        """Put preprocessing and normalization around another network, possibly from a graph of another input form."""
        joined, before = deepcopy(network), self.before
        ONNXModel(joined).topological_sort()  # quantization appends its nodes
        entry = before.graph.output[0].name if before else INPUT
        if joined.graph.input[0].name != entry:  # from another input form: its names may collide with those of `before`
            if before:
                before = compose.add_prefix(before, "input.")
                _rename_input(before, INPUT)
                entry = before.graph.output[0].name
            _rename_input(joined, entry)
        if before:
            joined = _merge(before, joined)
        return _merge(joined, self.after) if self.after else joined


def split(model: onnx.ModelProto) -> Parts:
    """Cut a graph of `onnx_graph` into its parts. `model` is not modified."""
    nodes = model.graph.node
    first = next(node for node in nodes if node.op_type == "Conv").input[0]
    last = next((node.input[0] for node in nodes if node.op_type == "ReduceL2"), OUTPUT)
    extractor = utils.Extractor(model)
    after = extractor.extract_model([last], [OUTPUT]) if last != OUTPUT else None
    if after:  # equal constants are stored once, and two parts with the same name cannot be joined
        for tensor in after.graph.initializer:
            ONNXModel(after).replace_input_of_all_nodes(tensor.name, f"after.{tensor.name}")
            tensor.name = f"after.{tensor.name}"
    return Parts(
        before=extractor.extract_model([INPUT], [first]) if first != INPUT else None,
        network=extractor.extract_model([first], [last]),
        after=after,
    )


def _rename_input(model: onnx.ModelProto, name: str) -> None:
    ONNXModel(model).replace_input_of_all_nodes(model.graph.input[0].name, name)
    model.graph.input[0].name = name


def _merge(first: onnx.ModelProto, second: onnx.ModelProto) -> onnx.ModelProto:
    for part in (first, second):
        part.graph.ClearField("value_info")  # both describe the value at the cut, which merging rejects
    (output,), (entry,) = first.graph.output, second.graph.input
    merged = compose.merge_models(first, second, io_map=[(output.name, entry.name)])
    del merged.opset_import[1:]  # merging lists the same one twice
    return merged


def layer_names(network: onnx.ModelProto, operators: Collection[str] = LAYERS) -> dict[str, str]:
    """Map node names of layers with trained weights, in graph order, to their names in the trained network."""
    layers = [node for node in network.graph.node if node.op_type in operators]
    return {
        node.name: node.input[1].removesuffix(".weight").partition(".")[2].removeprefix("network.") for node in layers
    }


def positions(network: onnx.ModelProto) -> dict[str, int]:
    """Count positions of the map that each convolution and linear layer writes, by node name; 1 without a map."""
    graph = onnx.shape_inference.infer_shapes(network).graph
    values = {value.name: value.type.tensor_type.shape.dim for value in (*graph.value_info, *graph.output)}
    return {
        node.name: math.prod(dim.dim_value for dim in values[node.output[0]][2:])
        for node in graph.node
        if node.op_type in LAYERS
    }


def multiply_adds(network: onnx.ModelProto) -> dict[str, int]:
    """Count multiply-adds for one image, by node name, of all convolutions and linear layers."""
    nodes = {node.name: node for node in network.graph.node}
    weights = {tensor.name: math.prod(tensor.dims) for tensor in network.graph.initializer}
    return {name: weights[nodes[name].input[1]] * count for name, count in positions(network).items()}


def count_work(network: onnx.ModelProto) -> tuple[float, int]:
    """Count GFLOPs for one image (a multiply-add is two operations) and parameters of a float32 `Parts.network`."""
    tensors = [tensor for tensor in network.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    return 2e-9 * sum(multiply_adds(network).values()), sum(math.prod(tensor.dims) for tensor in tensors)


def row_preprocessing(before: onnx.ModelProto, spec: InputSpec) -> onnx.ModelProto:
    """Rewrite `Parts.before` of the form `uint8` so that scale and shift run on whole rows, with the same results.

    ONNX Runtime moves the transposition after the arithmetic where INT8 convolutions follow, because they read NHWC.
    Broadcasting three constants over the innermost dimension is then as slow as three convolutions of ResNet-50;
    constants repeated for each pixel of a row avoid that.
    """
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in before.graph.initializer}
    scale, shift = (
        next(constants[name] for node in before.graph.node if node.op_type == kind for name in node.input[1:])
        for kind in ("Mul", "Add")
    )
    constants = {
        "row.scale": np.tile(scale.reshape(3), spec.width),
        "row.shift": np.tile(shift.reshape(3), spec.width),
        "row.shape": np.array([0, 0, 3 * spec.width]),  # 0 keeps batch and height
        "image.shape": np.array([0, 0, spec.width, 3]),
    }
    last = before.graph.output[0].name
    nodes = [
        helper.make_node("Reshape", [INPUT, "row.shape"], ["rows"], "rows"),
        helper.make_node("Cast", ["rows"], ["rows_float"], "rows_float", to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["rows_float", "row.scale"], ["rows_scaled"], "rows_scaled"),
        helper.make_node("Add", ["rows_scaled", "row.shift"], ["rows_shifted"], "rows_shifted"),
        helper.make_node("Reshape", ["rows_shifted", "image.shape"], ["pixels"], "pixels"),
        helper.make_node("Transpose", ["pixels"], [last], "planes", perm=[0, 3, 1, 2]),
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    rewritten = helper.make_graph(nodes, "rows", before.graph.input, before.graph.output, tensors)
    return helper.make_model(rewritten, opset_imports=before.opset_import, ir_version=before.ir_version)
