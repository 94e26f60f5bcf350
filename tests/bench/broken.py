"""Graph surgery: exports with the mistakes that real exports have."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pmm_edge.export.exporter import INT8_OPSET
from pmm_edge.export.graph import finalize, split
from pmm_edge.export.quantize import cast_to_fp16, quantize, value_ranges
from pmm_edge.images import Pixels, read_crop
from pmm_edge.runtime import load
from pmm_edge.runtime.embedder import INPUT, OUTPUT
from pmm_edge.spec import QuantizationTarget

Constants = dict[str, np.ndarray]
Alter = Callable[[Constants, onnx.GraphProto], None]


def decoded(graph: onnx.GraphProto) -> Constants:
    return {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in graph.initializer}


def altered(source: Path, out: Path, alter: Alter) -> Path:
    """Copy an export with other constants or nodes."""
    model = onnx.load(source)
    constants = decoded(model.graph)
    alter(constants, model.graph)
    del model.graph.initializer[:]
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    del model.metadata_props[1:]  # the digest
    onnx.save(model, out)
    return out


def constants_of(graph: onnx.GraphProto, operator: str, constants: Constants) -> list[str]:
    """Names of the constants of the first node of this type."""
    node = next(node for node in graph.node if node.op_type == operator)
    return [name for name in node.input if name in constants]


def sees_bgr(constants: Constants, graph: onnx.GraphProto) -> None:
    """The input is BGR, and nothing swaps it back."""
    for operator, axis in (("Mul", 0), ("Add", 0), ("Conv", 1)):
        name = constants_of(graph, operator, constants)[0]
        constants[name] = np.flip(constants[name], axis).copy()


def normalizes_twice(constants: Constants, graph: onnx.GraphProto) -> None:
    scale, shift = (constants_of(graph, operator, constants)[0] for operator in ("Mul", "Add"))
    # scale and shift are of 0..255; the second time the input is taken for 0..1
    constants[shift] = constants[shift] * (255 * constants[scale]) + constants[shift]
    constants[scale] = constants[scale] * 255 * constants[scale]


def does_not_normalize(constants: Constants, graph: onnx.GraphProto) -> None:
    scale, shift = (constants_of(graph, operator, constants)[0] for operator in ("Mul", "Add"))
    constants[scale] = np.full_like(constants[scale], 1 / 255)
    constants[shift] = np.zeros_like(constants[shift])


def swaps_stages(constants: Constants, graph: onnx.GraphProto) -> None:
    """Stage II's 512 numbers where stage III's belong."""
    last = [node for node in graph.node if node.op_type == "Gemm"][-1]
    for name in set(last.input) & constants.keys():
        constants[name] = np.roll(constants[name], 512, axis=0)


def changes_a_layer(constants: Constants, graph: onnx.GraphProto) -> None:
    """A convolution in the middle with its output channels in another order."""
    name = "1.backbone.layer2.1.conv1.weight"
    constants[name] = constants[name][::-1].copy()


def sees_its_batch(constants: Constants, graph: onnx.GraphProto) -> None:
    """A little of the batch's mean is added to every row."""
    constants.update(zero_axis=np.array([0]), share=np.array(0.003, np.float32))
    append(
        graph,
        helper.make_node("ReduceMean", ["{}", "zero_axis"], ["batch_mean"], keepdims=1),
        helper.make_node("Mul", ["batch_mean", "share"], ["little"]),
        helper.make_node("Add", ["{}", "little"], [OUTPUT]),
    )


def gives_nan_for(brightness: float) -> Alter:
    """NaN for images whose mean is below `brightness`: a root of a negative number."""

    def alter(constants: Constants, graph: onnx.GraphProto) -> None:
        constants.update(image_axes=np.array([1, 2, 3]), bar=np.array(brightness, np.float32), column=np.array([1]))
        append(
            graph,
            helper.make_node("Cast", [INPUT], ["pixels"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["pixels", "image_axes"], ["brightness"], keepdims=0),
            helper.make_node("Sub", ["brightness", "bar"], ["above"]),
            helper.make_node("Sqrt", ["above"], ["nan_if_below"]),
            helper.make_node("Sub", ["nan_if_below", "nan_if_below"], ["nan_or_zero"]),
            helper.make_node("Unsqueeze", ["nan_or_zero", "column"], ["added"]),
            helper.make_node("Add", ["{}", "added"], [OUTPUT]),
        )

    return alter


def gives_one_embedding(constants: Constants, graph: onnx.GraphProto) -> None:
    constants[constants_of(graph, "Mul", constants)[0]] *= 0


def is_stretched(constants: Constants, graph: onnx.GraphProto, factor: float = 0.1) -> None:
    constants["factor"] = np.array(factor, np.float32)
    append(graph, helper.make_node("Mul", ["{}", "factor"], [OUTPUT]))


def crops_of(folder: Path) -> Pixels:
    return np.stack([read_crop(path, 96, 64) for path in sorted(folder.iterdir())])


def with_large_values(source: Path, out: Path) -> Path:
    """The same function, with values between two convolutions scaled up and back; FP32 can represent them."""
    first, second = (f"1.backbone.layer3.0.conv{number}" for number in (1, 2))

    def alter(constants: Constants, graph: onnx.GraphProto) -> None:
        factor = 2e5 / np.abs(constants[f"{first}.bias"]).max()
        for name, scale in ((f"{first}.weight", factor), (f"{first}.bias", factor), (f"{second}.weight", 1 / factor)):
            constants[name] *= np.float32(scale)

    return altered(source, out, alter)


def fp16(source: Path, out: Path) -> Path:
    """An export in FP16."""
    parts = split(onnx.load(source))
    return saved(parts.join(cast_to_fp16(parts.network)[0]), source, out, precision="fp16")


def overflowing_fp16(source: Path, large: Path, out: Path) -> Path:
    """`large` in FP16 by a tool that casts without checks: values out of range become infinite.

    ONNX Runtime computes float16 graphs in float32 on CPUs, where only weights overflow.
    """
    parts, whole = split(onnx.load(source)), decoded(onnx.load(large).graph)
    half, _ = cast_to_fp16(parts.network)
    for tensor in half.graph.initializer:
        if tensor.name.startswith("1.backbone.layer3.0.conv"):
            with np.errstate(over="ignore"):
                tensor.CopyFrom(numpy_helper.from_array(whole[tensor.name].astype(np.float16), tensor.name))
    return saved(parts.join(half), source, out, precision="fp16")


def int8(source: Path, out: Path, target: QuantizationTarget, crops: Pixels) -> Path:
    """An export in INT8, calibrated on crops (N, height, width, 3) uint8."""
    model, size = onnx.load(source), load(source, "cpu").spec.input
    if target == "tensorrt":
        model.opset_import[0].version = INT8_OPSET  # of its float16 scales
    parts = split(model)
    ranges = value_ranges(parts.network, crops, size, "minmax", target)
    return saved(parts.join(quantize(parts.network, ranges, target)), source, out, precision="int8")


def saved(model: onnx.ModelProto, source: Path, out: Path, **changes: object) -> Path:
    """A graph with the spec of an export, except for `changes`."""
    onnx.save(finalize(model, replace(load(source, "cpu").spec, **changes)), out)
    return out


def append(graph: onnx.GraphProto, *nodes: onnx.NodeProto) -> None:
    """Append nodes that read the embeddings as `{}` and output new ones."""
    for node in graph.node:
        node.output[:] = ["embeddings_before" if name == OUTPUT else name for name in node.output]
    for node in nodes:
        node.input[:] = [name.format("embeddings_before") for name in node.input]
    graph.node.extend(nodes)


def unit_length(source: Path, out: Path) -> Path:
    """An export with normalized output."""
    model = onnx.load(source)
    append(model.graph, helper.make_node("LpNormalization", ["{}"], [OUTPUT], axis=1, p=2))
    return saved(model, source, out, normalized_output=True)


def cut_in_half(source: Path, out: Path) -> Path:
    """The first half of the embedding, and a spec that matches."""
    model, spec = onnx.load(source), load(source, "cpu").spec
    width = spec.embedding_size // 2
    for name, value in (("start", 0), ("stop", width), ("axis", 1)):
        model.graph.initializer.append(numpy_helper.from_array(np.array([value]), name))
    append(model.graph, helper.make_node("Slice", ["{}", "start", "stop", "axis"], [OUTPUT]))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = width
    del model.metadata_props[1:]  # the digest
    model.metadata_props[0].value = replace(spec, embedding_size=width, stages={"I": (0, 512)}).to_json()
    onnx.save(model, out)
    return out


def bakes_its_batch(constants: Constants, graph: onnx.GraphProto) -> None:
    """A reshape with a fixed batch size: the graph runs with batch 1 only."""
    size = graph.output[0].type.tensor_type.shape.dim[1].dim_value
    constants["baked.shape"] = np.array([1, size], np.int64)
    append(graph, helper.make_node("Reshape", ["{}", "baked.shape"], [OUTPUT]))
