"""Every method's graph holds the least that its network needs, at every opset, and what options ask of it."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import pmm_edge
from pmm_edge.errors import PmmError
from pmm_edge.export import Exported, Graph, export_onnx
from pmm_edge.export.graph import MANIFEST_KEY, layers_of, multiply_adds, parts_of
from pmm_edge.model import Checkpoint, build_model, load_checkpoint, save_checkpoint
from pmm_edge.spec import ModelSpec

CROPS = np.random.default_rng(2).integers(0, 256, (5, 96, 64, 3), dtype=np.uint8)


def analytic_minimum(network: nn.Module) -> tuple[int, int]:
    """Multiply-adds of one 96×64 image and parameters: a weight and a bias for each channel, nothing beside."""
    work, parameters = 0, 0
    layers = [
        module
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and "classifier" not in name
    ]

    def count(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal work, parameters
        work += layer.weight.numel() * output[0, 0].numel() if output.ndim == 4 else layer.weight.numel()
        parameters += layer.weight.numel() + layer.weight.shape[0]

    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.inference_mode():
        network.eval()(torch.zeros(1, 3, 96, 64))
    for handle in handles:
        handle.remove()
    return work, parameters


@pytest.mark.parametrize("method", ["pmm", "bdb", "baseline"])
def test_a_graph_is_the_analytic_minimum(method: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build_model(method, num_classes=4, backbone="resnet18", height=96, width=64)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.bias, 0, 0.2)  # equal biases would be stored once
    spec = replace(
        load_checkpoint(tiny_checkpoint).spec,
        architecture=method,
        stages=network.stages,
        embedding_size=max(stop for _, stop in network.stages.values()),
        mix_blocks=getattr(network, "mix_blocks", None),
    )
    checkpoint = tmp_path / "best.pt"
    save_checkpoint(checkpoint, Checkpoint(spec, network.state_dict()))
    exported = export_onnx(checkpoint, tmp_path / "model.onnx")
    model = onnx.load(exported.path)
    work, parameters = analytic_minimum(network)
    assert sum(multiply_adds(parts_of(model).network).values()) == work
    held = sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer if tensor.data_type == 1)
    assert held == parameters + 6  # a scale and a shift of each colour
    manifest = manifest_of(exported.path)
    assert (manifest["multiply_adds"], manifest["parameters"]) == (work, parameters)
    actual, expected = (pmm_edge.load(path, "cpu").embed(CROPS) for path in (exported.path, checkpoint))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def manifest_of(path: Path) -> dict[str, Any]:
    (manifest,) = (entry.value for entry in onnx.load(path).metadata_props if entry.key == MANIFEST_KEY)
    return json.loads(manifest)


def test_every_precision_says_what_its_graph_holds(tiny_onnx: Path, fp16: Exported, int8: dict[str, Exported]) -> None:
    plain = manifest_of(tiny_onnx)
    assert (plain["opset"], plain["nodes"]["Conv"]) == (18, 23)
    for exported, largest in ((fp16, "float16"), (int8["cpu"], "int8")):
        manifest = manifest_of(exported.path)
        assert manifest["nodes"] == Counter(node.op_type for node in onnx.load(exported.path).graph.node)
        assert (manifest["multiply_adds"], manifest["parameters"]) == (plain["multiply_adds"], plain["parameters"])
        assert max(manifest["weight_bytes"], key=manifest["weight_bytes"].__getitem__) == largest
        assert sum(manifest["weight_bytes"].values()) <= exported.size


def test_the_same_checkpoint_gives_the_same_file(tiny_checkpoint: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    again = export_onnx(tiny_checkpoint, tmp_path / "again.onnx").path
    assert again.read_bytes() == tiny_onnx.read_bytes()


def test_parts_join_to_the_whole(tiny_onnx: Path) -> None:
    model = onnx.load(tiny_onnx)
    parts = parts_of(model)
    assert [node.op_type for node in parts.before.graph.node] == ["Cast", "Transpose", "Mul", "Add"]
    assert parts.behind is None
    joined = parts.around(parts.network)
    assert {node.name for node in joined.graph.node} == {node.name for node in model.graph.node}
    names = list(layers_of(parts.network).values())
    assert names[:2] == ["backbone.conv1", "backbone.layer1.0.conv1"]
    assert {"average", "maximum", "bottleneck.conv3"} <= set(names)


@pytest.mark.parametrize("opset", [17, 19, 20])
def test_other_opsets_are_written_as_asked(opset: int, tiny_checkpoint: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    exported = export_onnx(tiny_checkpoint, tmp_path / "model.onnx", graph=Graph(opset=opset, normalize_output=True))
    model = onnx.load(exported.path)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    assert exported.spec.tools["opset"] == str(opset)
    reference = pmm_edge.load(tiny_onnx, "cpu").embed(CROPS)
    actual = pmm_edge.load(exported.path, "cpu").embed(CROPS)
    np.testing.assert_allclose(actual, reference / np.linalg.norm(reference, axis=1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("asked", [{"opset": 16}, {"opset": 21}, {"static_batch": 0}])
def test_what_cannot_be_asked_for(asked: dict[str, int]) -> None:
    with pytest.raises(PmmError, match="Choose"):
        Graph(**asked)


def test_normalized_embeddings_say_so(tiny_checkpoint: Path, tmp_path: Path) -> None:
    graph = Graph(normalize_output=True)
    embedder = pmm_edge.load(export_onnx(tiny_checkpoint, tmp_path / "model.onnx", graph=graph).path, "cpu")
    assert embedder.spec.normalized_output
    np.testing.assert_allclose(np.linalg.norm(embedder.embed(CROPS), axis=1), 1, atol=1e-6)


def test_specs_from_before_normalized_outputs_are_read(tiny_export: Exported) -> None:
    assert tiny_export.spec.normalized_output is False
    old = tiny_export.spec.to_json().replace('"normalized_output": false, ', "").replace('"target": null, ', "")
    assert not any(later in old for later in ("normalized_output", "target"))
    assert ModelSpec.from_json(old) == tiny_export.spec


def test_a_static_batch_takes_any_number_of_crops(tiny_checkpoint: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    exported = export_onnx(tiny_checkpoint, tmp_path / "model.onnx", graph=Graph(static_batch=4))
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [4, 96, 64, 3]
    assert session.get_outputs()[0].shape == [4, 1536]
    actual, expected = (pmm_edge.load(path, "cpu") for path in (exported.path, tiny_onnx))
    for number in (1, 4, 5):
        reference = expected.embed(CROPS[:number])
        np.testing.assert_allclose(actual.embed(CROPS[:number]), reference, rtol=0, atol=1e-5 * reference.max())
