"""Why a model departs from its reference: the known mistakes are made on purpose, and one is named where it explains.

The reference is fed what each mistake would have fed it. Where it then agrees with the model, and plainly better than
rightly fed, the model most likely makes that mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import permutations
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pmm_edge.bench.report import Departure
from pmm_edge.console import Report, silent
from pmm_edge.errors import ModelError
from pmm_edge.images import Pixels, network_input
from pmm_edge.retrieval.distances import cosines
from pmm_edge.runtime import Embedder
from pmm_edge.runtime.embedder import INPUT, Embeddings
from pmm_edge.spec import FLOAT16_MAX, InputSpec, ModelSpec

if TYPE_CHECKING:
    import onnx


IMAGES = 16
"""How many images a mistake is tried on."""
LEFT = 0.2
"""An explanation leaves at most this share of the departure (1 - mean cosine) unexplained,"""
LEAST_COSINE = 0.95
"""and brings the mean cosine up to this; 8 bits take their part of it."""

Planes = NDArray[np.floating]
_Mistake = tuple[str, Callable[[Planes, InputSpec], Planes]]


def _normalized(pixels: Planes, size: InputSpec) -> Planes:
    """What the network must see: (N, 3, H, W) in 0..255 -> normalised."""
    mean, std = _channels(size)
    return (pixels / np.float32(255) - mean) / std


def _channels(size: InputSpec) -> tuple[Planes, Planes]:
    return np.array(size.mean, np.float32)[:, None, None], np.array(size.std, np.float32)[:, None, None]


def _as_planes(pixels: Planes) -> Planes:
    """Pixels in NHWC order whose memory is read as NCHW."""
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)).reshape(pixels.shape)


_MISTAKES: Sequence[_Mistake] = (
    ("red and blue are swapped: it sees BGR", lambda x, s: _normalized(x[:, ::-1], s)),
    ("red and blue are swapped behind the normalisation", lambda x, s: _normalized(x, s)[:, ::-1]),
    ("normalisation is done twice", lambda x, s: _normalized(255 * _normalized(x, s), s)),
    ("normalisation is done twice, with two scalings to 0..1", lambda x, s: _normalized(_normalized(x, s), s)),
    ("normalisation is missing: it sees values of 0..1", lambda x, s: x / 255),
    ("normalisation is missing: it sees values of 0..255", lambda x, s: x),
    ("normalisation is another: it sees values of -1..1", lambda x, s: x / 127.5 - 1),
    ("the mean is not subtracted", lambda x, s: x / 255 / _channels(s)[1]),
    ("it is not divided by the standard deviation", lambda x, s: x / 255 - _channels(s)[0]),
    ("the scaling to 0..1 is missing before the normalisation", lambda x, s: _normalized(255 * x, s)),
    ("pixels are scaled to 0..1 twice before the normalisation", lambda x, s: _normalized(x / 255, s)),
    ("images are mirrored", lambda x, s: _normalized(x[..., ::-1], s)),
    ("images are upside down", lambda x, s: _normalized(x[:, :, ::-1], s)),
    ("the layout is wrong: NHWC pixels are read as NCHW", lambda x, s: _normalized(_as_planes(x), s)),
)
"""What each mistake feeds the network, from pixels as (N, 3, H, W) float32 in 0..255."""

_IN_PIXELS = ("it sees BGR", "mirrored", "upside down", "NHWC")
"""Those that can be made with pixels alone, for a reference that takes nothing else."""


def likely_cause(
    reference: Embedder,
    right: Embeddings,
    candidate: Embeddings,
    spec: ModelSpec,
    images: Pixels,
    report: Report = silent,
) -> str | None:
    """Name the mistake that explains a model's departure, to be read as a sentence; None where none does.

    Args:
        reference: what the mistakes are made with.
        right: (N, D), its embeddings of the images, rightly fed.
        candidate: (N, D), the model's.
        spec: the model's.
        images: (N, height, width, 3) uint8 of the reference's size.
        report: told how many mistakes are tried.
    """
    plain = float(cosines(right, candidate).mean())
    explained = [
        (float(cosines(wrong, candidate).mean()), cause)
        for cause, wrong in (
            *_mistaken_outputs(right, spec),
            *_mistaken_inputs(reference, images, report),
        )
    ]
    best, cause = max(explained, default=(plain, ""))
    return cause if best >= LEAST_COSINE and 1 - best <= LEFT * (1 - plain) else None


def overflow(spec: ModelSpec, embeddings: Embeddings) -> str | None:
    """Name what makes NaN or infinity of FP16 where the reference has none; None for anything else."""
    if spec.precision != "fp16" or np.isfinite(embeddings).all():
        return None
    return f"values are larger than float16 holds ({FLOAT16_MAX:.0f})"


def _mistaken_outputs(right: Embeddings, spec: ModelSpec) -> Iterator[tuple[str, Embeddings]]:
    """Stages in another order, or each brought to length 1."""
    slices = {name: right[:, start:stop] for name, (start, stop) in spec.stages.items()}
    if len(slices) < 2:
        return
    for order in permutations(slices):
        if order != tuple(slices):
            became = ", ".join(
                f"{old} where {new} belongs" for old, new in zip(order, slices, strict=True) if old != new
            )
            yield f"stages of the embedding are swapped: {became}", np.concatenate([slices[name] for name in order], 1)
    lengths = [np.linalg.norm(part, axis=1, keepdims=True) for part in slices.values()]
    units = [part / np.maximum(length, 1e-12) for part, length in zip(slices.values(), lengths, strict=True)]
    yield "each stage is brought to length 1 by itself, not the whole embedding", np.concatenate(units, axis=1)


def _mistaken_inputs(reference: Embedder, images: Pixels, report: Report) -> Iterator[tuple[str, Embeddings]]:
    pixels = np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)
    for number, (cause, mistake) in enumerate(_MISTAKES):
        report("looking for the cause", number, len(_MISTAKES), cause)
        planes = np.ascontiguousarray(mistake(pixels, reference.spec.input), dtype=np.float32)
        embeddings = reference.embed_normalized(planes)
        if embeddings is None:
            if not any(part in cause for part in _IN_PIXELS):
                continue
            mean, std = _channels(reference.spec.input)
            back = np.rint((planes * std + mean) * 255).clip(0, 255).astype(np.uint8)
            embeddings = reference.embed_prepared(np.ascontiguousarray(back.transpose(0, 2, 3, 1)))
        yield cause, embeddings
    report("looking for the cause", len(_MISTAKES), len(_MISTAKES))


LOST = {"fp32": 1e-4, "fp16": 1e-3, "int8": 1e-2}
"""Of 1, what a node's output may lose of its cosine to the reference's: rounding in each precision stays below."""
TIMES = 5
"""A node at fault loses this many times what its inputs had lost before it."""

_PASSED_ON = ("Cast", "Identity", "QuantizeLinear", "DequantizeLinear")
"""Operators whose output is their input in another type."""
_PRODUCTS = ("Conv", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul")

_Value = NDArray[Any]


@dataclass(frozen=True)
class _Point:
    """A node whose output can be held against the reference."""

    node: onnx.NodeProto
    output: str
    same: str
    """The reference's name of the output."""
    cosine: float
    before: float

    @property
    def lost(self) -> float:
        return self.before - self.cosine


def first_departure(model: Embedder, reference: Embedder, image: Pixels) -> Departure:
    """The first node of a model whose inputs were still right and whose output is not.

    Where no single node is at fault, as when rounding adds up, the node that loses most.

    Args:
        model: an ONNX file.
        reference: an ONNX file, a checkpoint or exported weights; those are exported in FP32 first.
        image: (1, height, width, 3) uint8 of the model's size: the one that departs most.

    Raises:
        ModelError: the onnx package is missing, one of the two is no ONNX file and no checkpoint, the graphs have
            nothing in common, or they agree at every node.
    """
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise ModelError(
            f"--explain cannot read {model.path}: the onnx package is missing", "pip install 'pmm-edge[train]'"
        ) from error
    if model.path.suffix != ".onnx":
        raise ModelError(
            f"--explain reads ONNX files, {model.path} is none", "Explain the ONNX file that it was made from"
        )
    sizes = [(size.height, size.width) for size in (model.spec.input, reference.spec.input)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"--explain cannot hold {model.path} and {reference.path} against each other: their input sizes differ",
            "Give the checkpoint that the model was exported from as --reference",
        )
    own = _Graph(onnx.load(model.path), model.spec.input, image)
    right = _Graph(*_reference_graph(reference, model.spec), image)
    points = list(_points(own, right, _matched(own, right)))
    if not points:
        raise ModelError(
            f"--explain finds nothing in common between the graphs of {model.path} and {reference.path}",
            "Give the checkpoint that the model was exported from as --reference",
        )
    lost = LOST.get(model.spec.precision, LOST["fp32"])
    at_fault = (point for point in points if point.lost > max(lost, TIMES * (1 - point.before)))
    found = next(at_fault, None)
    worst = max(points, key=lambda point: point.lost)
    if found is None and worst.lost <= 0:
        raise ModelError(
            f"every node of {model.path} agrees with {reference.path} when it runs by itself",
            "The engine's own optimisation of the graph is at fault: try another version or device",
        )
    point = found or worst
    return Departure(
        node=point.node.name,
        operator=point.node.op_type,
        output=point.output,
        cosine=point.cosine,
        before=point.before,
        words=_words(point, own, right, gradual=found is None),
    )


class _Graph:
    """An ONNX graph and all that its nodes give for one image."""

    def __init__(self, model: onnx.ModelProto, size: InputSpec, image: Pixels) -> None:
        self.model, self._fed = model, network_input(image, size)
        self.nodes: Sequence[onnx.NodeProto] = list(model.graph.node)
        self.maker = {output: node for node in self.nodes for output in node.output}

    @cached_property
    def values(self) -> Mapping[str, _Value]:
        """By name: the input, the constants and the output of each node."""
        import onnx
        import onnxruntime  # here: pmm verify runs where no engine is installed

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        there = {value.name for value in model.graph.output}
        names = [output for node in self.nodes for output in node.output if output]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in there)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        try:
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            batch = session.get_inputs()[0].shape[0]
            fed = np.repeat(self._fed, batch, axis=0) if isinstance(batch, int) else self._fed
            values = dict(zip(names, session.run(names, {INPUT: fed}), strict=True))
        # ONNX Runtime's exceptions have nothing in common but this.
        except Exception as error:
            raise ModelError(
                f"--explain cannot run the graph node by node ({str(error).splitlines()[0]})",
                "Explain it on a machine with more memory, or with another version of onnxruntime",
            ) from error
        constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        return {INPUT: fed, **constants, **values}

    def behind(self, name: str) -> str:
        """The value before casts and quantise/dequantise pairs."""
        while (node := self.maker.get(name)) is not None and node.op_type in _PASSED_ON:
            name = node.input[0]
        return name

    def products(self) -> list[onnx.NodeProto]:
        return [node for node in self.nodes if node.op_type in _PRODUCTS]

    def activations(self, node: onnx.NodeProto) -> list[str]:
        """The node's inputs that depend on the image."""
        return [name for name in node.input if self.behind(name) in self.maker or self.behind(name) == INPUT]


def _reference_graph(reference: Embedder, spec: ModelSpec) -> tuple[onnx.ModelProto, InputSpec]:
    """The reference as a graph, with the input that it takes."""
    import onnx

    if reference.path.suffix == ".onnx":
        return onnx.load(reference.path), reference.spec.input
    if reference.backend != "torch":
        raise ModelError(
            f"--explain needs a checkpoint or an ONNX file as the reference, {reference.path} is none",
            "Name one with --reference",
        )
    from copy import deepcopy

    from pmm_edge.export import inference_network
    from pmm_edge.export.graph import onnx_graph
    from pmm_edge.runtime.torch_backend import TorchEmbedder

    assert isinstance(reference, TorchEmbedder)
    network: Any = deepcopy(reference.network).cpu()
    spec = replace(spec, precision="fp32")
    return onnx_graph(inference_network(network, spec.input, spec.normalized_output), spec), spec.input


def _matched(own: _Graph, right: _Graph) -> dict[str, str]:
    """A model's values -> the reference's of the same meaning."""
    same = {name: name for name in own.maker if name in right.maker}
    ours, theirs = own.products(), right.products()
    by_name = sum(node.output[0] in same for node in ours)
    if 2 * by_name < len(ours):
        if len(ours) != len(theirs):
            return {}
        same = {one.output[0]: other.output[0] for one, other in zip(ours, theirs, strict=True)}
    for node in own.nodes:
        # A cast at the end takes the output's name; what it casts is the reference's value.
        if node.op_type in ("Cast", "Identity") and node.output[0] in same:
            same.setdefault(node.input[0], same[node.output[0]])
    return {INPUT: INPUT, **same}


def _points(own: _Graph, right: _Graph, same: Mapping[str, str]) -> Iterator[_Point]:
    """The model's nodes in their order, as far as they can be held against the reference."""
    cosine: dict[str, float] = {}

    def beside(name: str) -> float | None:
        """The cosine of a value to the reference's; None where it has none."""
        if name not in cosine:
            twin = same.get(own.behind(name))
            if twin is None or own.values[name].dtype.kind != "f":
                return None
            ours, theirs = own.values[name], right.values[twin]
            if ours.shape[1:] != theirs.shape[1:]:
                return None
            clipped = right.maker.get(twin)
            if clipped is not None and clipped.op_type == "Relu" and own.behind(name) == name:
                ours = np.maximum(ours, 0)  # where quantisation clips at zero, its ReLU was taken out
            cosine[name] = _cosine(ours[:1], theirs[:1])
        return cosine[name]

    def given(node: onnx.NodeProto) -> float:
        """The least cosine of what the node was given; of what cannot be compared, that of what it was made from."""
        found = []
        for name in own.activations(node):
            value = beside(name)
            if value is None and (maker := own.maker.get(own.behind(name))) is not None:
                value = given(maker)
            found.append(1.0 if value is None else value)
        return min(found, default=1.0)

    for node in own.nodes:
        for output in node.output:
            found = beside(output)
            if found is not None and own.activations(node):
                before = beside(own.behind(output)) if node.op_type == "DequantizeLinear" else given(node)
                yield _Point(node, output, same[own.behind(output)], found, given(node) if before is None else before)


def _cosine(ours: _Value, theirs: _Value) -> float:
    a, b = ours.astype(np.float64).ravel(), theirs.astype(np.float64).ravel()
    if not np.isfinite(a).all():
        return 0.0
    norms = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return min(1.0, float(a @ b) / norms) if norms else float(np.array_equal(a, b))


def _words(point: _Point, own: _Graph, right: _Graph, gradual: bool) -> str:
    """The sentence for people: the layer by its trained name where it has one, and what is known of why."""
    node = point.node
    layer = _layer(node, own) or _layer(right.maker[point.same], right)
    what = f"{node.op_type} '{layer or node.name}'"
    figures = f"output cosine {point.cosine:.4f}, its inputs {point.before:.4f}"
    ours, theirs = own.values[point.output], right.values[point.same]
    why = ""
    if not np.isfinite(ours).all():
        why = ": it gives NaN or infinity"
        largest = float(np.abs(theirs).max(initial=0))
        if ours.dtype == np.float16 and largest > FLOAT16_MAX:
            why += f", the reference's values reach {largest:.4g} there and float16 holds {FLOAT16_MAX:.0f}"
    elif node.op_type == "DequantizeLinear":
        why = (
            f": 8 bits hold {_span(ours)} there, the reference's values are {_span(theirs)}; calibrate with real crops"
        )
    elif (weights := _weights_cosine(node, right.maker[point.same], own, right)) is not None and weights < 1 - LOST[
        "int8"
    ]:
        why = f": its weights are others (cosine {weights:.4f})"
    if gradual:
        return f"no single node is at fault, the loss adds up; {what} loses most ({figures}){why}"
    return f"departs at {what} ({figures}){why}"


def _layer(node: onnx.NodeProto, graph: _Graph) -> str:
    """The trained network's name of a layer: of its weights, without the module they are exported in."""
    if node.op_type not in _PRODUCTS:
        return ""
    name = graph.behind(node.input[1]).removesuffix("_quantized")
    return name.removesuffix(".weight").partition(".")[2] if name.endswith(".weight") else ""


def _weights_cosine(ours: onnx.NodeProto, theirs: onnx.NodeProto, own: _Graph, right: _Graph) -> float | None:
    if ours.op_type not in _PRODUCTS or theirs.op_type not in _PRODUCTS:
        return None
    first, second = own.values[ours.input[1]], right.values[theirs.input[1]]
    return _cosine(first, second) if first.shape == second.shape else None


def _span(values: _Value) -> str:
    return f"{float(values.min()):.3g} to {float(values.max()):.3g}"
