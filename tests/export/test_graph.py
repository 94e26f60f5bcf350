"""Graphs contain the minimum that a network needs, compute the same, and follow the options."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import pmm_edge
from pmm_edge.export import ExportedFile, export
from pmm_edge.export.graph import StrippedNetwork, count_work, inference_network, layer_names, onnx_graph, split
from pmm_edge.model import build_model
from pmm_edge.spec import InputSpec

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


METHODS = ["pmm", "bdb", "baseline", "pcb", "cama", "pcb-rpp"]


def network_of(method: str) -> nn.Module:
    """A network whose batch normalizations are not identities, with distinct biases (equal ones are stored once)."""
    torch.manual_seed(0)
    method, _, rpp = method.partition("-")
    network = build_model(method, num_classes=4, backbone="resnet18", height=96, width=64, rpp=bool(rpp))
    network.refined = bool(rpp)
    for module in network.modules():
        if isinstance(module, BATCH_NORMS):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return network.eval()


@pytest.mark.parametrize("method", METHODS)
def test_stripped_network_gives_the_same_embeddings(method: str) -> None:
    network = network_of(method)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    stripped = inference_network(network, InputSpec(96, 64))
    images = torch.rand(3, 3, 96, 64)
    with torch.inference_mode():
        torch.testing.assert_close(stripped(images), network(images), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, BATCH_NORMS) for module in stripped.modules())
    if method == "pmm":
        linear = [module for module in StrippedNetwork(network).modules() if isinstance(module, nn.Linear)]
        assert [(layer.in_features, layer.out_features) for layer in linear] == [(512, 512), (512, 1024)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def analytic_minimum(network: nn.Module) -> tuple[float, int]:
    """GFLOPs of one 96×64 image and parameters: each layer's weights, and one bias for each channel."""
    work, parameters = [], []

    def count(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        work.append(layer.weight.numel() * (output[0, 0].numel() if output.ndim == 4 else 1))
        parameters.append(layer.weight.numel() + layer.weight.shape[0])

    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and "classifier" not in name:
            module.register_forward_hook(count)
    with torch.inference_mode():
        network(torch.zeros(1, 3, 96, 64))
    return 2e-9 * sum(work), sum(parameters)


@pytest.mark.parametrize("method", METHODS[:5])
def test_graph_is_the_analytic_minimum(method: str, tiny_export: ExportedFile) -> None:
    network = network_of(method)
    size = max(stop for _, stop in network.stages.values())
    spec = replace(tiny_export.spec, architecture=method, stages=network.stages, embedding_size=size)
    model = onnx_graph(inference_network(network, spec.input), spec)
    gflops, parameters = count_work(split(model).network)
    assert (pytest.approx(gflops), parameters) == analytic_minimum(network)
    stored = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    assert sum(int(np.prod(tensor.dims)) for tensor in stored) == parameters + 6  # scale and shift of three colors
    if method == "pmm":
        assert (pytest.approx(gflops), parameters) == (tiny_export.spec.gflops, tiny_export.spec.parameters)


def test_graph_contains_only_network_and_preprocessing(fp32: dict[str, ExportedFile]) -> None:
    network = {"Conv": 23, "Relu": 21, "Add": 9, "MaxPool": 1, "ReduceMean": 1, "ReduceMax": 1, "Gemm": 2, "Concat": 1}
    before = {
        "uint8": {"Cast": 1, "Transpose": 1, "Mul": 1, "Add": 10},
        "raw": {"Mul": 1, "Add": 10},
        "normalized": {},
    }
    for form, exported in fp32.items():
        nodes = onnx.load(exported.path).graph.node
        assert Counter(node.op_type for node in nodes) == network | before[form], form
        if form == "uint8":
            assert nodes[0].op_type == "Cast"  # TensorRT accepts uint8 only at the input


def test_parts_join_to_the_whole(tiny_onnx: Path) -> None:
    model = onnx.load(tiny_onnx)
    parts = split(model)
    assert {node.name for node in parts.join(parts.network).graph.node} == {node.name for node in model.graph.node}
    names = {"backbone.conv1", "backbone.layer1.0.conv1", "average", "maximum", "bottleneck.conv3"}
    assert names <= set(layer_names(parts.network).values())


def test_opset_unit_length_and_static_batch(
    tiny_checkpoint: Path, tiny_onnx: Path, tmp_path: Path, crops: np.ndarray
) -> None:
    out = tmp_path / "model.onnx"
    exported = export(tiny_checkpoint, out=out, opset=17, normalize_output=True, static_batch=4).files[0]
    assert [(entry.domain, entry.version) for entry in onnx.load(out).opset_import] == [("", 17)]
    assert (exported.spec.tools["opset"], exported.spec.normalized_output) == ("17", True)
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [4, 96, 64, 3]
    assert session.get_outputs()[0].shape == [4, 1536]
    actual, expected = (pmm_edge.load(path, "cpu") for path in (out, tiny_onnx))
    for number in (1, 4, 5):
        reference = expected.embed(crops[:number])
        reference /= np.linalg.norm(reference, axis=1, keepdims=True)
        np.testing.assert_allclose(actual.embed(crops[:number]), reference, atol=1e-6)
