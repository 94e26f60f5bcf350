"""Parity (docs/parity.md): invariants of a correct engine, differences from the reference, and the gates on them."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pmm_edge.bench.report import (
    QUANTILES,
    Change,
    Closeness,
    Failure,
    FailureKind,
    Gates,
    Invariant,
    InvariantName,
    ModelReport,
    Neighbors,
    Parity,
    RetrievalChange,
)
from pmm_edge.console import Report, silent
from pmm_edge.data.dataset import ReidDataset
from pmm_edge.errors import PmmError
from pmm_edge.images import Pixels
from pmm_edge.retrieval import RetrievalResult
from pmm_edge.retrieval.distances import cosines, finite_rows, unit_length
from pmm_edge.runtime import Embedder
from pmm_edge.runtime.embed_files import evaluate_dataset
from pmm_edge.runtime.embedder import Embeddings

DEFAULT_GATES = {
    "fp32": Gates(),
    "fp16": Gates(min_cosine=0.999, max_map_drop=0.1, min_mean_cosine=0.9999, max_stretch=1.01),
    "fp16, float16 sums": Gates(min_cosine=0.99, max_map_drop=0.1, min_mean_cosine=0.999, max_stretch=1.01),
    "int8": Gates(0.95, max_map_drop=0.5, min_mean_cosine=0.99, max_stretch=1.1, max_fmr_factor=1.25, max_tmr_drop=1.0),
}
"""By precision. Rounding to 8 bits moves single embeddings, so INT8 is judged by the mean cosine and mAP."""


def gates_for(precision: str, overrides: Mapping[str, float | None], float16_sums: bool = False) -> Gates:
    """Return the gates of a model; None keeps the default, which depends on its precision and `Embedder.float16_sums`.

    Raises PmmError for impossible values.
    """
    ranges = {"min_cosine": (-1, 1), "min_mean_cosine": (-1, 1), "max_map_drop": (0, 100), "max_stretch": (1, 1e6)}
    ranges |= {"max_fmr_factor": (1, 1e6), "max_tmr_drop": (0, 100)}
    chosen = {name: value for name, value in overrides.items() if value is not None}
    for name, value in chosen.items():
        low, high = ranges.get(name, (1, 0))
        if not low <= value <= high:
            raise PmmError(f"the gate {name} is {value:g}", f"The gates are {', '.join(ranges)}; see docs/parity.md")
    return replace(DEFAULT_GATES[precision + ", float16 sums" * float16_sums], **chosen)


@dataclass
class Subject:
    """A model while it is measured."""

    embedder: Embedder
    figures: ModelReport
    crops: Pixels = field(init=False)
    """A sample of the images in its input size, (N, height, width, 3) uint8."""
    embeddings: Embeddings | None = None
    """(images, D) float32, None where the model cannot run."""
    retrieval: RetrievalResult | None = None


# Invariants: properties of every correct engine, whatever its weights. An engine that breaks one is wrong, and its
# cosine to a reference may not show it, because that was computed in a single batch size.

PROBES = 8  # number of images
TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3, "int8": 2e-2}
"""Largest difference relative to the embedding's largest value. Engines use other kernels for other batch sizes."""
SAME_BATCH_TOLERANCE = {"fp32": 1e-4, "fp16": 1e-3, "int8": 1e-3}  # batch size and kernels are the same
UNIT_LENGTH_TOLERANCE = 1e-2  # float16 has three digits
MIN_DIFFERENCE = 2.0
"""Mean difference of two crops of network size, in gray levels, from which on their embeddings must differ: low
precisions may round away less, and equal pixels come in different files."""
_ODD_SIZES = (2, 3, 7)


def check_embeddings(
    embeddings: Embeddings, paths: Sequence[Path], rows: Sequence[int], crops: Pixels, normalized: bool = False
) -> list[Invariant]:
    """Check embeddings of all images, (N, D): `finite`, `distinct` (`crops` are these rows) and `unit length`."""
    finite = finite_rows(embeddings)
    found = [_no_row(InvariantName.FINITE, ~finite, paths)]
    distinct = _no_row(InvariantName.DISTINCT, (embeddings == 0).all(axis=1), paths)
    for (one, crop), (other, other_crop) in combinations(zip(rows, crops, strict=True), 2):
        differ = np.abs(crop - other_crop.astype(np.float32)).mean() >= MIN_DIFFERENCE
        if distinct.held and differ and (embeddings[one] == embeddings[other]).all():
            same = int((embeddings == embeddings[one]).all(axis=1).sum())
            image, other_image = str(paths[one]), str(paths[other])
            distinct = replace(distinct, held=False, image=image, other_image=other_image, images=same)
    found.append(distinct)
    if normalized:
        lengths = np.where(finite, np.linalg.norm(embeddings.astype(np.float64), axis=1), 1.0)
        worst = int(np.abs(lengths - 1).argmax())
        length, limit = float(lengths[worst]), UNIT_LENGTH_TOLERANCE
        found.append(Invariant(InvariantName.UNIT_LENGTH, abs(length - 1) <= limit, length, limit, str(paths[worst])))
    return found


def _no_row(name: InvariantName, bad: NDArray[np.bool_], paths: Sequence[Path]) -> Invariant:
    first = str(paths[int(bad.argmax())]) if bad.any() else ""
    return Invariant(name, not bad.any(), image=first, images=int(bad.sum()))


def check_batches(
    embedder: Embedder, probes: Pixels, paths: Sequence[Path], batch_sizes: Sequence[int] = (), report: Report = silent
) -> list[Invariant]:
    """Run the model on several batches and check `repeatable`, `equal rows`, `neighbors` and `batch size`.

    `probes` are N >= 1 different images, (N, height, width, 3) uint8, and `paths` their files. Batches of one are
    compared with batches of `batch_sizes`, of the engine's profile and of a few odd sizes.
    """
    embed, count, sizes = embedder.embed_prepared, len(probes), {*batch_sizes, *_ODD_SIZES, PROBES}
    if profile := embedder.profile:
        sizes = {size for size in sizes if profile.minimum <= size <= profile.maximum}
        sizes |= {profile.minimum, profile.optimal, profile.maximum}
    largest, what = max(sizes), f"invariants of {embedder.path.name}"
    shape = (2, *probes[0].shape)
    next_to: dict[Neighbors, Pixels] = {
        "black images": np.zeros(shape, np.uint8),
        "white images": np.full(shape, 255, np.uint8),
        "noise": np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8),
        "other images": np.resize(probes[1:] if count > 1 else probes, shape),
    }

    def runs() -> Iterator[tuple[InvariantName, Embeddings, Embeddings, NDArray[np.intp], Neighbors | None]]:
        """Yield the expected and the actual rows of each run, and the number of each row's image."""
        alone = np.concatenate([embed(probes[row : row + 1]) for row in range(count)])
        yield InvariantName.REPEATABLE, embed(probes), embed(probes), np.arange(count), None
        for image in {0, count - 1}:
            rows, which = embed(np.repeat(probes[image : image + 1], largest, axis=0)), np.full(largest, image)
            yield InvariantName.EQUAL_ROWS, np.repeat(rows[:1], largest, axis=0), rows, which, None
        first = np.zeros(2, np.intp)
        for neighbors, images in next_to.items():
            rows = embed(np.concatenate([probes[:1], images, probes[:1]]))[[0, 3]]
            yield InvariantName.NEIGHBORS, alone[first], rows, first, neighbors
        for done, size in enumerate(sorted(sizes), start=1):
            report(what, done, 1 + len(sizes), f"batch of {size}")
            which = np.resize(np.arange(count), size)
            for _ in range(2):  # the first run may record a CUDA graph and the second replay it
                yield InvariantName.BATCH_SIZE, alone[which], embed(probes[which]), which, None

    report(what, 0, 1 + len(sizes))
    worst: dict[InvariantName, tuple[float, Invariant]] = {}
    for name, expected, actual, which, neighbors in runs():
        same_batch = name in (InvariantName.REPEATABLE, InvariantName.EQUAL_ROWS)
        limit = (SAME_BATCH_TOLERANCE if same_batch else TOLERANCE)[embedder.spec.precision]
        relative = relative_differences(expected, actual)
        relative[~finite_rows(expected) & ~finite_rows(actual)] = 0.0  # reported by `finite`
        row = int(relative.argmax())
        value, image, batch = float(relative[row]), str(paths[int(which[row])]), 4 if neighbors else len(actual)
        if name not in worst or value > worst[name][0]:
            finite = value if math.isfinite(value) else None
            found = Invariant(name, value <= limit, finite, limit, image, "", 0, batch, row, neighbors)
            worst[name] = value, found
    report(what, 1 + len(sizes), 1 + len(sizes))
    return [invariant for _, invariant in worst.values()]


_PRODUCTS = ("Conv", "Gemm", "MatMul")
_INTEGER_PRODUCTS = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "QGemm")
MIN_WEIGHTS = 0.9
"""Fraction of the weights that must have the declared type, for FP32 and FP16. INT8 graphs may keep layers in float."""


def precision_failure(model: Path, declared: str) -> Failure | None:
    """Compare the weights of an ONNX file with the precision that its spec declares; some tools convert nothing.

    Only ONNX files are checked, if the onnx package is installed: the manifest of an engine counts its layers, and
    checkpoints are FP32.
    """
    if model.suffix != ".onnx" or find_spec("onnx") is None:
        return None
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    quantized = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    types, sizes = {onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16"}, Counter[str]()
    for node in graph.node:
        for name in node.input if node.op_type in _PRODUCTS + _INTEGER_PRODUCTS else ():
            tensor = stored.get(quantized.get(name, name))
            if tensor is not None and len(tensor.dims) >= 2:  # not a bias, a scale or an activation
                integer = name in quantized or node.op_type in _INTEGER_PRODUCTS
                sizes["int8" if integer else types.get(tensor.data_type, "another type")] += math.prod(tensor.dims)
    share = sizes[declared] / max(1, sizes.total())
    if share >= MIN_WEIGHTS or (declared == "int8" and share > 0):
        return None
    most = sizes.most_common(1)[0][0] if sizes else "missing"
    return Failure(FailureKind.PRECISION, share, MIN_WEIGHTS, detail=most)


# Differences from the reference


def compare(model: Subject, reference: Subject, paths: Sequence[Path], dataset: ReidDataset | None = None) -> None:
    """Compare a model with the reference: fill in its parity, change of retrieval and failed gates."""
    ours, theirs, figures = model.embedder.spec, reference.embedder.spec, model.figures
    if model.embeddings is None or reference.embeddings is None:
        return
    if ours.embedding_size != theirs.embedding_size:
        figures.failures.append(Failure(FailureKind.EMBEDDING_SIZE, ours.embedding_size, theirs.embedding_size))
        return
    expected, retrieval = expected_embeddings(model, reference), reference.retrieval
    if expected is not reference.embeddings:
        retrieval = evaluate_dataset(dataset, expected) if dataset else None
    figures.parity = differences(expected, model.embeddings, paths, ours.stages if ours.stages == theirs.stages else {})
    if retrieval and model.retrieval:
        figures.retrieval_change = retrieval_change(retrieval, model.retrieval)
    figures.failures += failed_gates(figures.parity, figures.retrieval_change, figures.gates)


def expected_embeddings(model: Subject, reference: Subject) -> Embeddings:
    """Return the reference's embeddings, scaled to unit length if the model outputs only directions."""
    assert reference.embeddings is not None
    if model.embedder.spec.normalized_output and not reference.embedder.spec.normalized_output:
        return unit_length(reference.embeddings)
    return reference.embeddings


def differences(
    reference: Embeddings, candidate: Embeddings, paths: Sequence[Path], stages: Mapping[str, tuple[int, int]]
) -> Parity:
    """Compare two models' embeddings of the same images, both (N, D) float32 with N >= 1.

    The reference is finite; rows of the candidate that are not have cosine 0, and length ratio 1, as rows of zeros do.
    `stages` are slices [start, stop) of the embedding; a single stage is not reported separately.
    """

    def closeness(start: int, stop: int | None) -> Closeness:
        cosine = cosines(reference[:, start:stop], candidate[:, start:stop])
        least, low, mean = float(cosine.min()), float(np.percentile(cosine, 1)), float(cosine.mean())
        relative = float(relative_differences(reference[:, start:stop], candidate[:, start:stop]).max())
        worst = str(paths[int(cosine.argmin())])
        return Closeness(least, low, mean, relative if math.isfinite(relative) else None, worst)

    expected, actual = (np.linalg.norm(rows.astype(np.float64), axis=1) for rows in (reference, candidate))
    valid = finite_rows(candidate) & (expected > 0) & (actual > 0)
    stretch = np.divide(actual, expected, out=np.ones(len(paths)), where=valid)
    return Parity(
        whole=closeness(0, None),
        stages={name: closeness(*stage) for name, stage in stages.items() if len(stages) > 1},
        cosine_quantiles=np.quantile(cosines(reference, candidate), np.linspace(0, 1, QUANTILES)).tolist(),
        shortest=float(stretch.min()),
        longest=float(stretch.max()),
        stretched_image=str(paths[int(np.abs(np.log(stretch)).argmax())]),
    )


def relative_differences(reference: Embeddings, candidate: Embeddings) -> NDArray[np.float64]:
    """Return each row's largest difference relative to the row's largest reference value.

    Both are (N, D); the result is (N,), infinite where either row is not finite, absolute where the reference is zero.
    """
    expected, actual = reference.astype(np.float64), candidate.astype(np.float64)
    finite = finite_rows(actual) & finite_rows(expected)
    expected, actual = (np.where(finite[:, None], rows, 0.0) for rows in (expected, actual))
    difference = np.where(finite, np.abs(actual - expected).max(axis=1), np.inf)
    largest = np.abs(expected).max(axis=1)
    return np.divide(difference, largest, out=difference.copy(), where=largest > 0)


RESAMPLES, SEED = 2000, 0  # of the bootstrap; the same embeddings give the same interval


def retrieval_change(reference: RetrievalResult, candidate: RetrievalResult) -> RetrievalChange:
    """Compare a model's retrieval with the reference, query by query."""
    before, now = (
        np.stack([one.first_match_rank == 1, one.average_precision, one.inverse_penalty], axis=1)
        for one in (reference, candidate)
    )
    rank1, mean_ap, mean_inp = paired_changes((now - before)[reference.first_match_rank > 0])
    return RetrievalChange(rank1, mean_ap, mean_inp, reference.valid_queries)


def paired_changes(values: NDArray[np.float64]) -> list[Change]:
    """Return the mean of each column with its 95 % percentile interval of a bootstrap over rows (Efron, 1979).

    `values` is (queries, figures): the difference between two models, so that the difficulty of a query cancels out.
    """
    random, count = np.random.default_rng(SEED), len(values)
    means = [values[random.integers(0, count, count)].mean(axis=0) for _ in range(RESAMPLES)]
    low, high = np.percentile(means, (2.5, 97.5), axis=0)
    return [Change(*map(float, figures)) for figures in zip(values.mean(axis=0), low, high, strict=True)]


def failed_gates(parity: Parity, change: RetrievalChange | None, gates: Gates) -> list[Failure]:
    """Return the gates that a model fails. Few queries must not make it pass: the interval of mAP is ignored."""
    whole, failures = parity.whole, []
    if not whole.cosine_min >= gates.min_cosine:
        failures.append(Failure(FailureKind.COSINE, whole.cosine_min, gates.min_cosine, whole.worst_image))
    if not whole.cosine_mean >= gates.min_mean_cosine:
        failures.append(Failure(FailureKind.MEAN_COSINE, whole.cosine_mean, gates.min_mean_cosine))
    if not 1 / gates.max_stretch <= parity.shortest <= parity.longest <= gates.max_stretch:
        worst = parity.longest if parity.longest * parity.shortest >= 1 else parity.shortest
        failures.append(Failure(FailureKind.LENGTH, worst, gates.max_stretch, parity.stretched_image))
    if change and (drop := -100 * change.mAP.difference) > gates.max_map_drop:
        failures.append(Failure(FailureKind.MAP_DROP, drop, gates.max_map_drop, change=change.mAP))
    return failures
