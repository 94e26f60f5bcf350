"""Reduce a network's precision: cast it to FP16, or calibrate it and quantize as many layers to INT8 as mAP allows."""

import io
import logging
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, create_calibrator
from onnxruntime.quantization.calibrate import CalibrationMethod as Calibrator
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.transformers.float16 import convert_float_to_float16

from pmm_edge.console import Report, silent
from pmm_edge.data.checks import DatasetWarningKind, analyze
from pmm_edge.data.dataset import ReidDataset, problems, read
from pmm_edge.errors import CheckFailedError, DataError, ModelError, PmmWarning
from pmm_edge.export.graph import LAYERS, Parts, finalize, layer_names, multiply_adds, positions
from pmm_edge.files import temporary_folder
from pmm_edge.images import Pixels, evenly, network_input, readable_crops
from pmm_edge.retrieval.distances import cosines
from pmm_edge.retrieval.metrics import DISTRACTOR_PID
from pmm_edge.runtime.embed_files import embed_dataset, evaluate_dataset
from pmm_edge.runtime.model_file import parse_model
from pmm_edge.runtime.onnx_backend import OnnxEmbedder
from pmm_edge.spec import FLOAT16_MAX, CalibrationMethod, InputSpec, ModelSpec, Quantization, QuantizationTarget

METHODS: tuple[CalibrationMethod, ...] = get_args(CalibrationMethod)
MIN_IMAGES, MAX_IMAGES = 64, 192
"""Crops that INT8 calibration needs, and the most that are read; FP16 checks ranges on what there is."""
MAX_IMAGES_TENSORRT = 768
"""Of these, 512 set the ranges: NVIDIA recommends at least 500."""
MAX_LOSS = 0.01
"""Largest 1 - mean cosine to float32 of an INT8 network; `pmm bench` accepts as much. ResNets stay far below; a single
convolution of a MobileNetV3, after squeeze-and-excitation, may exceed it."""

Ranges = dict[str, tuple[float, float]]
"""Tensor name -> smallest and largest value."""

# For TensorRT, placement is that of nvidia-modelopt (benchmarks/modelopt_placement.py): convolutions add biases and
# shortcuts in float; linear layers are too small to gain. ONNX Runtime has INT8 kernels for additions.
_LAYERS = {"tensorrt": ("Conv",), "cpu": LAYERS}
_OPERATORS = {"tensorrt": ["Conv", "MaxPool"], "cpu": [*LAYERS, "Add", "MaxPool", "Relu"]}
_ACTIVATIONS = {"tensorrt": QuantType.QInt8, "cpu": QuantType.QUInt8}
_OPTIONS: dict[str, dict[str, Any]] = {
    "tensorrt": {
        "ActivationSymmetric": True,
        "QuantizeBias": False,
        "OpTypesToExcludeOutputQuantization": ["Conv"],
        "ForceQuantizeNoInputCheck": True,  # pool in INT8, with one scale for input and output
    },
    "cpu": {"OpTypesToExcludeOutputQuantization": ["Gemm"]},
}
_CALIBRATORS = {"minmax": Calibrator.MinMax, "percentile": Calibrator.Percentile, "entropy": Calibrator.Entropy}
_BATCH = 4  # all values of ResNet-50 for one 384×128 image take 80 MB


@dataclass(frozen=True, eq=False)
class Calibration:
    """Crops of a data set's training split at network size, uint8 (N, height, width, 3), in three disjoint parts."""

    dataset: ReidDataset
    ranges: Pixels
    """Four of six crops, which set activation ranges."""
    selection: Pixels
    """One of six, which select the calibration method and rank layers by sensitivity."""
    held_out: Pixels
    """One of six, which measure the result; nothing is set or selected on them."""


def read_calibration(
    root: Path, spec: InputSpec, layout: str | None = None, fewest: int = MIN_IMAGES, most: int = MAX_IMAGES
) -> Calibration:
    """Read up to `most` crops, spread evenly over the identities of the training split of the data set in `root`.

    Warns with `PmmWarning` if people of the training split are also in query or gallery, and of each image that cannot
    be read. Raises DataError if `root` is not a data set, has fewer than `fewest` training images, or fewer than nine
    tenths of that can be read.
    """
    dataset = read(root, layout)
    train = dataset.train
    people = [int(index) for index in np.argsort(train.pids, kind="stable") if train.pids[index] >= DISTRACTOR_PID]
    paths = [train.paths[people[place]] for place in evenly(len(people), most)]
    remedy = "Name another data set with --calibration"
    if len(paths) < fewest:
        raise DataError(f"{root} has {len(paths)} training images, but calibration needs at least {fewest}", remedy)
    for found in analyze(dataset).warnings:
        if found.kind is DatasetWarningKind.TRAIN_TEST_OVERLAP:
            text = f"calibration uses people that retrieval is evaluated on: {found.text}"
            warnings.warn(text, PmmWarning, stacklevel=2)
    crops, rows = readable_crops(paths, spec.height, spec.width, "calibration")
    if len(rows) < 0.9 * fewest:
        raise DataError(f"only {len(rows)} of {len(paths)} training images of {root} can be read", remedy)
    # The crops are in the order of the identities, so each part covers nearly all of them.
    place = np.arange(len(crops)) % 6
    return Calibration(dataset, crops[(place != 2) & (place != 5)], crops[place == 2], crops[place == 5])


class _Once(CalibrationDataReader):
    """Feed one batch to ONNX Runtime's calibrators."""

    def __init__(self, inputs: dict[str, NDArray[np.generic]]) -> None:
        self._inputs = [inputs]

    def get_next(self) -> dict[str, NDArray[np.generic]] | None:
        return self._inputs.pop() if self._inputs else None


def value_ranges(
    network: onnx.ModelProto,
    crops: Pixels,
    spec: InputSpec,
    method: CalibrationMethod = "minmax",
    target: QuantizationTarget | None = None,
    report: Report = silent,
) -> Ranges:
    """Measure the ranges of the values of a float32 `Parts.network` on (N, height, width, 3) uint8 crops.

    `minmax` takes the extremes, `percentile` all but the outermost of 100,000 values, `entropy` the range whose 8-bit
    histogram loses the least information. With a `target`, only values that layers and additions read or write are
    measured, for TensorRT symmetric around zero. Raises ModelError if a value is NaN or infinite.
    """
    what = f"calibrating, {method}"
    with temporary_folder() as folder:
        source = folder / "network.onnx"
        onnx.save(network, source)
        calibrator = create_calibrator(
            source,
            sorted({*LAYERS, *_OPERATORS[target], "Add"}) if target else None,
            str(folder / "augmented.onnx"),
            calibrate_method=_CALIBRATORS[method],
            extra_options={"symmetric": target == "tensorrt"},
        )
        name = str(network.graph.input[0].name)
        for start in range(0, len(crops), _BATCH):  # the calibrator keeps all values of what it is given at once
            report(what, start, len(crops))
            images = network_input(crops[start : start + _BATCH], replace(spec, form="normalized"))
            with redirect_stdout(io.StringIO()):
                calibrator.collect_data(_Once({name: images}))
        with redirect_stdout(io.StringIO()):
            found = calibrator.compute_data()
        report(what, len(crops), len(crops))
    ranges = {}
    for tensor, data in found.items():
        low, high = (float(np.asarray(end).item()) for end in data.range_value)
        if not np.isfinite((low, high)).all():
            raise ModelError(f"the network gives NaN or infinity at {tensor}", "Train again with a lower learning rate")
        ranges[tensor] = (low, high)
    return ranges


def cast_to_fp16(network: onnx.ModelProto, ranges: Ranges | None = None) -> tuple[onnx.ModelProto, float | None]:
    """Cast weights and values of a copy of a network to float16; input and output stay float32.

    Returns it with the largest absolute value in `ranges`. Raises CheckFailedError, which names the weight or node, for
    a value that exceeds the range of float16.
    """
    weights = {
        tensor.name: float(np.abs(numpy_helper.to_array(tensor)).max(initial=0))
        for tensor in network.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
    }
    values = {
        f"{node.name} ({node.op_type})": max(map(abs, ranges[output]))
        for node in network.graph.node
        for output in node.output
        if ranges and output in ranges
    }
    for name, size in (weights | values).items():
        if not size <= FLOAT16_MAX:
            raise CheckFailedError(
                f"{name} has a value of {size:.4g}, and the largest float16 is {FLOAT16_MAX:.0f}",
                "Export FP32 or INT8 for CPUs, or train with more weight decay",
            )
    half = convert_float_to_float16(deepcopy(network), keep_io_types=True, op_block_list=[])
    return half, max(values.values(), default=None)


def quantize(
    network: onnx.ModelProto,
    ranges: Ranges,
    target: QuantizationTarget,
    float_layers: Collection[str] = (),
    only: Collection[str] = (),
) -> onnx.ModelProto:
    """Insert explicit Q/DQ nodes for INT8 into a copy of `Parts.network`.

    Weights are symmetric int8 with one scale per output channel, see `round_weights`. Activations are symmetric int8
    for TensorRT and asymmetric uint8 for CPUs, which have a uint8 × int8 instruction. The rest is float16 for TensorRT,
    scales and linear layers included, which needs opset 19, and float32 for CPUs.

    Layers whose nodes are in `float_layers` are not quantized, nor are the operators between them and the next layer.
    Squeeze-and-excitation layers never are. `only` names the only nodes to quantize; empty for all.
    """
    copied = onnx.shape_inference.infer_shapes(network)
    nodes = copied.graph.node
    float_layers = {*float_layers, *excitations(network)}
    layers = [node for node in nodes if node.op_type in _LAYERS[target] and node.name not in float_layers]
    layers = [node for node in layers if not only or node.name in only]
    producer = {name: node for node in nodes for name in node.output}

    # Round weights to whole multiples of their INT8 scales, and give these scales to the quantizer.
    scales: dict[str, list[dict[str, Any]]] = {}
    for tensor in copied.graph.initializer:
        if tensor.name in {node.input[1] for node in layers}:
            values = numpy_helper.to_array(tensor)
            rounded, scale = round_weights(values, target)
            steps = scale.reshape(-1, *[1] * (values.ndim - 1))
            tensor.CopyFrom(numpy_helper.from_array(rounded.astype(np.float32) * steps, tensor.name))
            scales[tensor.name] = [{"scale": step, "zero_point": np.int8(0)} for step in scale]
            scales[tensor.name][0] |= {"quant_type": QuantType.QInt8, "axis": 0}

    # Between layers, INT8 of values from a float layer would undo its precision. An addition follows only its
    # convolutions: through the shortcut, floating point would spread to all following blocks.
    in_float = list(float_layers)
    for node in nodes:  # in topological order
        if node.op_type not in LAYERS:
            sources = [producer[name] for name in node.input if name in producer]
            if node.op_type == "Add":
                sources = [source for source in sources if source.op_type in LAYERS]
            if any(source.name in in_float for source in sources):
                in_float.append(node.name)
    # HardSwish is 0 below -3, so the 8-bit range of its input starts there.
    swished = {node.input[0] for node in nodes if node.op_type == "HardSwish"}
    ranges = {
        name: (max(low, min(-3.0, high)) if name in swished else low, high) for name, (low, high) in ranges.items()
    }
    quantizer = QDQQuantizer(
        copied,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=_ACTIVATIONS[target],
        tensors_range=TensorsData(
            Calibrator.MinMax, {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
        ),
        nodes_to_quantize=list(only),
        nodes_to_exclude=in_float,
        op_types_to_quantize=_OPERATORS[target],
        extra_options={"WeightSymmetric": True, "TensorQuantOverrides": scales, **_OPTIONS[target]},
    )
    if target == "tensorrt":
        # It fuses a residual addition into an INT8 convolution that only the addition reads, if the shortcut is INT8.
        uses = Counter(name for node in nodes for name in node.input)
        alone = {node.output[0] for node in nodes if node.op_type == "Conv" and uses[node.output[0]] == 1}
        fusing = alone & {node.output[0] for node in layers}
        for first, second in (node.input for node in nodes if node.op_type == "Add"):
            convolution, shortcut = (first, second) if first in alone else (second, first)
            if convolution in fusing:
                quantizer.quantize_activation_tensor(shortcut)
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it warns about biases and ranges that need no action
    try:
        quantized = quantizer.quantize_model()
    finally:
        logging.root.setLevel(level)
    return cast_to_fp16(quantized)[0] if target == "tensorrt" else quantized


def excitations(network: onnx.ModelProto) -> list[str]:
    """Nodes of squeeze-and-excitation layers: convolutions on a map of one position.

    They scale whole channels, so that their rounding errors do not average out, and are too small to gain from INT8.
    """
    counts = positions(network)
    return [node.name for node in network.graph.node if node.op_type == "Conv" and counts[node.name] == 1]


def round_weights(
    weights: NDArray[np.float32], target: QuantizationTarget
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantize weights with one scale per output channel, preserving each channel's sum.

    Activations after ReLU are positive, so rounding errors that do not cancel would shift a channel's output. The
    weights with the largest fractional parts are rounded up, as many as keep the sum (largest remainder method).

    For TensorRT, scales are float16 values: rounding them later would change all weights of a channel.

    For CPUs, two neighboring weights of a channel add up to at most 128. x86-64 processors without VNNI multiply uint8
    by int8 with `vpmaddubsw`, which adds two products in saturating 16 bits: 255 × 128 fits, 255 × 254 does not. ONNX
    Runtime pairs input channels; other engines may pair neighbors in the file's own layout.

    Takes (out, in, ...) float32; returns (out, in, ...) int8 and (out,) float32 scales.
    """
    rows = weights.reshape(len(weights), -1)
    largest = np.abs(rows).max(axis=1)
    for layout in (weights, np.moveaxis(weights, 1, -1)) if target == "cpu" else ():
        flat = layout.reshape(len(weights), -1)
        pairs = np.pad(flat, ((0, 0), (0, rows.shape[1] % 2))).reshape(len(weights), -1, 2)
        largest = np.maximum(largest, np.abs(pairs.sum(axis=2)).max(axis=1))
    scale = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
    if target == "tensorrt":
        half = scale.astype(np.float16)
        half = np.where(half < scale, np.nextafter(half, np.float16(np.inf)), half)  # up, so that no weight is clipped
        scale = half.astype(np.float32)
    steps = rows / scale[:, None]
    below = np.floor(steps)
    fractions = steps - below
    rank = np.argsort(np.argsort(-fractions, axis=1, kind="stable"), axis=1)
    rounded = below + (rank < np.rint(fractions.sum(axis=1))[:, None])
    return np.clip(rounded, -127, 127).astype(np.int8).reshape(weights.shape), scale


@dataclass(frozen=True)
class LayerSensitivity:
    """What quantizing one layer costs."""

    layer: str
    loss: float
    """1 - mean cosine of the embeddings to float32 with only this layer in INT8."""
    work: float
    """Share of the network's multiply-adds, 0..1."""
    kept: bool
    """Whether the layer stays in floating point."""


@dataclass(frozen=True)
class SensitivitySearch:
    """Result of a search for the layers to keep in floating point; mAP in 0..1, None if the search was by cosine."""

    map_float32: float | None
    map_int8: float | None
    """Of the exported network."""
    layers: list[LayerSensitivity]
    """Most sensitive first; empty if the limit holds with all layers in INT8."""


def quantize_network(
    parts: Parts,
    spec: ModelSpec,
    calibration: Calibration,
    method: CalibrationMethod | None = None,
    max_map_drop: float | None = None,
    report: Report = silent,
) -> tuple[onnx.ModelProto, Quantization, SensitivitySearch | None]:
    """Calibrate and quantize a float32 network to INT8 for the target in `spec.quantization`.

    `method` None tries all and keeps the one with the highest mean cosine to float32 on the selection crops.
    `max_map_drop` is how many points of mAP (of 100) may be lost on the data set's query and gallery. If more are, the
    fewest, most sensitive layers stay in floating point: they are ordered by their loss with only that layer in INT8,
    and bisection finds their number. None limits the loss on the selection crops to `MAX_LOSS` in the same way.

    Raises DataError if query and gallery cannot evaluate mAP, CheckFailedError if more is lost with all layers but one
    in floating point, or, for TensorRT, if a value exceeds the range of float16.
    """
    assert spec.quantization
    network, target, dataset = parts.network, spec.quantization.target, calibration.dataset.without_junk()
    methods = (method,) if method else METHODS
    if max_map_drop is not None:
        for problem in problems(dataset):
            raise problem

    def load(candidate: onnx.ModelProto) -> OnnxEmbedder:
        content = finalize(parts.join(candidate), spec).SerializeToString()
        return OnnxEmbedder(parse_model(Path("candidate.onnx"), content), "cpu")

    def loss(candidate: onnx.ModelProto) -> float:
        return float(1 - cosines(load(candidate).embed(calibration.selection), reference).mean())

    def mean_ap(candidate: onnx.ModelProto) -> float:
        return evaluate_dataset(dataset, embed_dataset(load(candidate), dataset, report=report).embeddings).mAP

    reference = load(network).embed(calibration.selection)
    calibrated = {name: value_ranges(network, calibration.ranges, spec.input, name, target, report) for name in methods}
    if target == "tensorrt":  # the other methods cut off the largest values
        extremes = calibrated.get("minmax") or value_ranges(
            network, calibration.ranges, spec.input, "minmax", target, report
        )
        cast_to_fp16(network, extremes)
    candidates = {name: quantize(network, ranges, target) for name, ranges in calibrated.items()}
    best = methods[0] if method else min(methods, key=lambda name: loss(candidates[name]))
    quantized, search = candidates[best], None
    if max_map_drop is not None or loss(quantized) > MAX_LOSS:
        work, excluded, judge = multiply_adds(network), excitations(network), loss if max_map_drop is None else mean_ap
        names = {node: name for node, name in layer_names(network, _LAYERS[target]).items() if node not in excluded}
        baseline = judge(network)
        tried = {0: (quantized, judge(quantized))}
        losses: dict[str, float] = {}
        order: list[str] = []

        def holds(count: int) -> bool:
            if count not in tried:
                candidate = quantize(network, calibrated[best], target, order[:count])
                tried[count] = candidate, judge(candidate)
            reached = tried[count][1]
            return reached <= MAX_LOSS if max_map_drop is None else 100 * (baseline - reached) <= max_map_drop

        if not holds(0):
            for number, node in enumerate(names):
                report("sensitivity of layers", number, len(names), names[node])
                losses[node] = loss(quantize(network, calibrated[best], target, only=[node]))
            report("sensitivity of layers", len(names), len(names))
            order = sorted(losses, key=losses.__getitem__, reverse=True)
        fewest = bisect_left(range(len(order)), True, key=holds)
        if order and fewest == len(order):
            reason = f"INT8 loses more than {max_map_drop} points of mAP"
            remedy = "Allow a larger --max-map-drop, or export FP16"
            if max_map_drop is None:
                reason = f"the mean cosine to FP32 stays below {1 - MAX_LOSS}"
                remedy = "Export FP16, or accept a loss of mAP with --max-map-drop"
            raise CheckFailedError(f"{reason} even with all layers but one in floating point", remedy)
        quantized, reached = tried[fewest]
        total = sum(work.values())
        layers = [
            LayerSensitivity(names[node], losses[node], work[node] / total, kept=number < fewest)
            for number, node in enumerate(order)
        ]
        before, after = (None, None) if max_map_drop is None else (baseline, reached)
        search = SensitivitySearch(before, after, layers)
    float_layers = tuple(layer.layer for layer in search.layers if layer.kept) if search else ()
    found = replace(
        spec.quantization,
        method=best,
        calibration_images=len(calibration.ranges),
        calibration_data=dataset.name,
        float_layers=float_layers,
    )
    return quantized, found, search
