"""FP16 and INT8 graphs have the types of their names, are close to FP32, and quantize where engines fuse."""

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from people import write_people
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

import pmm_edge
from pmm_edge.errors import CheckFailedError, DataError, PmmWarning
from pmm_edge.export import ExportedFile, export, quantize
from pmm_edge.export.exporter import INT8_OPSET
from pmm_edge.export.graph import LAYERS, Parts, layer_names, onnx_graph, row_preprocessing, split
from pmm_edge.export.quantize import METHODS, Calibration, Ranges, read_calibration, value_ranges
from pmm_edge.model import load_checkpoint
from pmm_edge.model.backbone import GlobalMean
from pmm_edge.retrieval.distances import cosines
from pmm_edge.runtime.torch_backend import Preprocess
from pmm_edge.spec import FLOAT16_MAX, InputSpec, ModelSpec, Quantization, describe_precision

SIZE = InputSpec(96, 64)
TARGETS = ("cpu", "tensorrt")


class Mini(nn.Module):
    """Two residual blocks and two linear layers, small enough to quantize many times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 7, 8)
        self.convolutions = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.heads = nn.ModuleList(nn.Linear(8, 16) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images).relu()
        for first, second in (self.convolutions[:2], self.convolutions[2:]):
            features = (second(first(features).relu()) + features).relu()
        pooled = features.mean(dim=(2, 3)), features.amax(dim=(2, 3))
        return torch.cat([head(values) for head, values in zip(self.heads, pooled, strict=True)], dim=1).relu()


class Gated(nn.Module):
    """A depthwise convolution, HardSwish and a squeeze-and-excitation gate."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.depthwise = nn.Conv2d(3, 8, 7, 8), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.depthwise.weight.data *= 30
        self.gate, self.last = SqueezeExcitation(8, 4, scale_activation=nn.Hardsigmoid), nn.Conv2d(8, 32, 1)
        self.gate.avgpool = GlobalMean()

    def forward(self, images: Tensor) -> Tensor:
        features = nn.functional.hardswish(self.depthwise(self.stem(images).relu()))
        return self.last(self.gate(features)).mean(dim=(2, 3))


@pytest.fixture(scope="module")
def mini_spec(tiny_checkpoint: Path) -> ModelSpec:
    trained = load_checkpoint(tiny_checkpoint).spec
    quantization = Quantization("tensorrt", "minmax", 0, float_type="fp16")
    return replace(trained, input=InputSpec(96, 64, "uint8"), embedding_size=32, quantization=quantization)


@pytest.fixture(scope="module")
def mini(mini_spec: ModelSpec) -> Parts:
    return split(onnx_graph(nn.Sequential(Preprocess(mini_spec.input), Mini()).eval(), mini_spec, INT8_OPSET))


@pytest.fixture(scope="module")
def calibration(people: Path) -> Calibration:
    return read_calibration(people, SIZE)


@pytest.fixture(scope="module")
def ranges(mini: Parts, calibration: Calibration) -> dict[str, Ranges]:
    return {kind: value_ranges(mini.network, calibration.ranges, SIZE, "minmax", kind) for kind in TARGETS}


def run(model: onnx.ModelProto, crops: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": crops})[0]


class Graph:
    """An ONNX model, indexed."""

    def __init__(self, model: Path | onnx.ModelProto) -> None:
        self.model = onnx.load(model) if isinstance(model, Path) else model
        self.nodes = self.model.graph.node
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in self.model.graph.initializer}
        self.producer = {name: node for node in self.nodes for name in node.output}
        self.layers = [node for node in self.nodes if node.op_type in ("Conv", "Gemm")]
        self.int8_layers = [node.name for node in self.layers if node.input[1] in self.producer]
        additions = [node for node in self.nodes if node.op_type == "Add" and node.input[1] not in self.constants]
        self.added = [self.producers(node) for node in additions]
        self.zero_points = [self.constants[node.input[2]] for node in self.nodes if node.op_type == "QuantizeLinear"]

    def producers(self, node: onnx.NodeProto) -> list[str]:
        return [self.producer[name].op_type for name in node.input]


def value_types(model: onnx.ModelProto) -> dict[str, int]:
    """Data type of each value and constant, by name."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in model.graph.initializer}


def test_fp16_is_float16_from_first_convolution_to_output(fp16: ExportedFile, tiny_export: ExportedFile) -> None:
    assert fp16.cosine_min >= 0.9999
    assert fp16.size < 0.51 * tiny_export.size
    assert (fp16.spec.precision, fp16.spec.quantization) == ("fp16", None)
    assert 0 < fp16.largest_value < FLOAT16_MAX
    model = onnx.load(fp16.path)
    types = value_types(model)
    assert (types["images"], types["embeddings"]) == (TensorProto.UINT8, TensorProto.FLOAT)
    for node in model.graph.node:
        if node.op_type not in ("Cast", "Transpose", "Mul"):  # preprocessing, and the casts at both ends
            kinds = {types[name] for name in (*node.input, *node.output)} - {TensorProto.INT64}
            assert kinds == {TensorProto.FLOAT if "0.shift" in node.input else TensorProto.FLOAT16}, node.name
    assert sum(node.op_type == "Cast" for node in model.graph.node) == 3


def test_values_beyond_float16_are_an_error(mini: Parts, mini_spec: ModelSpec, calibration: Calibration) -> None:
    network = onnx.ModelProto.FromString(mini.network.SerializeToString())
    weight = next(tensor for tensor in network.graph.initializer if tensor.name.endswith("convolutions.0.weight"))
    for value, named in ((6e4, r"\(Conv\)"), (7e4, weight.name)):
        weight.CopyFrom(numpy_helper.from_array(np.full((8, 8, 3, 3), value, np.float32), weight.name))
        with pytest.raises(CheckFailedError, match=named):
            quantize.cast_to_fp16(network, value_ranges(network, calibration.held_out, SIZE))
        with pytest.raises(CheckFailedError, match=named):  # what calibration clips is a value all the same
            quantize.quantize_network(replace(mini, network=network), mini_spec, calibration, "percentile")


@pytest.mark.parametrize("target", TARGETS)
def test_int8_is_close_and_its_weights_are_symmetric_per_channel(
    target: str, int8: dict[str, ExportedFile], tiny_export: ExportedFile
) -> None:
    exported = int8[target]
    assert exported.cosine_mean >= 0.99
    for_tensorrt = target == "tensorrt"
    assert exported.size < (0.28 if for_tensorrt else 0.27) * tiny_export.size
    float_type, opset = ("fp16", 19) if for_tensorrt else ("fp32", 18)
    assert exported.spec.quantization == Quantization(target, "minmax", 48, "people", (), float_type)
    assert f"int8 and {float_type} for {target}" in describe_precision(exported.spec)
    assert pmm_edge.load(exported.path, "cpu").spec == exported.spec
    graph = Graph(exported.path)
    assert len(graph.layers) == 25
    assert [(entry.domain, entry.version) for entry in graph.model.opset_import] == [("", opset)]
    assert exported.spec.tools["opset"] == str(opset)
    for layer in graph.layers:
        if for_tensorrt and layer.op_type == "Gemm":
            continue
        weights, scales, zeros = (graph.constants[name] for name in graph.producer[layer.input[1]].input)
        assert (weights.dtype, scales.shape, zeros.any()) == (np.int8, (weights.shape[0],), False)
        assert graph.producer[layer.input[0]].op_type == "DequantizeLinear", layer.name
        # Two products fit in 16 bits, whichever axis an engine pairs: without VNNI their sum saturates.
        for layout in (weights, np.moveaxis(weights, 1, -1)) if target == "cpu" else ():
            rows = layout.reshape(len(weights), -1).astype(int)
            pairs = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2))).reshape(-1, 2)
            assert np.abs(pairs.sum(axis=1)).max() <= 128


@pytest.mark.parametrize("target", TARGETS)
def test_weights_round_to_their_neighbors_and_keep_each_channels_sum(target: str) -> None:
    weights = np.random.default_rng(0).normal(size=(5, 7, 3, 3)).astype(np.float32)
    weights[2] = 0
    weights[4] *= 1e-6  # its float16 scale is subnormal
    rounded, scale = quantize.round_weights(weights, target)
    errors = rounded - weights / scale[:, None, None, None]
    assert np.abs(errors).max() < 1
    assert np.abs(errors.reshape(5, -1).sum(axis=1)).max() <= 0.5 + 1e-3
    assert not rounded[2].any()
    if target == "tensorrt":
        assert (scale.astype(np.float16) == scale).all()
        assert (np.abs(rounded).reshape(5, -1).max(axis=1)[:4] == [127, 127, 0, 127]).all()


def test_what_is_not_int8_for_tensorrt_is_float16(int8: dict[str, ExportedFile]) -> None:
    """From the first convolution to the output; preprocessing is float32, as in FP16 exports."""
    graph = Graph(int8["tensorrt"].path)
    types = value_types(graph.model)
    assert (types["images"], types["embeddings"]) == (TensorProto.UINT8, TensorProto.FLOAT)
    seen = Counter[str]()
    names = {TensorProto.FLOAT: "float", TensorProto.FLOAT16: "float16", TensorProto.INT8: "int8"}
    for node in graph.nodes:
        if node.op_type not in ("Cast", "Transpose", "Mul") and "0.shift" not in node.input:
            kinds = [names[types[name]] for name in (*node.input, *node.output) if types[name] != TensorProto.INT64]
            expected = {
                "QuantizeLinear": ["float16", "float16", "int8", "int8"],
                "DequantizeLinear": ["int8", "float16", "int8", "float16"],
            }
            assert kinds == expected.get(node.op_type, ["float16"] * len(kinds)), node.name
            seen[node.op_type] += 1
    assert (seen["Conv"], seen["Gemm"], seen["MaxPool"]) == (23, 2, 1)
    casts = [(types[node.input[0]], types[node.output[0]]) for node in graph.nodes if node.op_type == "Cast"]
    half, single = TensorProto.FLOAT16, TensorProto.FLOAT
    assert casts == [(TensorProto.UINT8, single), (single, half), (half, single)]


def test_tensorrt_gets_symmetric_activations_where_it_fuses_them(int8: dict[str, ExportedFile]) -> None:
    graph = Graph(int8["tensorrt"].path)
    assert {(zero.dtype, zero.item()) for zero in graph.zero_points} == {(np.dtype(np.int8), 0)}
    assert graph.added == 9 * [["Conv", "DequantizeLinear"]]
    gemms = [layer for layer in graph.layers if layer.op_type == "Gemm"]
    assert len(graph.int8_layers) == 23 and not {gemm.name for gemm in gemms} & {*graph.int8_layers}
    # Pooling in INT8 needs one scale for its input and output.
    (pool,) = (node for node in graph.nodes if node.op_type == "MaxPool")
    (after,) = (node for node in graph.nodes if node.op_type == "QuantizeLinear" and node.input[0] == pool.output[0])
    before = graph.producer[pool.input[0]]
    assert before.op_type == "DequantizeLinear"
    assert graph.constants[before.input[1]] == graph.constants[after.input[1]]


def test_onnx_runtime_computes_every_layer_of_the_cpu_graph_in_int8(
    int8: dict[str, ExportedFile], tmp_path: Path
) -> None:
    graph = Graph(int8["cpu"].path)
    assert {zero.dtype for zero in graph.zero_points} == {np.dtype(np.uint8)}
    assert sum(node.op_type == "Relu" for node in graph.nodes) == 1  # the others are rounding at zero
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "run.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(int8["cpu"].path, options, providers=["CPUExecutionProvider"])
    run = Counter(node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node)
    assert (run["QLinearConv"], run["QGemm"], run["QLinearAdd"]) == (23, 2, 9)
    assert not {"Conv", "FusedConv", "Gemm", "FusedGemm"} & run.keys()
    assert run["QuantizeLinear"] + run["DequantizeLinear"] == 3  # the image, and around the mean of the last map


def test_row_preprocessing_gives_the_same_numbers(
    int8: dict[str, ExportedFile], tiny_onnx: Path, crops: np.ndarray
) -> None:
    before = split(onnx.load(tiny_onnx)).before
    np.testing.assert_array_equal(run(row_preprocessing(before, SIZE), crops), run(before, crops))
    assert [node.op_type for node in Graph(int8["cpu"].path).nodes[:3]] == ["Reshape", "Cast", "Mul"]


def test_forms_share_one_quantized_network(int8_cpu: list[ExportedFile], crops: np.ndarray) -> None:
    normalized, uint8 = int8_cpu
    assert normalized.search == uint8.search
    assert uint8.search.layers == []  # mAP holds
    assert 0 < uint8.search.map_float32 <= 1 and 0 < uint8.search.map_int8 <= 1
    assert replace(normalized.spec, input=uint8.spec.input) == uint8.spec
    first, second = (Graph(item.path).constants for item in int8_cpu)
    weights = [name for name in first if name.endswith(".weight_quantized")]
    assert len(weights) == 25
    assert all(np.array_equal(first[name], second[name]) for name in weights)
    base, other = (pmm_edge.load(item.path, "cpu").embed(crops) for item in int8_cpu)
    assert cosines(base, other).min() > 0.9999


@pytest.mark.parametrize(("opset", "precision"), [(17, "fp16"), (20, "int8")])
def test_reduced_precision_follows_the_graph_options(
    opset: int, precision: str, tiny_checkpoint: Path, people: Path, tmp_path: Path, crops: np.ndarray
) -> None:
    out = tmp_path / "model.onnx"
    options = {"input_form": "raw", "opset": opset, "normalize_output": True, "static_batch": 2}
    if precision == "int8":
        options |= {"calibration": people, "target": "cpu", "calibration_method": "minmax"}
    with pytest.warns(PmmWarning) if precision == "fp16" else nullcontext():  # not checked on images
        exported = export(tiny_checkpoint, out=out, precision=precision, **options).files[0]
    assert (exported.largest_value, exported.spec.tools["opset"]) == (None, str(opset))
    embeddings = pmm_edge.load(out, "cpu").embed(crops)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    model = onnx.load(out)
    assert model.opset_import[0].version == opset
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2


def test_best_calibration_method_is_selected(mini: Parts, mini_spec: ModelSpec, calibration: Calibration) -> None:
    expected = run(mini.join(mini.network), calibration.selection)
    losses = {}
    for method in METHODS:
        network, quantization, _ = quantize.quantize_network(mini, mini_spec, calibration, method)
        assert quantization == Quantization("tensorrt", method, 48, "people", float_type="fp16")
        losses[method] = 1 - cosines(run(mini.join(network), calibration.selection), expected).mean()
    _, quantization, _ = quantize.quantize_network(mini, mini_spec, calibration)
    assert quantization.method == min(losses, key=losses.__getitem__)


@pytest.mark.parametrize("target", TARGETS)
def test_layers_are_quantized_as_requested(target: str, mini: Parts, ranges: dict[str, Ranges]) -> None:
    operators = ("Conv",) if target == "tensorrt" else LAYERS
    nodes = list(layer_names(mini.network, operators))
    for float_layers, only, expected in (
        ([], [], nodes),
        (nodes[2:4], [], nodes[:2] + nodes[4:]),
        ([], nodes[3:4], nodes[3:4]),
        (nodes, [], []),
    ):
        quantized = quantize.quantize(mini.network, ranges[target], target, float_layers, only)
        graph = Graph(quantized)
        assert graph.int8_layers == expected
        kept = [graph.constants[layer.input[1]] for layer in graph.layers if layer.name not in expected]
        assert {weights.dtype for weights in kept} <= {np.dtype(np.float16 if target == "tensorrt" else np.float32)}
    kinds = [node.op_type for node in quantized.graph.node if node.op_type != "Cast"]
    assert kinds == [node.op_type for node in mini.network.graph.node]


@pytest.mark.parametrize("target", TARGETS)
def test_gates_stay_float_and_what_hardswish_reads_starts_at_minus_3(
    target: str, mini_spec: ModelSpec, calibration: Calibration
) -> None:
    network = split(
        onnx_graph(nn.Sequential(Preprocess(mini_spec.input), Gated()).eval(), mini_spec, INT8_OPSET)
    ).network
    found = value_ranges(network, calibration.ranges, SIZE, "minmax", target)
    graph = Graph(quantize.quantize(network, found, target))
    names = layer_names(network)
    assert {names[node] for node in graph.int8_layers} == {"stem", "depthwise", "last"}
    assert len(graph.layers) == 5
    if target == "cpu":
        (swish,) = (node for node in graph.nodes if node.op_type == "HardSwish")
        scale, zero_point = (graph.constants[name] for name in graph.producer[swish.input[0]].input[1:])
        assert -zero_point.astype(float) * scale == pytest.approx(-3, abs=float(scale))
        assert min(low for low, _ in found.values()) < -4


def test_operators_after_a_float_layer_stay_float(mini: Parts, ranges: dict[str, Ranges]) -> None:
    second_of_first_block = list(layer_names(mini.network))[2]
    # The addition of its own block. The shortcut of the next one comes from it, but its convolution is INT8.
    for float_layers, in_int8 in (([], [True, True]), ([second_of_first_block], [False, True])):
        added = Graph(quantize.quantize(mini.network, ranges["cpu"], "cpu", float_layers)).added
        assert [set(producers) == {"DequantizeLinear"} for producers in added] == in_int8


def test_search_keeps_the_fewest_most_sensitive_layers_in_float(
    mini: Parts,
    mini_spec: ModelSpec,
    calibration: Calibration,
    ranges: dict[str, Ranges],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mAP of so few images does not react to INT8: the mean cosine to float32 takes its place."""
    float32 = run(mini.join(mini.network), calibration.held_out)

    def closeness(embeddings: np.ndarray) -> float:
        return float(cosines(float32, embeddings).mean())

    def embed_dataset(embedder: pmm_edge.runtime.Embedder, *_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(embeddings=embedder.embed(calibration.held_out))

    def drop(float_layers: list[str]) -> float:
        network = quantize.quantize(mini.network, ranges["tensorrt"], "tensorrt", float_layers)
        return 100 * (1 - closeness(run(mini.join(network), calibration.held_out)))

    monkeypatch.setattr(quantize, "embed_dataset", embed_dataset)
    monkeypatch.setattr(quantize, "evaluate_dataset", lambda _, found: SimpleNamespace(mAP=closeness(found)))
    for share in (0.7, 0.5, 0.2):
        allowed = share * drop([])
        network, quantization, search = quantize.quantize_network(mini, mini_spec, calibration, "minmax", allowed)
        assert search and search.map_float32 == pytest.approx(1)
        layers, names = search.layers, layer_names(mini.network, ["Conv"])
        assert [layer.loss for layer in layers] == sorted((layer.loss for layer in layers), reverse=True)
        assert (len(layers), sum(layer.work for layer in layers)) == (5, pytest.approx(1, abs=0.02))
        kept = tuple(layer.layer for layer in layers if layer.kept)
        assert kept == quantization.float_layers == tuple(layer.layer for layer in layers[: len(kept)])
        assert {names[node] for node in names.keys() - Graph(network).int8_layers} == set(kept)
        nodes = {name: node for node, name in names.items()}
        assert drop([nodes[name] for name in kept]) <= allowed < drop([nodes[name] for name in kept[:-1]])
    with pytest.raises(CheckFailedError):
        quantize.quantize_network(mini, mini_spec, calibration, "minmax", -1)


def test_a_low_cosine_keeps_layers_in_float_without_a_limit_of_map(
    mini: Parts, mini_spec: ModelSpec, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, quantization, search = quantize.quantize_network(mini, mini_spec, calibration, "minmax")
    assert (quantization.float_layers, search) == ((), None)

    def loss(network: onnx.ModelProto) -> float:
        float32, int8 = (run(mini.join(each), calibration.selection) for each in (mini.network, network))
        return 1 - float(cosines(float32, int8).mean())

    monkeypatch.setattr(quantize, "MAX_LOSS", loss(whole) / 2)
    network, quantization, search = quantize.quantize_network(mini, mini_spec, calibration, "minmax")
    assert search and search.map_int8 is None and 0 < len(quantization.float_layers) < 5
    assert loss(network) <= loss(whole) / 2


def test_unusable_calibration_data(people: Path, tmp_path: Path) -> None:
    for data in (write_people(tmp_path / "few", train=60), tmp_path / "none", people / "query"):
        with pytest.raises(DataError, match=str(data)) as caught:
            read_calibration(data, SIZE)
        assert "\n" not in str(caught.value)


def test_unreadable_images_are_skipped_and_few_suffice_for_fp16(tiny_checkpoint: Path, tmp_path: Path) -> None:
    data = write_people(tmp_path / "data", train=64)
    paths = sorted((data / "bounding_box_train").iterdir())
    paths[4].write_bytes(paths[4].read_bytes()[:300])
    with pytest.warns(PmmWarning, match=paths[4].name):
        assert len(read_calibration(data, SIZE).ranges) == 42
    for path in paths[7:]:
        path.write_bytes(b"")
    with pytest.raises(DataError), pytest.warns(PmmWarning):
        read_calibration(data, SIZE)
    for path in paths[7:]:
        path.unlink()
    with pytest.warns(PmmWarning, match=paths[4].name):
        exported = export(tiny_checkpoint, out=tmp_path / "m.onnx", precision="fp16", calibration=data).files[0]
    assert exported.largest_value


def test_people_of_the_test_split_give_a_warning(tmp_path: Path) -> None:
    with pytest.warns(PmmWarning):
        read_calibration(write_people(tmp_path / "same", train=64, train_pid=101), SIZE)


def test_parts_of_the_calibration_data_are_disjoint(calibration: Calibration) -> None:
    parts = (calibration.ranges, calibration.selection, calibration.held_out)
    assert [len(part) for part in parts] == [48, 12, 12]
    assert len({crop.tobytes() for part in parts for crop in part}) == 72


def test_tensorrt_calibrates_on_512_crops(tiny_checkpoint: Path, people: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def stop(*arguments: object) -> None:
        read.append(arguments[4])
        raise DataError("stop")

    monkeypatch.setattr(quantize, "read_calibration", stop)
    for options in ({"target": "tensorrt"}, {"target": "cpu"}):
        with pytest.raises(DataError):
            export(tiny_checkpoint, precision="int8", calibration=people, **options)
    assert read == [512 * 6 // 4, quantize.MAX_IMAGES]
    assert len(read_calibration(people, SIZE, most=66).ranges) == 44
