"""From a PyTorch module to a clean ONNX graph."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import onnx
import torch
from torch import nn

from pmm_edge import __version__
from pmm_edge.export.options import OPSET
from pmm_edge.runtime.embedder import INPUT, OUTPUT
from pmm_edge.spec import METADATA_KEY, ModelSpec


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
