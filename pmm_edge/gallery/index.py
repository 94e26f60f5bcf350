"""The FAISS index of a folder: inverted lists of 128 principal components of 8 bits, which find candidates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil, log2, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pmm_edge.console import Report
from pmm_edge.runtime.embedder import Embeddings

if TYPE_CHECKING:
    from pmm_edge.gallery.folder import View

COMPONENTS, COMPONENT_ROWS = 128, 20_000
"""The index compares 128 principal components of 8 bits each, computed from at most 20,000 rows."""
LIST_SAMPLES, ROUNDS = 40, 10
"""Its lists are trained on 40 rows each, in 10 rounds."""
RECALL, PROBED = 0.995, 64
"""It is tuned to this recall at 10, which is measured on 64 of its rows."""
FEW_QUERIES = 8


@dataclass(frozen=True)
class IndexFacts:
    """How an index was built, and which rows are in it."""

    name: str
    checksum: int
    below: int  # rows of smaller numbers are in it
    trained: int  # number of rows when it was trained
    lists: int
    probes: int  # lists that a search reads
    candidates: int  # rows that are then compared exactly
    recall: float  # at 10, of rows of the gallery as queries, when it was trained
    removed: int = 0  # rows deleted since


def nearest_rows(
    queries: Embeddings, want: int, parts: Iterable[tuple[NDArray[np.int64], Embeddings]]
) -> NDArray[np.int64]:
    """Compare all rows, given as positions and vectors, by Euclidean distance in float32.

    Returns the positions of the nearest ones, (Q, want), nearest first, -1 where there are no more.
    """
    import faiss

    best = np.full((len(queries), want), np.inf, np.float32)
    nearest = np.full((len(queries), want), -1, np.int64)
    for positions, vectors in parts:
        distances, found = faiss.knn(queries, vectors, min(want, len(vectors)))
        distances = np.concatenate([best, distances], axis=1)
        order = np.argsort(distances, axis=1, kind="stable")[:, :want]
        best = np.take_along_axis(distances, order, 1)
        nearest = np.take_along_axis(np.concatenate([nearest, positions[found]], axis=1), order, 1)
    return nearest


def build_index(view: View, what: str, report: Report) -> tuple[Any, IndexFacts]:
    """Train an index, add all rows by their ascending numbers, and tune it to the target recall."""
    import faiss

    count, numbers, generator = len(view), view.numbers, np.random.default_rng(0)
    lists = 2 ** round(log2(2 * sqrt(count)))
    report(what, 0, count)
    sample = view.take(np.sort(generator.choice(count, min(count, LIST_SAMPLES * lists), replace=False)))
    projection = _principal_components(sample[:: ceil(len(sample) / COMPONENT_ROWS)], min(COMPONENTS, sample.shape[1]))
    inner = faiss.index_factory(projection.d_out, f"IVF{lists},SQ8")
    inner.cp.niter = ROUNDS
    index = faiss.IndexPreTransform(projection, inner)
    index.train(sample)
    del sample
    probed = np.sort(generator.choice(count, PROBED, replace=False))
    queries = view.take(probed)

    def added() -> Iterator[tuple[NDArray[np.int64], Embeddings]]:
        for positions, vectors in view.chunks():
            index.add_with_ids(vectors, numbers[positions])
            yield positions, vectors
            report(what, int(positions[-1]) + 1, count)

    nearest = nearest_rows(queries, 11, added())
    truth = [row[row != own][:10] for row, own in zip(nearest, probed, strict=True)]
    probes, candidates = max(1, lists // 32), 100
    while True:
        found = search_index(index, queries, candidates + 1, probes)
        recall = float(np.mean([np.isin(numbers[row], one).mean() for row, one in zip(truth, found, strict=True)]))
        if recall >= RECALL or (probes == lists and candidates >= 1000):
            break
        if probes < lists:
            probes = min(lists, ceil(1.4 * probes))
        else:
            candidates *= 2
    return index, IndexFacts("", 0, int(numbers[-1]) + 1, count, lists, probes, candidates, recall)


def _principal_components(sample: Embeddings, count: int) -> Any:
    """The FAISS transform to `count` principal components, by subspace iteration, ten times as fast as its PCA."""
    import faiss

    mean = sample.mean(axis=0)
    centered, width = sample - mean, min(sample.shape[1], count + 32)
    basis = np.random.default_rng(0).standard_normal((sample.shape[1], width), np.float32)
    for _ in range(4):
        basis = centered.T @ (centered @ basis)
        values, vectors = np.linalg.eigh(basis.T.astype(np.float64) @ basis)  # several times as fast as a QR
        basis = (basis @ (vectors / np.sqrt(values.clip(max(1e-12 * values[-1], 1e-30))))).astype(np.float32)
    projected = centered @ basis
    axes = (basis @ np.linalg.eigh(projected.T @ projected)[1][:, ::-1])[:, :count]
    transform = faiss.LinearTransform(sample.shape[1], count, True)
    faiss.copy_array_to_vector(np.ascontiguousarray(axes.T, np.float32).ravel(), transform.A)
    faiss.copy_array_to_vector((-mean @ axes).astype(np.float32), transform.b)
    transform.is_trained = True
    return transform


def search_index(index: Any, queries: Embeddings, count: int, probes: int, selector: Any = None) -> NDArray[np.int64]:
    """Numbers of rows that the index finds: (Q, count), -1 where there are no more."""
    import faiss

    lists = faiss.SearchParametersIVF(nprobe=probes, sel=selector)
    threads = faiss.omp_get_max_threads()
    if len(queries) < FEW_QUERIES:  # threads that wait for each other take longer than the work
        faiss.omp_set_num_threads(1)
    try:
        parameters = faiss.SearchParametersPreTransform(index_params=lists)
        found: NDArray[np.int64] = index.search(queries, count, params=parameters)[1]
    finally:
        faiss.omp_set_num_threads(threads)
    return found
