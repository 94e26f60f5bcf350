"""From a PyTorch module to a clean ONNX graph."""

from __future__ import annotations

import warnings

import onnx
import torch
from torch import nn

from pmm_edge import __version__
from pmm_edge.runtime.onnx_backend import INPUT, OUTPUT
from pmm_edge.spec import METADATA_KEY, ModelSpec

OPSET = 18
"""What torch's exporter writes by itself: for any other, its graph goes through a converter."""


def onnx_graph(network: nn.Module, spec: ModelSpec, opset: int = OPSET) -> onnx.ModelProto:
    """Trace a network into an ONNX model with one input, one output, a dynamic batch and the spec as metadata.

    Args:
        network: in evaluation mode, from `spec.input`'s form to embeddings.
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
            opset_version=opset,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None  # only the exporter before torch.export returns nothing
    model = program.model_proto
    _drop_notes(model)
    model.producer_name, model.producer_version = "pmm-edge", __version__
    onnx.helper.set_model_props(model, {METADATA_KEY: spec.to_json()})
    onnx.checker.check_model(model, full_check=True)
    return model


def _drop_notes(model: onnx.ModelProto) -> None:
    """Remove what the exporter notes at each node and value: Python stack traces, with the paths of this machine."""
    graph = model.graph
    for noted in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        noted.ClearField("metadata_props")
        noted.ClearField("doc_string")
