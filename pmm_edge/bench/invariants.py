"""Whether a graph computes in the precision that its spec claims: a tool that converts in silence leaves FP32."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmm_edge.bench.parity import relative_differences
from pmm_edge.bench.report import Invariant, InvariantName
from pmm_edge.console import Report, silent
from pmm_edge.images import Pixels, evenly
from pmm_edge.retrieval.distances import finite_rows
from pmm_edge.runtime import Embedder
from pmm_edge.runtime.embedder import Embeddings

_LAYERS = ("Conv", "Gemm", "MatMul")
_INTEGER_LAYERS = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "QGemm")
_MOST = 0.9
"""Of the weights, in FP32 and FP16. An INT8 graph may keep any layers in float, but not all."""


def precision_failure(model: Path, claimed: str) -> str | None:
    """The sentence where an ONNX graph is of another precision than its spec says; None where it is of that one.

    Args:
        model: an ONNX file. Of an engine its manifest counts the layers, and a checkpoint is FP32.
        claimed: `fp32`, `fp16` or `int8`.

    Raises:
        ModuleNotFoundError: the onnx package is not installed.
    """
    if model.suffix != ".onnx":
        return None
    import onnx

    shares = _shares(onnx.load(model, load_external_data=False).graph)
    held = shares.get(claimed, 0.0)
    if (claimed == "int8" and held > 0) or held >= _MOST:
        return None
    found = ", ".join(f"{100 * share:.0f} % {kind}" for kind, share in sorted(shares.items(), key=lambda one: -one[1]))
    return f"says that it is {claimed}, and its weights are {found or 'none'}"


def _shares(graph: Any) -> dict[str, float]:
    """The share of each precision in the weights of all convolutions and matrix products."""
    sizes: Counter[str] = Counter()
    for kind, size in _weights(graph):
        sizes[kind] += size
    total = sum(sizes.values())
    return {kind: size / total for kind, size in sizes.items()}


def _weights(graph: Any) -> Iterator[tuple[str, int]]:
    import onnx

    stored = {tensor.name: tensor for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    kinds = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16"}
    for node in graph.node:
        if node.op_type not in (*_LAYERS, *_INTEGER_LAYERS):
            continue
        for name in node.input:
            maker = makers.get(name)
            quantised = maker is not None and maker.op_type == "DequantizeLinear"
            tensor = stored.get(maker.input[0] if quantised and maker else name)
            if tensor is None or len(tensor.dims) < 2:  # a bias, a scale, a value of the graph's
                continue
            integer = quantised or node.op_type in _INTEGER_LAYERS
            yield "int8" if integer else kinds.get(tensor.data_type, "another type"), prod(tensor.dims)


PROBES = 8
"""Images that the invariants are held on."""
TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3, "int8": 2e-2}
"""The largest difference of a value, as a share of the embedding's largest, that is no breach. Engines choose other
kernels for other batch sizes, which add in another order: docs/parity.md has what was measured."""
SAME_RUN_TOLERANCE = {"fp32": 1e-4, "fp16": 1e-3, "int8": 1e-3}
"""Where the batch is of one size and so of one kernel: its rows, and the same batch again."""
UNIT_TOLERANCE = 1e-2
"""How far from 1 a length may be that the spec says is 1: float16 has three digits."""
_ODD_SIZES = (2, 3, 7)


def fault_of(embeddings: Embeddings, paths: Sequence[Path], normalized: bool = False) -> list[Invariant]:
    """`finite`, `distinct` and for those that should be `unit length`, from embeddings of all images, (N, D)."""
    unit = [_unit_length(embeddings, paths)] if normalized else []
    return [_finite(embeddings, paths), _distinct(embeddings, paths), *unit]


def held_in_batches(
    embedder: Embedder, probes: Pixels, paths: Sequence[Path], batches: Sequence[int] = (), report: Report = silent
) -> list[Invariant]:
    """`repeatable`, `equal rows`, `batch size` and `neighbours`, from runs of their own.

    Args:
        embedder: the model.
        probes: (N, height, width, 3) uint8, N >= 1; a few images that differ.
        paths: of the N images.
        batches: sizes to hold against a batch of one, beside those of the engine's profile and a few odd ones.
        report: told how many of the runs are done.
    """
    sizes = batch_sizes(embedder, batches)
    what, total = f"invariants of {embedder.path.name}", 4 + len(sizes)
    done = iter(range(total + 1))

    def told(detail: str) -> None:
        report(what, next(done), total, detail)

    told("batch of 1")
    alone = np.concatenate([embedder.embed_prepared(probes[row : row + 1]) for row in range(len(probes))])
    names, precision = [path.name for path in paths], embedder.spec.precision
    judge = _Judge(alone, names, TOLERANCE.get(precision, TOLERANCE["fp32"]))
    same_run = _Judge(alone, names, SAME_RUN_TOLERANCE.get(precision, SAME_RUN_TOLERANCE["fp32"]))
    told("repeatable")
    first, second = embedder.embed_prepared(probes), embedder.embed_prepared(probes)
    found = [_invariant("repeatable", [same_run.beside("the same batch again", second, first)])]
    told("equal rows")
    found.append(_invariant("equal rows", _equal_rows(embedder, probes, max(sizes), same_run)))
    told("neighbours")
    found.append(_invariant("neighbours", list(_among_neighbours(embedder, probes, judge))))
    beside = []
    for size in sizes:
        told(f"batch of {size}")
        rows = np.resize(np.arange(len(probes)), size)
        # Cold and warm may be two code paths, a captured graph for one: both count.
        runs = [judge.alone(f"batch {size}", embedder.embed_prepared(probes[rows]), rows) for _ in range(2)]
        beside.append(max(runs, key=lambda one: one.relative))
    told("")
    return [*found, _invariant("batch size", beside)]


def breaches(invariants: Sequence[Invariant]) -> list[str]:
    """A sentence for each that is broken, to be read after the model's name."""
    return [f"breaks the invariant '{one.name}': {one.detail}" for one in invariants if not one.held]


def batch_sizes(embedder: Embedder, batches: Sequence[int]) -> list[int]:
    """The sizes that are held against a batch of one: the profile's ends and middle, those timed, a few odd ones."""
    profile = embedder.profile
    sizes = {*batches, *_ODD_SIZES, PROBES}
    if profile:
        own = {profile.minimum, profile.optimal, profile.maximum}
        sizes = {size for size in sizes if profile.minimum <= size <= profile.maximum} | own
    return sorted(sizes)


class _Judge:
    """Holds embeddings against those of the same images on their own."""

    def __init__(self, own: Embeddings, names: Sequence[str], tolerance: float) -> None:
        self._own, self._names, self.tolerance = own, names, tolerance

    def alone(self, what: str, rows: Embeddings, which: NDArray[np.int64]) -> _Found:
        return self.beside(what, rows, self._own[which], which)

    def beside(
        self, what: str, rows: Embeddings, expected: Embeddings, which: NDArray[np.int64] | None = None
    ) -> _Found:
        relative = relative_differences(expected, rows)
        both_broken = ~finite_rows(expected) & ~finite_rows(rows)
        relative = np.where(both_broken, 0.0, relative)  # that is another invariant's
        worst = int(relative.argmax())
        number = worst if which is None else int(which[worst])
        return _Found(what, float(relative[worst]), self._names[number], worst, self.tolerance)


class _Found:
    """The largest difference of one run."""

    def __init__(self, what: str, relative: float, image: str, row: int, tolerance: float) -> None:
        self.what, self.relative, self.image, self.row, self.tolerance = what, relative, image, row, tolerance

    @property
    def held(self) -> bool:
        return self.relative <= self.tolerance


def _invariant(name: InvariantName, found: Sequence[_Found]) -> Invariant:
    """One line of the worst of all runs; the broken ones are counted."""
    worst = max(found, key=lambda one: one.relative)
    broken = [one for one in found if not one.held]
    if not broken:
        runs = ", ".join(one.what for one in found)
        return Invariant(name, True, f"{runs}: largest difference {worst.relative:.1e}, {worst.tolerance:g} allowed")
    runs = ", ".join(one.what for one in broken)
    size = "NaN or infinity" if np.isinf(worst.relative) else f"{worst.relative:.2g} of the largest value"
    return Invariant(
        name,
        False,
        f"{runs}: differs by {size} in row {worst.row} ({worst.image}), {worst.tolerance:g} is allowed",
    )


def _equal_rows(embedder: Embedder, probes: Pixels, size: int, judge: _Judge) -> list[_Found]:
    """Batches of one image over and over."""
    found = []
    for image in (0, len(probes) - 1):
        rows = embedder.embed_prepared(np.repeat(probes[image : image + 1], size, axis=0))
        which = np.full(size, image)
        found.append(judge.beside(f"batch of {size} times one image", rows, np.repeat(rows[:1], size, axis=0), which))
    return [max(found, key=lambda one: one.relative)]


def _among_neighbours(embedder: Embedder, probes: Pixels, judge: _Judge) -> Iterator[_Found]:
    """The same image, first and last in a batch, beside neighbours of all kinds, the extreme ones with them."""
    shape = probes[0].shape
    noise = np.random.default_rng(0).integers(0, 256, (2, *shape), dtype=np.uint8)
    fillers = {
        "black neighbours": np.zeros((2, *shape), np.uint8),
        "white neighbours": np.full((2, *shape), 255, np.uint8),
        "noise as neighbours": noise,
    }
    if len(probes) > 1:
        fillers["other images as neighbours"] = np.resize(probes[1:], (2, *shape))
    for what, others in fillers.items():
        rows = embedder.embed_prepared(np.concatenate([probes[:1], others, probes[:1]]))
        yield judge.alone(what, rows[[0, 3]], np.zeros(2, np.int64))


def _finite(embeddings: Embeddings, paths: Sequence[Path]) -> Invariant:
    finite = finite_rows(embeddings)
    if finite.all():
        return Invariant("finite", True, f"no NaN and no infinity on {len(paths):,} images")
    first = paths[int(finite.argmin())]
    return Invariant(
        "finite", False, f"NaN or infinity for {(~finite).sum():,} of {len(paths):,} images, first for {first}"
    )


def _unit_length(embeddings: Embeddings, paths: Sequence[Path]) -> Invariant:
    finite = finite_rows(embeddings)
    lengths = np.where(finite, np.linalg.norm(embeddings.astype(np.float64), axis=1), 1.0)
    off = np.abs(lengths - 1)
    worst = int(off.argmax())
    if off[worst] <= UNIT_TOLERANCE:
        return Invariant("unit length", True, f"lengths {lengths.min():.4f} to {lengths.max():.4f}, as the spec says")
    return Invariant(
        "unit length",
        False,
        f"the spec says that embeddings are of length 1, that of {paths[worst]} is {lengths[worst]:.4g}",
    )


def _distinct(embeddings: Embeddings, paths: Sequence[Path]) -> Invariant:
    """Different images give different embeddings: held on the probes, and against all zeros on all images."""
    zero = ~embeddings.any(axis=1)
    if zero.any():
        first = paths[int(zero.argmax())]
        return Invariant("distinct", False, f"all zeros for {zero.sum():,} of {len(paths):,} images, first for {first}")
    if len(paths) > 1 and (embeddings == embeddings[0]).all():
        return Invariant("distinct", False, f"one and the same embedding for all {len(paths):,} images")
    probes = evenly(len(paths), PROBES)
    for one, other in combinations(probes, 2):
        if (embeddings[one] == embeddings[other]).all() and paths[one].read_bytes() != paths[other].read_bytes():
            return Invariant("distinct", False, f"one and the same embedding for {paths[one]} and {paths[other]}")
    return Invariant("distinct", True, f"{len(probes)} images spread over all give different embeddings")
