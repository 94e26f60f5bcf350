"""Invariants: properties of every correct engine, whatever its weights, and whether a graph has its declared precision.

An engine that breaks one is wrong, and its cosine to a reference may not show it, because that was computed in a single
batch size. docs/parity.md says what each invariant catches and how the tolerances were chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from math import isfinite, prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmm_edge.bench.parity import differences
from pmm_edge.bench.report import Failure, FailureKind, Invariant, InvariantName, Neighbors
from pmm_edge.console import Report, silent
from pmm_edge.images import Pixels, evenly
from pmm_edge.retrieval.distances import finite_rows
from pmm_edge.runtime import Embedder
from pmm_edge.runtime.embedder import Embeddings

PROBES = 8
"""Number of images that the invariants are checked on."""
TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3, "int8": 2e-2}
"""Largest difference relative to the embedding's largest value. Engines use other kernels for other batch sizes, which
add in another order."""
SAME_BATCH_TOLERANCE = {"fp32": 1e-4, "fp16": 1e-3, "int8": 1e-3}
"""The same within one batch, and for the same batch again: batch size and kernels are the same."""
UNIT_LENGTH_TOLERANCE = 1e-2
"""float16 has three digits."""
_ODD_SIZES = (2, 3, 7)


def check_embeddings(embeddings: Embeddings, paths: Sequence[Path], normalized: bool = False) -> list[Invariant]:
    """Check embeddings of all images, (N, D): `finite`, `distinct` and, where the spec declares it, `unit length`."""
    found = [_finite(embeddings, paths), _distinct(embeddings, paths)]
    return [*found, _unit_length(embeddings, paths)] if normalized else found


def check_batches(
    embedder: Embedder, probes: Pixels, paths: Sequence[Path], batch_sizes: Sequence[int] = (), report: Report = silent
) -> list[Invariant]:
    """Run the model on several batches and check `repeatable`, `equal rows`, `neighbors` and `batch size`.

    Args:
        embedder: the model.
        probes: (N, height, width, 3) uint8, N >= 1: different images.
        paths: the N images.
        batch_sizes: sizes to compare with batches of one, in addition to those of the engine's profile and a few odd
            ones.
        report: called before each run.
    """
    sizes, precision = sizes_to_check(embedder, batch_sizes), embedder.spec.precision
    other, same = TOLERANCE[precision], SAME_BATCH_TOLERANCE[precision]
    what, total, done = f"invariants of {embedder.path.name}", 4 + len(sizes), iter(range(5 + len(sizes)))
    embed, every = embedder.embed_prepared, np.arange(len(probes))

    report(what, next(done), total, "batch of 1")
    alone = np.concatenate([embed(probes[row : row + 1]) for row in every])
    report(what, next(done), total, InvariantName.REPEATABLE.value)
    found = [_worst(InvariantName.REPEATABLE, embed(probes), embed(probes), every, paths, same)]

    report(what, next(done), total, InvariantName.EQUAL_ROWS.value)
    size, runs = max(sizes), []
    for image in {0, len(probes) - 1}:
        rows, which = embed(np.repeat(probes[image : image + 1], size, axis=0)), np.full(size, image)
        runs.append(_worst(InvariantName.EQUAL_ROWS, np.repeat(rows[:1], size, axis=0), rows, which, paths, same))
    found.append(max(runs, key=_severity))

    report(what, next(done), total, InvariantName.NEIGHBORS.value)
    runs = []
    for neighbors, images in _neighbors(probes).items():
        rows = embed(np.concatenate([probes[:1], images, probes[:1]]))[[0, 3]]
        first = np.zeros(2, np.int64)
        runs.append(_worst(InvariantName.NEIGHBORS, alone[first], rows, first, paths, other, 4, neighbors))
    found.append(max(runs, key=_severity))

    runs = []
    for size in sizes:
        report(what, next(done), total, f"batch of {size}")
        which = np.resize(every, size)
        # Twice: the first run may record a CUDA graph and the second replay it.
        for _ in range(2):
            runs.append(_worst(InvariantName.BATCH_SIZE, alone[which], embed(probes[which]), which, paths, other))
    report(what, total, total)
    return [*found, max(runs, key=_severity)]


def broken(invariants: Sequence[Invariant]) -> list[Failure]:
    """Return a failure for each invariant that does not hold."""
    return [
        Failure(FailureKind.INVARIANT, one.value, one.tolerance, one.image, one) for one in invariants if not one.held
    ]


def sizes_to_check(embedder: Embedder, batch_sizes: Sequence[int]) -> list[int]:
    """Return the batch sizes to check: minimum, optimum and maximum of the profile, timed sizes and a few odd ones."""
    profile, sizes = embedder.profile, {*batch_sizes, *_ODD_SIZES, PROBES}
    if profile:
        own = {profile.minimum, profile.optimal, profile.maximum}
        sizes = {size for size in sizes if profile.minimum <= size <= profile.maximum} | own
    return sorted(sizes)


def _worst(
    name: InvariantName,
    expected: Embeddings,
    actual: Embeddings,
    which: NDArray[np.int64],
    paths: Sequence[Path],
    tolerance: float,
    batch: int | None = None,
    neighbors: Neighbors | None = None,
) -> Invariant:
    """Compare the rows of one run; `which` is the number of each row's image."""
    _, relative = differences(expected, actual)
    relative[~finite_rows(expected) & ~finite_rows(actual)] = 0.0  # reported by `finite`
    row = int(relative.argmax())
    value = float(relative[row])
    return Invariant(
        name,
        held=value <= tolerance,
        value=value if isfinite(value) else None,
        tolerance=tolerance,
        image=str(paths[int(which[row])]),
        batch=batch or len(actual),
        row=row,
        neighbors=neighbors,
    )


def _severity(found: Invariant) -> float:
    return float("inf") if found.value is None else found.value


def _neighbors(probes: Pixels) -> dict[Neighbors, Pixels]:
    """Return pairs of images to share a batch with, extreme ones included; each (2, height, width, 3)."""
    shape = (2, *probes[0].shape)
    found: dict[Neighbors, Pixels] = {
        "black images": np.zeros(shape, np.uint8),
        "white images": np.full(shape, 255, np.uint8),
        "noise": np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8),
    }
    return found if len(probes) == 1 else {**found, "other images": np.resize(probes[1:], shape)}


def _finite(embeddings: Embeddings, paths: Sequence[Path]) -> Invariant:
    wrong = ~finite_rows(embeddings)
    first = str(paths[int(wrong.argmax())]) if wrong.any() else ""
    return Invariant(InvariantName.FINITE, not wrong.any(), image=first, images=int(wrong.sum()))


def _unit_length(embeddings: Embeddings, paths: Sequence[Path]) -> Invariant:
    lengths = np.where(finite_rows(embeddings), np.linalg.norm(embeddings.astype(np.float64), axis=1), 1.0)
    worst = int(np.abs(lengths - 1).argmax())
    length, tolerance = float(lengths[worst]), UNIT_LENGTH_TOLERANCE
    held = abs(length - 1) <= tolerance
    return Invariant(InvariantName.UNIT_LENGTH, held, length, tolerance, image=str(paths[worst]))


def _distinct(embeddings: Embeddings, paths: Sequence[Path]) -> Invariant:
    """Check that no embedding is zero, and that a few images that differ have different embeddings."""
    name, zero = InvariantName.DISTINCT, ~embeddings.any(axis=1)
    if zero.any():
        return Invariant(name, held=False, image=str(paths[int(zero.argmax())]), images=int(zero.sum()))
    if len(paths) > 1 and (embeddings == embeddings[0]).all():
        return Invariant(name, held=False, image=str(paths[0]), other_image=str(paths[1]), images=len(paths))
    for one, other in combinations(evenly(len(paths), PROBES), 2):
        if (embeddings[one] == embeddings[other]).all() and paths[one].read_bytes() != paths[other].read_bytes():
            return Invariant(name, held=False, image=str(paths[one]), other_image=str(paths[other]), images=2)
    return Invariant(name, held=True)


# Declared precision

_LAYERS = ("Conv", "Gemm", "MatMul")
_INTEGER_LAYERS = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "QGemm")
MIN_WEIGHTS = 0.9
"""Fraction of the weights that must have the declared type, for FP32 and FP16. INT8 graphs may keep layers in float."""


def precision_failure(model: Path, declared: str) -> Failure | None:
    """Compare the weights of an ONNX file with the precision that its spec declares; some tools convert nothing.

    Only ONNX files are checked: the manifest of an engine counts its layers, and checkpoints are FP32.

    Raises:
        ModuleNotFoundError: the onnx package is not installed.
    """
    if model.suffix != ".onnx":
        return None
    import onnx

    sizes: Counter[str] = Counter()
    for precision, size in _weights(onnx.load(model, load_external_data=False).graph):
        sizes[precision] += size
    share = sizes[declared] / max(1, sizes.total())
    if share >= MIN_WEIGHTS or (declared == "int8" and share > 0):
        return None
    most = sizes.most_common(1)[0][0] if sizes else "missing"
    return Failure(FailureKind.PRECISION, share, MIN_WEIGHTS, detail=most)


def _weights(graph: Any) -> Iterator[tuple[str, int]]:
    """Yield the precision and the number of weights of each convolution and matrix product."""
    import onnx

    stored = {tensor.name: tensor for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    precisions = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16"}
    for node in graph.node:
        if node.op_type not in (*_LAYERS, *_INTEGER_LAYERS):
            continue
        for name in node.input:
            maker = makers.get(name)
            quantized = maker is not None and maker.op_type == "DequantizeLinear"
            tensor = stored.get(maker.input[0] if quantized and maker else name)
            if tensor is None or len(tensor.dims) < 2:  # a bias, a scale or an activation
                continue
            integer = quantized or node.op_type in _INTEGER_LAYERS
            yield "int8" if integer else precisions.get(tensor.data_type, "another type"), prod(tensor.dims)
