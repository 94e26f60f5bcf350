"""Diagnosis: which known mistake explains a difference from the reference, and at which node of the graph it begins."""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmm_edge.bench.report import Cause, Departure, LikelyCause
from pmm_edge.console import Report, silent
from pmm_edge.errors import ModelError, install
from pmm_edge.images import Pixels, network_input, normalize, read_crops
from pmm_edge.retrieval.distances import cosines, unit_length
from pmm_edge.runtime import Embedder
from pmm_edge.runtime.embedder import INPUT, Embeddings
from pmm_edge.spec import InputSpec, ModelSpec

MAX_UNEXPLAINED = 0.2  # a cause leaves at most this fraction of the difference (1 - mean cosine) unexplained,
MIN_COSINE = 0.95  # and reaches this mean cosine: INT8 adds its own rounding

Values = NDArray[Any]
Node = Any  # onnx.NodeProto; the package is imported only where it is needed

MISTAKES: Mapping[Cause, Callable[[NDArray[np.float32], InputSpec], Values]] = {
    Cause.BGR: lambda x, s: x[:, ::-1].astype(np.uint8),
    Cause.MIRRORED: lambda x, s: x[..., ::-1].astype(np.uint8),
    Cause.UPSIDE_DOWN: lambda x, s: x[:, :, ::-1].astype(np.uint8),
    Cause.NHWC_AS_NCHW: lambda x, s: x.transpose(0, 2, 3, 1).reshape(x.shape).astype(np.uint8),
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
"""(N, 3, H, W) pixels in 0..255 -> uint8: wrong pixels; float32: what the network receives in place of normalized ones,
which only engines without preprocessing can be fed."""


def wrong_inputs(reference: Embedder, images: Pixels, report: Report = silent) -> dict[Cause, Embeddings]:
    """Return the reference's embeddings of what each mistake makes of (N, height, width, 3) uint8 crops."""
    pixels = np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)
    found = {}
    for number, (cause, spoil) in enumerate(MISTAKES.items(), start=1):
        wrong = spoil(pixels, reference.spec.input)
        if wrong.dtype == np.uint8:
            found[cause] = reference.embed_prepared(np.ascontiguousarray(wrong.transpose(0, 2, 3, 1)))
        elif (embeddings := reference.embed_normalized(np.ascontiguousarray(wrong))) is not None:
            found[cause] = embeddings
        report("looking for the cause", number, len(MISTAKES), cause.value)
    return found


def likely_cause(
    right: Embeddings, candidate: Embeddings, spec: ModelSpec, mistakes: Mapping[Cause, Embeddings]
) -> LikelyCause | None:
    """Return the known mistake that explains the difference between a model and the reference, or None.

    `right` are the reference's and `candidate` the model's embeddings, (N, D), of the images of `mistakes`.
    """
    tried: list[tuple[Cause, tuple[str, ...], Embeddings]] = [(cause, (), wrong) for cause, wrong in mistakes.items()]
    slices = {name: right[:, start:stop] for name, (start, stop) in spec.stages.items()}
    for order in permutations(slices) if len(slices) > 1 else ():
        swapped = order != tuple(slices)
        parts = [slices[name] if swapped else unit_length(slices[name]) for name in order]
        cause = Cause.STAGES_SWAPPED if swapped else Cause.STAGES_NORMALIZED
        tried.append((cause, order if swapped else (), np.concatenate(parts, axis=1)))
    means = [float(cosines(wrong, candidate).mean()) for _, _, wrong in tried]
    best = int(np.argmax(means))
    explained = 1 - means[best] <= MAX_UNEXPLAINED * (1 - float(cosines(right, candidate).mean()))
    cause, stages, _ = tried[best]
    return LikelyCause(cause, means[best], stages) if means[best] >= MIN_COSINE and explained else None


# --explain: the first node of the graph that departs

MAX_LOSS = {"fp32": 1e-4, "fp16": 1e-3, "int8": 1e-2}  # loss of a node's cosine that rounding explains
FACTOR = 5  # a node at fault loses this many times what its inputs had lost
_PASSED_ON = ("Cast", "Identity", "QuantizeLinear", "DequantizeLinear")  # they only change the data type
_PRODUCTS = ("Conv", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul")


def first_departure(model: Embedder, reference: Embedder, image: Path) -> Departure:
    """Return the first node whose inputs agree with the reference and whose output does not.

    Where no single node is at fault, as when rounding accumulates, return the node that loses most. The model is an
    ONNX file, the reference another or a checkpoint, which is exported in FP32. `image` is the file to embed. Raises
    ModelError for other models, without the onnx package, or if no node departs.
    """
    for path in (model.path, *([] if reference.backend == "torch" else [reference.path])):
        if path.suffix != ".onnx":
            raise ModelError(f"--explain reads ONNX files, not {path}", "Name the ONNX file that it was built from")
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise ModelError("--explain needs the onnx package", install("train")) from error
    spec = reference.spec
    if reference.backend == "torch":
        from pmm_edge.export.graph import inference_network, onnx_graph

        spec, network = replace(model.spec, precision="fp32"), deepcopy(reference.network).cpu()  # type: ignore[attr-defined]
        graph = onnx_graph(inference_network(network, spec.input, spec.normalized_output), spec)
    else:
        graph = onnx.load(reference.path)
    crop = read_crops([image], spec.input.height, spec.input.width)
    own, right = _Graph(onnx.load(model.path), model.spec.input, crop), _Graph(graph, spec.input, crop)
    found = list(_departures(own, right))
    for one in found:
        if one.before - one.cosine > max(MAX_LOSS[model.spec.precision], FACTOR * (1 - one.before)):
            return one
    most = max(found, key=lambda one: one.before - one.cosine, default=None)
    if most is None or most.before <= most.cosine:
        raise ModelError(
            f"no node of {model.path} departs from {reference.path} when it runs alone",
            "If both come from the same checkpoint, an optimization of the engine is at fault: try another version",
        )
    return replace(most, gradual=True)


class _Graph:
    """An ONNX graph and all values that it computes for one image; ModelError if it cannot run."""

    def __init__(self, model: Any, spec: InputSpec, crop: Pixels) -> None:
        import onnx
        import onnxruntime

        self.maker = {output: node for node in model.graph.node for output in node.output if output}
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        existing = {value.name for value in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.maker if name not in existing)
        try:
            graph, providers = model.SerializeToString(), ["CPUExecutionProvider"]
            session = onnxruntime.InferenceSession(graph, options, providers=providers)
            batch = session.get_inputs()[0].shape[0]
            fed = network_input(np.repeat(crop, batch if isinstance(batch, int) else 1, axis=0), spec)
            values = session.run(list(self.maker), {INPUT: fed})
        except Exception as error:  # the exceptions of ONNX Runtime have no other common base
            raise ModelError(
                f"--explain cannot run the graph node by node ({str(error).splitlines()[0]})",
                "Try a machine with more memory or another version of onnxruntime",
            ) from error
        constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self.values: dict[str, Values] = {INPUT: fed, **constants, **dict(zip(self.maker, values, strict=True))}

    def source(self, name: str) -> str:
        """Return the value before casts and quantize/dequantize pairs."""
        while (node := self.maker.get(name)) is not None and node.op_type in _PASSED_ON:
            name = node.input[0]
        return name

    def activations(self, node: Node) -> list[str]:
        """Return the node's inputs that depend on the image."""
        return [name for name in node.input if self.source(name) in self.maker or self.source(name) == INPUT]

    def weights(self, node: Node) -> tuple[str, Values | None]:
        """Return the layer's name in the trained network, without the exported module's prefix, and its weights."""
        if node is None or node.op_type not in _PRODUCTS:
            return "", None
        name = self.source(node.input[1]).removesuffix("_quantized")
        layer = name.removesuffix(".weight").partition(".")[2] if name.endswith(".weight") else ""
        return layer, self.values[node.input[1]]


def _departures(own: _Graph, right: _Graph) -> Iterator[Departure]:
    """Yield the model's nodes in order, as far as they can be compared with values of the same name."""
    same = {INPUT: INPUT, **{name: name for name in own.maker if name in right.maker}}
    for output, node in own.maker.items():
        # A cast at the end takes over the name of the output; the value that it casts is the reference's.
        if node.op_type in ("Cast", "Identity") and output in same:
            same.setdefault(node.input[0], same[output])

    @cache
    def cosine(name: str) -> float | None:
        """Return the cosine of a value to the reference; None where the reference does not have it."""
        ours, twin = own.values[name], same.get(own.source(name))
        if twin is None or ours.dtype.kind != "f" or ours.shape[1:] != right.values[twin].shape[1:]:
            return None
        maker = right.maker.get(twin)
        if maker is not None and maker.op_type == "Relu" and own.source(name) == name:
            ours = np.maximum(ours, 0)  # quantization that clips at zero replaces the ReLU
        return _cosine(ours[:1], right.values[twin][:1])

    def inputs(node: Node) -> float:
        """Return the lowest cosine of a node's inputs; values without a counterpart count as their own inputs."""
        found = []
        for name in own.activations(node):
            value, maker = cosine(name), own.maker.get(own.source(name))
            found.append(value if value is not None else inputs(maker) if maker is not None else 1.0)
        return min(found, default=1.0)

    for output, node in own.maker.items():
        found = cosine(output)
        if found is None or not own.activations(node):
            continue
        before = cosine(own.source(output)) if node.op_type == "DequantizeLinear" else None
        value, twin = own.values[output], same[own.source(output)]
        (layer, ours), (twin_layer, theirs) = own.weights(node), right.weights(right.maker.get(twin))
        yield Departure(
            node=node.name,
            operator=node.op_type,
            layer=layer or twin_layer,
            cosine=found,
            before=inputs(node) if before is None else before,
            gradual=False,
            dtype=str(value.dtype),
            value_range=_range(value),
            reference_range=_range(right.values[twin]),
            weights_cosine=None
            if ours is None or theirs is None or ours.shape != theirs.shape
            else _cosine(ours, theirs),
        )


def _cosine(ours: Values, theirs: Values) -> float:
    a, b = ours.astype(np.float64).ravel(), theirs.astype(np.float64).ravel()
    if not np.isfinite(a).all():
        return 0.0
    norms = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return min(1.0, float(a @ b) / norms) if norms else float(np.array_equal(a, b))


def _range(values: Values) -> tuple[float, float] | None:
    return (float(values.min()), float(values.max())) if values.size and np.isfinite(values).all() else None
