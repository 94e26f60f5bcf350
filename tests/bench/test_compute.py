"""Operations and parameters that are counted from a spec are those of the real network."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pmm_edge.bench import resources
from pmm_edge.bench.report import Latency, Scope
from pmm_edge.bench.resources import compute_of, measured_peak, products
from pmm_edge.errors import ModelError
from pmm_edge.export.graph import Stripped
from pmm_edge.model import build_model
from pmm_edge.runtime import load
from pmm_edge.spec import InputSpec, Method, ModelSpec


def spec_of(method: Method, backbone: str, height: int, width: int) -> ModelSpec:
    size = {"pmm": 1536, "bdb": 1536, "baseline": 512}[method]
    return ModelSpec(method, backbone, 4, InputSpec(height, width), size, {"I": (0, 512)})


@pytest.mark.parametrize("method", ["pmm", "bdb", "baseline"])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_the_count_is_that_of_the_network(method: Method, backbone: str) -> None:
    spec = spec_of(method, backbone, 192, 64)
    with torch.device("meta"):
        network = Stripped(build_model(method, num_classes=4, backbone=backbone, height=192, width=64))
        images = torch.empty(1, 3, 192, 64)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(images)
    layers = list(products(spec))
    assert sum(layer.operations for layer in layers) == counter.get_total_flops()
    assert sum(layer.parameters for layer in layers) == sum(value.numel() for value in network.parameters())


@pytest.mark.parametrize(("height", "width"), [(97, 33), (100, 50), (384, 128), (7, 5)])
def test_sides_that_do_not_halve(height: int, width: int) -> None:
    with torch.device("meta"):
        network = Stripped(build_model("bdb", num_classes=4, backbone="resnet18"))
        images = torch.empty(1, 3, height, width)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(images)
    counted = sum(layer.operations for layer in products(spec_of("bdb", "resnet18", height, width)))
    assert counted == counter.get_total_flops()


def convolutions_and_products(graph: onnx.GraphProto) -> Iterator[tuple[int, int]]:
    """Operations and weights of each, from the sizes that onnx infers."""
    weights = {tensor.name: tensor.dims for tensor in graph.initializer}
    shapes = {
        value.name: [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.output)
    }
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            count = int(np.prod(weights[node.input[1]]))
            positions = int(np.prod(shapes[node.output[0]][2:])) if node.op_type == "Conv" else 1
            yield 2 * count * positions, count


def test_the_count_is_that_of_the_exported_graph(tiny_onnx: Path) -> None:
    graph = onnx.shape_inference.infer_shapes(onnx.load(tiny_onnx)).graph
    operations, weights = (sum(column) for column in zip(*convolutions_and_products(graph), strict=True))
    layers = list(products(load(tiny_onnx, "cpu").spec))
    assert sum(layer.operations for layer in layers) == operations
    assert sum(layer.parameters - layer.outputs for layer in layers) == weights


def test_the_papers_network() -> None:
    found = compute_of(spec_of("pmm", "resnet50", 384, 128), [], "cuda:99")
    assert found.gflops == pytest.approx(14.0, abs=1.0)
    assert found.parameters == pytest.approx(31.1e6, rel=0.01)  # 32.28 M less three classifiers of 751
    assert (found.peak_gflops_per_second, found.share_of_peak) == (None, None)


def latency(images_per_second: float, scope: Scope = "model") -> Latency:
    return Latency(8, scope, False, 50, 1.0, 1.0, 1.0, 0.0, images_per_second, 1.0, 1.0, 1.0)


def test_the_share_is_of_the_fastest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "measured_peak", lambda device: 100.0)
    spec = spec_of("baseline", "resnet18", 96, 64)
    found = compute_of(spec, [latency(10.0), latency(20.0), latency(90.0, "end to end")], "cpu")
    assert found.share_of_peak == pytest.approx(found.gflops * 20 / 100)
    assert compute_of(spec, [], "cpu").share_of_peak is None


def test_the_peak_of_this_machine_is_measured_once() -> None:
    peak = measured_peak("cpu")
    assert peak is not None
    assert 0.1 < peak < 1e6
    assert measured_peak("cpu") == peak


def test_other_backbones() -> None:
    with pytest.raises(ModelError, match="a backbone 'vit' are not known"):
        compute_of(spec_of("pmm", "vit", 96, 64), [], "cpu")
