"""Diagnosis: which known mistake explains a difference from the reference, and at which node of the graph it begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache, cached_property
from itertools import permutations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pmm_edge.bench.report import Cause, Departure, LikelyCause
from pmm_edge.console import Report, silent
from pmm_edge.errors import ModelError, install
from pmm_edge.images import Pixels, network_input, normalize
from pmm_edge.retrieval.distances import cosines, unit_length
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


PIXEL_MISTAKES: Mapping[Cause, Callable[[Planes], Planes]] = {
    Cause.BGR: lambda x: x[:, ::-1],
    Cause.MIRRORED: lambda x: x[..., ::-1],
    Cause.UPSIDE_DOWN: lambda x: x[:, :, ::-1],
    Cause.NHWC_AS_NCHW: lambda x: np.ascontiguousarray(x.transpose(0, 2, 3, 1)).reshape(x.shape),
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


Mistake = tuple[Cause, tuple[str, ...], Embeddings]
"""A known mistake, for swapped stages their order, and the reference's embeddings with this mistake, (N, D)."""


def likely_cause(
    right: Embeddings, candidate: Embeddings, spec: ModelSpec, mistakes: Sequence[Mistake]
) -> LikelyCause | None:
    """Return the known mistake that explains the difference between a model and the reference, or None.

    `right` are the reference's and `candidate` the model's embeddings of some images, (N, D) each; `spec` is the
    model's, and `mistakes` are those of `wrong_inputs` on these images.
    """
    tried = [
        (float(cosines(wrong, candidate).mean()), cause, stages)
        for cause, stages, wrong in (*_wrong_outputs(right, spec), *mistakes)
    ]
    cosine, cause, stages = max(tried, key=lambda one: one[0])
    unexplained = MAX_UNEXPLAINED * (1 - float(cosines(right, candidate).mean()))
    return LikelyCause(cause, cosine, stages) if cosine >= MIN_COSINE and 1 - cosine <= unexplained else None


def _wrong_outputs(right: Embeddings, spec: ModelSpec) -> Iterator[Mistake]:
    """Yield the reference's embeddings with stages in another order, and with each stage normalized by itself."""
    slices = {name: right[:, start:stop] for name, (start, stop) in spec.stages.items()}
    if len(slices) < 2:
        return
    for order in permutations(slices):
        if order != tuple(slices):
            yield Cause.STAGES_SWAPPED, order, np.concatenate([slices[name] for name in order], axis=1)
    yield Cause.STAGES_NORMALIZED, (), np.concatenate([unit_length(part) for part in slices.values()], axis=1)


def wrong_inputs(reference: Embedder, images: Pixels, report: Report = silent) -> list[Mistake]:
    """Return the reference's embeddings of what each mistake would feed it.

    `images` are (N, height, width, 3) uint8 of the reference's size.
    """
    pixels, found = np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32), list[Mistake]()
    what, total = "looking for the cause", len(PIXEL_MISTAKES) + len(NORMALIZATION_MISTAKES)
    for cause, spoil in PIXEL_MISTAKES.items():
        report(what, len(found), total, cause.value)
        wrong = np.ascontiguousarray(spoil(pixels).transpose(0, 2, 3, 1).astype(np.uint8))
        found.append((cause, (), reference.embed_prepared(wrong)))
    for cause, change in NORMALIZATION_MISTAKES.items():
        report(what, len(found), total, cause.value)
        planes = np.ascontiguousarray(change(pixels, reference.spec.input), dtype=np.float32)
        if (embeddings := reference.embed_normalized(planes)) is not None:
            found.append((cause, (), embeddings))
    report(what, total, total)
    return found


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

    Where no single node is at fault, as when rounding accumulates, return the node that loses most. The model is an
    ONNX file; a reference that is a checkpoint is exported in FP32 first. `image` is (1, height, width, 3) uint8 of the
    model's size. Raises ModelError if the onnx package is missing, one of the two cannot be read as a graph, or the
    graphs have nothing in common or agree at every node.
    """
    if model.path.suffix != ".onnx":
        raise ModelError(
            f"--explain reads ONNX files, not {model.path}", "Explain the ONNX file that the model was built from"
        )
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise ModelError("--explain needs the onnx package", install("train")) from error
    own = _Graph(onnx.load(model.path), model.spec.input, image)
    right = _Graph(*_reference_graph(reference, model.spec), image)
    points = list(_points(own, right))
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
    values, weights_cosine = own.values[point.output], None
    if node.op_type in _PRODUCTS and twin.op_type in _PRODUCTS:
        ours, theirs = own.values[node.input[1]], right.values[twin.input[1]]
        weights_cosine = _cosine(ours, theirs) if ours.shape == theirs.shape else None
    return Departure(
        node=node.name,
        operator=node.op_type,
        layer=own.layer(node) or right.layer(twin),
        cosine=point.cosine,
        before=point.before,
        gradual=at_fault is None,
        dtype=str(values.dtype),
        value_range=_range(values),
        reference_range=_range(right.values[point.same]),
        weights_cosine=weights_cosine,
    )


class _Graph:
    """An ONNX graph and all values that it computes for one image."""

    def __init__(self, model: onnx.ModelProto, size: InputSpec, image: Pixels) -> None:
        self.model, self._input = model, network_input(image, size)
        self.nodes: Sequence[onnx.NodeProto] = list(model.graph.node)
        self.maker = {output: node for node in self.nodes for output in node.output}

    @cached_property
    def values(self) -> Mapping[str, _Value]:
        """The input, the constants and the output of each node, by name. Raises ModelError if the graph cannot run."""
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
            graph, providers = model.SerializeToString(), ["CPUExecutionProvider"]
            session = onnxruntime.InferenceSession(graph, options, providers=providers)
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

    def activations(self, node: onnx.NodeProto) -> list[str]:
        """Return the node's inputs that depend on the image."""
        return [name for name in node.input if self.source(name) in self.maker or self.source(name) == INPUT]

    def layer(self, node: onnx.NodeProto) -> str:
        """Return the layer's name in the trained network: that of its weights, without the exported module's prefix."""
        name = self.source(node.input[1]).removesuffix("_quantized") if node.op_type in _PRODUCTS else ""
        return name.removesuffix(".weight").partition(".")[2] if name.endswith(".weight") else ""


class _Point(NamedTuple):
    """A node whose output can be compared with the value `same` of the reference; `before` is that of its inputs."""

    node: onnx.NodeProto
    output: str
    same: str
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
    network = inference_network(network, spec.input, spec.normalized_output)
    return onnx_graph(network, replace(spec, precision="fp32")), spec.input


def _points(own: _Graph, right: _Graph) -> Iterator[_Point]:
    """Yield the model's nodes in order, as far as they can be compared with values of the same name."""
    same = {INPUT: INPUT, **{name: name for name in own.maker if name in right.maker}}
    for node in own.nodes:
        # A cast at the end takes over the name of the output; the value that it casts is the reference's.
        if node.op_type in ("Cast", "Identity") and node.output[0] in same:
            same.setdefault(node.input[0], same[node.output[0]])

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
                before = inputs(node) if before is None else before
                yield _Point(node, output, same[own.source(output)], found, before)


def _cosine(ours: _Value, theirs: _Value) -> float:
    a, b = ours.astype(np.float64).ravel(), theirs.astype(np.float64).ravel()
    if not np.isfinite(a).all():
        return 0.0
    norms = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return min(1.0, float(a @ b) / norms) if norms else float(np.array_equal(a, b))


def _range(values: _Value) -> tuple[float, float] | None:
    return (float(values.min()), float(values.max())) if values.size and np.isfinite(values).all() else None
