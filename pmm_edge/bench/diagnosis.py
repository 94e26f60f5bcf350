"""Diagnosis: which known mistake explains a difference from the reference, and at which node of the graph it begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import permutations
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pmm_edge.bench.report import Cause, Departure, LikelyCause
from pmm_edge.console import Report, silent
from pmm_edge.errors import ModelError
from pmm_edge.images import Pixels, network_input, normalize
from pmm_edge.retrieval.distances import cosines
from pmm_edge.runtime import Embedder
from pmm_edge.runtime.embedder import INPUT, Embeddings
from pmm_edge.spec import InputSpec, ModelSpec

if TYPE_CHECKING:
    import onnx

IMAGES = 16
"""Number of images that each mistake is tried on."""
MAX_UNEXPLAINED = 0.2
"""A cause leaves at most this fraction of the difference (1 - mean cosine) unexplained,"""
MIN_COSINE = 0.95
"""and reaches this mean cosine: INT8 adds its own rounding."""

Planes = NDArray[np.float32]


# Known mistakes: the reference is fed what each mistake would feed it, and compared with the model


def _nhwc_as_nchw(pixels: Planes) -> Planes:
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)).reshape(pixels.shape)


PIXEL_MISTAKES: Mapping[Cause, Callable[[Planes], Planes]] = {
    Cause.BGR: lambda x: x[:, ::-1],
    Cause.MIRRORED: lambda x: x[..., ::-1],
    Cause.UPSIDE_DOWN: lambda x: x[:, :, ::-1],
    Cause.NHWC_AS_NCHW: _nhwc_as_nchw,
}
"""(N, 3, H, W) pixels in 0..255 -> the wrong pixels, which are then normalized correctly."""
NORMALIZATION_MISTAKES: Mapping[Cause, Callable[[Planes, InputSpec], Planes]] = {
    Cause.BGR_AFTER_NORMALIZATION: lambda x, s: normalize(x, s)[:, ::-1],
    Cause.NORMALIZED_TWICE: lambda x, s: normalize(255 * normalize(x, s), s),
    Cause.NORMALIZED_AND_SCALED_TWICE: lambda x, s: normalize(normalize(x, s), s),
    Cause.NOT_NORMALIZED_UNIT: lambda x, s: x / np.float32(255),
    Cause.NOT_NORMALIZED_RAW: lambda x, s: x,
    Cause.NORMALIZED_SYMMETRICALLY: lambda x, s: x / np.float32(127.5) - np.float32(1),
    Cause.MEAN_MISSING: lambda x, s: normalize(x, replace(s, mean=(0, 0, 0))),
    Cause.STD_MISSING: lambda x, s: normalize(x, replace(s, std=(1, 1, 1))),
    Cause.SCALING_MISSING: lambda x, s: normalize(255 * x, s),
    Cause.SCALED_TWICE: lambda x, s: normalize(x / np.float32(255), s),
}
"""(N, 3, H, W) pixels in 0..255 -> what the network receives. Only engines without preprocessing can be fed these."""


def likely_cause(
    reference: Embedder,
    right: Embeddings,
    candidate: Embeddings,
    spec: ModelSpec,
    images: Pixels,
    report: Report = silent,
) -> LikelyCause | None:
    """Return the known mistake that explains the difference between a model and the reference, or None.

    Args:
        reference: the reference, which is run on wrong inputs.
        right: (N, D), its embeddings of the images.
        candidate: (N, D), the model's embeddings.
        spec: the model's.
        images: (N, height, width, 3) uint8 of the reference's size.
        report: called for each mistake.
    """
    tried = [
        LikelyCause(cause, float(cosines(wrong, candidate).mean()), stages)
        for cause, stages, wrong in (*_wrong_outputs(right, spec), *_wrong_inputs(reference, images, report))
    ]
    best = max(tried, key=lambda one: one.cosine or 0.0, default=None)
    if best is None or best.cosine is None or best.cosine < MIN_COSINE:
        return None
    unexplained = MAX_UNEXPLAINED * (1 - float(cosines(right, candidate).mean()))
    return best if 1 - best.cosine <= unexplained else None


def _wrong_outputs(right: Embeddings, spec: ModelSpec) -> Iterator[tuple[Cause, tuple[str, ...], Embeddings]]:
    """Yield the reference's embeddings with stages in another order, and with each stage normalized by itself."""
    slices = {name: right[:, start:stop] for name, (start, stop) in spec.stages.items()}
    if len(slices) < 2:
        return
    for order in permutations(slices):
        if order != tuple(slices):
            yield Cause.STAGES_SWAPPED, order, np.concatenate([slices[name] for name in order], axis=1)
    lengths = [np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12) for part in slices.values()]
    units = [part / length for part, length in zip(slices.values(), lengths, strict=True)]
    yield Cause.STAGES_NORMALIZED, (), np.concatenate(units, axis=1)


def _wrong_inputs(
    reference: Embedder, images: Pixels, report: Report
) -> Iterator[tuple[Cause, tuple[str, ...], Embeddings]]:
    """Yield the reference's embeddings of inputs that each mistake would feed it."""
    size, what, total = reference.spec.input, "looking for the cause", len(PIXEL_MISTAKES) + len(NORMALIZATION_MISTAKES)
    pixels = np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)
    for done, (cause, spoil) in enumerate(PIXEL_MISTAKES.items()):
        report(what, done, total, cause.value)
        wrong = np.ascontiguousarray(spoil(pixels).transpose(0, 2, 3, 1).astype(np.uint8))
        yield cause, (), reference.embed_prepared(wrong)
    for done, (cause, change) in enumerate(NORMALIZATION_MISTAKES.items(), start=len(PIXEL_MISTAKES)):
        report(what, done, total, cause.value)
        embeddings = reference.embed_normalized(np.ascontiguousarray(change(pixels, size), dtype=np.float32))
        if embeddings is not None:
            yield cause, (), embeddings
    report(what, total, total)


# --explain: the first node of the graph that departs

MAX_LOSS = {"fp32": 1e-4, "fp16": 1e-3, "int8": 1e-2}
"""Loss of a node's cosine that rounding explains."""
FACTOR = 5
"""A node at fault loses this many times what its inputs had lost."""

_PASSED_ON = ("Cast", "Identity", "QuantizeLinear", "DequantizeLinear")
"""Operators that only change the data type."""
_PRODUCTS = ("Conv", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul")

_Value = NDArray[Any]


def first_departure(model: Embedder, reference: Embedder, image: Pixels) -> Departure:
    """Return the first node whose inputs agree with the reference and whose output does not.

    Where no single node is at fault, as when rounding accumulates, return the node that loses most.

    Args:
        model: an ONNX file.
        reference: an ONNX file, a checkpoint or exported weights; the latter two are exported in FP32 first.
        image: (1, height, width, 3) uint8 of the model's size.

    Raises:
        ModelError: the onnx package is missing, one of the two cannot be read as a graph, or the graphs have nothing in
            common or agree at every node.
    """
    if model.path.suffix != ".onnx":
        raise ModelError(
            f"--explain reads ONNX files, not {model.path}", "Explain the ONNX file that the model was built from"
        )
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise ModelError("--explain needs the onnx package", "pip install 'pmm-edge[train]'") from error
    own = _Graph(onnx.load(model.path), model.spec.input, image)
    right = _Graph(*_reference_graph(reference, model.spec), image)
    points = list(_points(own, right, _matched(own, right)))
    if not points:
        raise ModelError(
            f"--explain: the graphs of {model.path} and {reference.path} have nothing in common",
            "Name the checkpoint that the model was exported from with --reference",
        )
    least = MAX_LOSS[model.spec.precision]
    at_fault = next((point for point in points if point.lost > max(least, FACTOR * (1 - point.before))), None)
    point = at_fault or max(points, key=lambda point: point.lost)
    if point.lost <= 0:
        raise ModelError(
            f"every node of {model.path} agrees with {reference.path} when it runs alone",
            "An optimization of the engine is at fault: try another version or device",
        )
    node, twin = point.node, right.maker[point.same]
    values, expected = own.values[point.output], right.values[point.same]
    return Departure(
        node=node.name,
        operator=node.op_type,
        output=point.output,
        layer=_layer(node, own) or _layer(twin, right),
        cosine=point.cosine,
        before=point.before,
        gradual=at_fault is None,
        dtype=str(values.dtype),
        value_range=_range(values),
        reference_range=_range(expected),
        weights_cosine=_weights_cosine(node, twin, own, right),
    )


class _Graph:
    """An ONNX graph and all values that it computes for one image."""

    def __init__(self, model: onnx.ModelProto, size: InputSpec, image: Pixels) -> None:
        self.model, self._input = model, network_input(image, size)
        self.nodes: Sequence[onnx.NodeProto] = list(model.graph.node)
        self.maker = {output: node for node in self.nodes for output in node.output}

    @cached_property
    def values(self) -> Mapping[str, _Value]:
        """The input, the constants and the output of each node, by name.

        Raises:
            ModelError: ONNX Runtime cannot run the graph.
        """
        import onnx
        import onnxruntime

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        existing = {value.name for value in model.graph.output}
        names = [output for node in self.nodes for output in node.output if output]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in existing)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        try:
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            batch = session.get_inputs()[0].shape[0]
            fed = np.repeat(self._input, batch, axis=0) if isinstance(batch, int) else self._input
            values = dict(zip(names, session.run(names, {INPUT: fed}), strict=True))
        except Exception as error:  # the exceptions of ONNX Runtime have no other common base
            raise ModelError(
                f"--explain cannot run the graph node by node ({str(error).splitlines()[0]})",
                "Try a machine with more memory or another version of onnxruntime",
            ) from error
        constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        return {INPUT: fed, **constants, **values}

    def source(self, name: str) -> str:
        """Return the value before casts and quantize/dequantize pairs."""
        while (node := self.maker.get(name)) is not None and node.op_type in _PASSED_ON:
            name = node.input[0]
        return name

    def products(self) -> list[onnx.NodeProto]:
        return [node for node in self.nodes if node.op_type in _PRODUCTS]

    def activations(self, node: onnx.NodeProto) -> list[str]:
        """Return the node's inputs that depend on the image."""
        return [name for name in node.input if self.source(name) in self.maker or self.source(name) == INPUT]


@dataclass(frozen=True)
class _Point:
    """A node whose output can be compared with the reference."""

    node: onnx.NodeProto
    output: str
    same: str
    """Name of the same value in the reference."""
    cosine: float
    before: float

    @property
    def lost(self) -> float:
        return self.before - self.cosine


def _reference_graph(reference: Embedder, spec: ModelSpec) -> tuple[onnx.ModelProto, InputSpec]:
    """Return the reference as a graph, and its input."""
    import onnx

    if reference.path.suffix == ".onnx":
        return onnx.load(reference.path), reference.spec.input
    if reference.backend != "torch":
        raise ModelError(
            f"--explain needs a checkpoint or an ONNX file as the reference, not {reference.path}",
            "Name one with --reference",
        )
    from pmm_edge.export.graph import inference_network, onnx_graph
    from pmm_edge.runtime.torch_backend import TorchEmbedder

    assert isinstance(reference, TorchEmbedder)
    network: Any = deepcopy(reference.network).cpu()
    spec = replace(spec, precision="fp32")
    return onnx_graph(inference_network(network, spec.input, spec.normalized_output), spec), spec.input


def _matched(own: _Graph, right: _Graph) -> dict[str, str]:
    """Map the model's values to those of the reference: by name, or by order where a tool renamed the graph."""
    same = {name: name for name in own.maker if name in right.maker}
    ours, theirs = own.products(), right.products()
    if 2 * sum(node.output[0] in same for node in ours) < len(ours):
        if len(ours) != len(theirs):
            return {}
        same = {one.output[0]: other.output[0] for one, other in zip(ours, theirs, strict=True)}
    for node in own.nodes:
        # A cast at the end takes over the name of the output; the value that it casts is the reference's.
        if node.op_type in ("Cast", "Identity") and node.output[0] in same:
            same.setdefault(node.input[0], same[node.output[0]])
    return {INPUT: INPUT, **same}


def _points(own: _Graph, right: _Graph, same: Mapping[str, str]) -> Iterator[_Point]:
    """Yield the model's nodes in order, as far as they can be compared with the reference."""

    @cache
    def cosine(name: str) -> float | None:
        """Return the cosine of a value to the reference; None where the reference does not have it."""
        twin = same.get(own.source(name))
        if twin is None or own.values[name].dtype.kind != "f":
            return None
        ours, theirs = own.values[name], right.values[twin]
        if ours.shape[1:] != theirs.shape[1:]:
            return None
        maker = right.maker.get(twin)
        if maker is not None and maker.op_type == "Relu" and own.source(name) == name:
            ours = np.maximum(ours, 0)  # quantization that clips at zero replaces the ReLU
        return _cosine(ours[:1], theirs[:1])

    def inputs(node: onnx.NodeProto) -> float:
        """Return the lowest cosine of a node's inputs; values without a counterpart count as their own inputs."""
        found = []
        for name in own.activations(node):
            value = cosine(name)
            if value is None and (maker := own.maker.get(own.source(name))) is not None:
                value = inputs(maker)
            found.append(1.0 if value is None else value)
        return min(found, default=1.0)

    for node in own.nodes:
        for output in node.output:
            found = cosine(output)
            if found is not None and own.activations(node):
                before = cosine(own.source(output)) if node.op_type == "DequantizeLinear" else None
                yield _Point(node, output, same[own.source(output)], found, inputs(node) if before is None else before)


def _cosine(ours: _Value, theirs: _Value) -> float:
    a, b = ours.astype(np.float64).ravel(), theirs.astype(np.float64).ravel()
    if not np.isfinite(a).all():
        return 0.0
    norms = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return min(1.0, float(a @ b) / norms) if norms else float(np.array_equal(a, b))


def _range(values: _Value) -> tuple[float, float] | None:
    return (float(values.min()), float(values.max())) if values.size and np.isfinite(values).all() else None


def _layer(node: onnx.NodeProto, graph: _Graph) -> str:
    """Return the layer's name in the trained network: that of its weights, without the exported module's prefix."""
    if node.op_type not in _PRODUCTS:
        return ""
    name = graph.source(node.input[1]).removesuffix("_quantized")
    return name.removesuffix(".weight").partition(".")[2] if name.endswith(".weight") else ""


def _weights_cosine(ours: onnx.NodeProto, theirs: onnx.NodeProto, own: _Graph, right: _Graph) -> float | None:
    if ours.op_type not in _PRODUCTS or theirs.op_type not in _PRODUCTS:
        return None
    first, second = own.values[ours.input[1]], right.values[theirs.input[1]]
    return _cosine(first, second) if first.shape == second.shape else None
