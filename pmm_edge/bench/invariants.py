"""Invariants: properties of every correct engine, whatever its weights, and whether a graph has its declared precision.

An engine that breaks one is wrong, and its cosine to a reference may not show it, because that was computed in a single
batch size. docs/parity.md says what each invariant catches and how the tolerances were chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from math import inf, isfinite, prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmm_edge.bench.parity import relative_differences
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
    finite = finite_rows(embeddings)
    first = "" if finite.all() else str(paths[int(finite.argmin())])
    found = [Invariant(InvariantName.FINITE, bool(finite.all()), image=first, images=int((~finite).sum()))]
    found.append(_distinct(embeddings, paths))
    if normalized:
        lengths = np.where(finite, np.linalg.norm(embeddings.astype(np.float64), axis=1), 1.0)
        worst = int(np.abs(lengths - 1).argmax())
        length, limit = float(lengths[worst]), UNIT_LENGTH_TOLERANCE
        found.append(Invariant(InvariantName.UNIT_LENGTH, abs(length - 1) <= limit, length, limit, str(paths[worst])))
    return found


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


def check_batches(
    embedder: Embedder, probes: Pixels, paths: Sequence[Path], batch_sizes: Sequence[int] = (), report: Report = silent
) -> list[Invariant]:
    """Run the model on several batches and check `repeatable`, `equal rows`, `neighbors` and `batch size`.

    `probes` are N >= 1 different images, (N, height, width, 3) uint8, and `paths` their files. Batches of one are
    compared with batches of `batch_sizes`, of the engine's profile and of a few odd sizes.
    """
    sizes, precision = sizes_to_check(embedder, batch_sizes), embedder.spec.precision
    other, same = TOLERANCE[precision], SAME_BATCH_TOLERANCE[precision]
    what, total = f"invariants of {embedder.path.name}", 1 + len(sizes)
    embed, every = embedder.embed_prepared, len(probes)

    report(what, 0, total)
    alone = np.concatenate([embed(probes[row : row + 1]) for row in range(every)])
    found = [_worst(InvariantName.REPEATABLE, embed(probes), embed(probes), np.arange(every), paths, same)]

    size, runs = max(sizes), []
    for image in {0, every - 1}:
        rows, which = embed(np.repeat(probes[image : image + 1], size, axis=0)), np.full(size, image)
        runs.append(_worst(InvariantName.EQUAL_ROWS, np.repeat(rows[:1], size, axis=0), rows, which, paths, same))
    found.append(max(runs, key=_severity))

    shape = (2, *probes[0].shape)
    next_to: dict[Neighbors, Pixels] = {
        "black images": np.zeros(shape, np.uint8),
        "white images": np.full(shape, 255, np.uint8),
        "noise": np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8),
        "other images": np.resize(probes[1:] if every > 1 else probes, shape),
    }
    runs, first = [], np.zeros(2, np.int64)
    for neighbors, images in next_to.items():
        rows = embed(np.concatenate([probes[:1], images, probes[:1]]))[[0, 3]]
        worst = _worst(InvariantName.NEIGHBORS, alone[first], rows, first, paths, other)
        runs.append(replace(worst, batch=4, neighbors=neighbors))
    found.append(max(runs, key=_severity))

    runs = []
    for done, size in enumerate(sizes, start=1):
        report(what, done, total, f"batch of {size}")
        which = np.resize(np.arange(every), size)
        # Twice: the first run may record a CUDA graph and the second replay it.
        for _ in range(2):
            runs.append(_worst(InvariantName.BATCH_SIZE, alone[which], embed(probes[which]), which, paths, other))
    report(what, total, total)
    return [*found, max(runs, key=_severity)]


def broken(invariants: Sequence[Invariant]) -> list[Failure]:
    """Return a failure for each invariant that does not hold."""
    kind = FailureKind.INVARIANT
    return [Failure(kind, one.value, one.tolerance, one.image, one) for one in invariants if not one.held]


def sizes_to_check(embedder: Embedder, batch_sizes: Sequence[int]) -> list[int]:
    """Return the sizes to check: minimum, optimum and maximum of the profile, `batch_sizes` and a few odd ones."""
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
) -> Invariant:
    """Compare the rows of one run; `which` is the number of each row's image."""
    relative = relative_differences(expected, actual)
    relative[~finite_rows(expected) & ~finite_rows(actual)] = 0.0  # reported by `finite`
    row = int(relative.argmax())
    value, image = float(relative[row]), str(paths[int(which[row])])
    finite = value if isfinite(value) else None
    return Invariant(name, value <= tolerance, finite, tolerance, image, batch=len(actual), row=row)


def _severity(found: Invariant) -> float:
    return inf if found.value is None else found.value


# Declared precision

_INTEGER_LAYERS = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "QGemm")
MIN_WEIGHTS = 0.9
"""Fraction of the weights that must have the declared type, for FP32 and FP16. INT8 graphs may keep layers in float."""


def precision_failure(model: Path, declared: str) -> Failure | None:
    """Compare the weights of an ONNX file with the precision that its spec declares; some tools convert nothing.

    Only ONNX files are checked: the manifest of an engine counts its layers, and checkpoints are FP32. Raises
    ModuleNotFoundError without the onnx package.
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
        if node.op_type not in ("Conv", "Gemm", "MatMul", *_INTEGER_LAYERS):
            continue
        for name in node.input:
            maker = makers.get(name)
            quantized = maker is not None and maker.op_type == "DequantizeLinear"
            tensor = stored.get(maker.input[0] if quantized and maker else name)
            if tensor is None or len(tensor.dims) < 2:  # a bias, a scale or an activation
                continue
            integer = quantized or node.op_type in _INTEGER_LAYERS
            yield "int8" if integer else precisions.get(tensor.data_type, "another type"), prod(tensor.dims)
