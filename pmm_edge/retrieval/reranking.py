"""k-reciprocal re-ranking (Zhong et al., Re-ranking Person Re-identification with k-reciprocal Encoding, CVPR 2017).

Queries and gallery form one set of N = Q + G images. No N x N matrix is ever stored: a first pass over blocks of
distances keeps the nearest neighbors and the largest distance of each image, and everything else is sparse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pmm_edge.console import Report, silent
from pmm_edge.errors import DataError
from pmm_edge.retrieval.distances import check_pair, squared_distance_blocks

_IMAGES_PER_PART = 256
_PAIRS_PER_PART = 2048


@dataclass(frozen=True)
class SparseRows:
    """A sparse (N, N) float32 matrix; row r has the ascending `columns[starts[r]:starts[r + 1]]` and their weights."""

    starts: NDArray[np.int64]
    columns: NDArray[np.int32]
    weights: NDArray[np.float32]

    def rows(self) -> NDArray[np.int32]:
        """Row of each entry."""
        return np.repeat(np.arange(len(self.starts) - 1, dtype=np.int32), np.diff(self.starts))

    def entries(self, rows: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Indices of the entries of `rows`, row after row, and the number of entries of each."""
        sizes = self.starts[rows + 1] - self.starts[rows]
        ends = np.cumsum(sizes)
        return np.arange(ends[-1]) + np.repeat(self.starts[rows] - (ends - sizes), sizes), sizes


def rerank_distances(
    query_features: ArrayLike,
    gallery_features: ArrayLike,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    report: Report = silent,
) -> NDArray[np.float32]:
    """Compute the re-ranked distance of every query to every gallery embedding.

    `(1 - lambda) * Jaccard distance of the k-reciprocal neighbors + lambda * squared Euclidean distance`, where the
    latter is divided by the largest squared distance of the query (equation 12, and the authors' code).

    Args:
        query_features, gallery_features: (Q, D) and (G, D) real numbers.
        k1: number of neighbors for the k-reciprocal sets.
        k2: number of neighbors whose encodings are averaged (local query expansion), at most k1; 1 disables it.
        lambda_value: weight of the original distance, in 0..1.
        report: called with the number of images whose neighbors are known, which takes most of the time.

    Returns:
        (Q, G) float32.
    """
    query, gallery = check_pair(query_features, gallery_features)
    if not 1 <= k2 <= k1 or not 0.0 <= lambda_value <= 1.0:
        problem = f"re-ranking parameters k1={k1}, k2={k2}, lambda={lambda_value} are out of range"
        raise DataError(problem, "Pass 1 <= k2 <= k1 and lambda in 0..1")
    # float16 would overflow in the squares of `_encode`.
    images = np.concatenate([query, gallery], dtype=np.result_type(query, gallery, np.float32))
    original = np.empty((len(query), len(gallery)), np.float32)
    neighbors, farthest = _neighbors(images, min(k1 + 1, len(images)), original, report)
    encoding = _expand(_encode(images, neighbors, farthest, k1), neighbors[:, :k2])
    return _blend(original, encoding, lambda_value)


def _neighbors(
    images: NDArray[Any], count: int, original: NDArray[np.float32], report: Report
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Find the nearest neighbors of each image, (N, count), and its largest squared distance, (N,).

    Neighbors are in order of distance, starting with the image itself; ties are in order of index. Also fills
    `original` (Q, G) with the queries' squared distances divided by their largest.
    """
    neighbors = np.empty((len(images), count), np.int32)
    farthest = np.empty(len(images))
    queries = len(original)
    for start, squared in squared_distance_blocks(images, images):
        stop = start + len(squared)
        largest = squared.max(axis=1)
        farthest[start:stop] = np.where(largest > 0, largest, 1.0)  # all images are identical: their distances stay 0
        if start < queries:
            to_gallery = squared[: queries - start, queries:]
            rows = slice(start, start + len(to_gallery))
            original[rows] = to_gallery / farthest[rows, None]
        own = np.arange(len(squared))
        squared[own, start + own] = -1.0  # an image is its own nearest neighbor even if it has duplicates
        for row, nearest in zip(squared.astype(np.float32), neighbors[start:stop], strict=True):
            candidates = np.flatnonzero(row <= np.partition(row, count - 1)[count - 1])
            nearest[:] = candidates[np.argsort(row[candidates], kind="stable")[:count]]
        report("re-ranking", stop, len(images))
    return neighbors, farthest


def _mutual(neighbors: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Whether each image is among the k neighbors of its neighbors (equation 5): (N, k) bool."""
    mutual = np.empty(neighbors.shape, bool)
    for start in range(0, len(neighbors), _IMAGES_PER_PART):
        part = neighbors[start : start + _IMAGES_PER_PART]
        own = np.arange(start, start + len(part), dtype=np.int32)[:, None, None]
        mutual[start : start + len(part)] = (neighbors[part] == own).any(axis=2)
    return mutual


def _encode(images: NDArray[Any], neighbors: NDArray[np.int32], farthest: NDArray[np.float64], k1: int) -> SparseRows:
    """Encode each image by its expanded k-reciprocal set (equation 7): weights exp(-distance), summing to 1."""
    # Half of k1, rounded half to even as in the authors' code, and the image itself.
    half = neighbors[:, : round(k1 / 2) + 1]
    sets = _expanded_sets(neighbors, _mutual(neighbors), half, _mutual(half))
    rows = sets.rows()
    for start in range(0, len(rows), _PAIRS_PER_PART):
        part = slice(start, start + _PAIRS_PER_PART)
        # For these few pairs, subtract: the product form would suffer from cancellation.
        difference = images[rows[part]] - images[sets.columns[part]]
        squared = np.einsum("ij,ij->i", difference, difference)
        sets.weights[part] = np.exp(-squared / farthest[rows[part]])
    sets.weights[:] /= np.add.reduceat(sets.weights, sets.starts[:-1])[rows]
    return sets


def _expanded_sets(
    neighbors: NDArray[np.int32], mutual: NDArray[np.bool_], half: NDArray[np.int32], half_mutual: NDArray[np.bool_]
) -> SparseRows:
    """Build the k-reciprocal sets, and join those of members that overlap by two thirds (equation 6). Weights are 1."""
    none = np.int32(-1)
    reciprocal = np.where(mutual, neighbors, none)
    half_reciprocal = np.where(half_mutual, half, none)
    half_size = half_mutual.sum(axis=1)
    columns, sizes = [], []
    for start in range(0, len(neighbors), _IMAGES_PER_PART):
        part = slice(start, start + _IMAGES_PER_PART)
        own = reciprocal[part]  # (n, k), -1 where not reciprocal
        theirs = np.where(own[:, :, None] >= 0, half_reciprocal[own], none)  # (n, k, h)
        flat = theirs.reshape(len(own), -1, 1)
        is_own = (flat == own[:, None, :]).any(axis=2) & (flat[:, :, 0] >= 0)
        shared = is_own.reshape(theirs.shape).sum(axis=2)
        joins = 3 * shared > 2 * half_size[own]
        joined = np.where(joins[:, :, None], theirs, none).reshape(len(own), -1)
        members = np.sort(np.concatenate([own, joined], axis=1), axis=1)
        keep = members >= 0
        keep[:, 1:] &= members[:, 1:] != members[:, :-1]
        columns.append(members[keep])
        sizes.append(keep.sum(axis=1))
    starts = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    return SparseRows(starts, np.concatenate(columns), np.ones(starts[-1], np.float32))


def _expand(matrix: SparseRows, nearest: NDArray[np.int32]) -> SparseRows:
    """Average the rows of each image's `nearest`, (N, k2): local query expansion (equation 11)."""
    total, k2 = nearest.shape
    if k2 == 1:
        return matrix
    columns, weights, sizes = [], [], []
    for start in range(0, total, _IMAGES_PER_PART):
        part = nearest[start : start + _IMAGES_PER_PART]
        entries, entry_counts = matrix.entries(part.ravel())
        target = np.repeat(np.repeat(np.arange(len(part)), k2), entry_counts)
        key = target * total + matrix.columns[entries]
        order = np.argsort(key, kind="stable")
        key = key[order]
        firsts = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
        weights.append(np.add.reduceat(matrix.weights[entries][order], firsts) / np.float32(k2))
        columns.append((key[firsts] % total).astype(np.int32))
        sizes.append(np.bincount(key[firsts] // total, minlength=len(part)))
    starts = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    return SparseRows(starts, np.concatenate(columns), np.concatenate(weights))


def _blend(original: NDArray[np.float32], encoding: SparseRows, lambda_value: float) -> NDArray[np.float32]:
    """Blend the original distances with the Jaccard distances of the encodings (equation 10), in place.

    Rows sum to 1. If m is the sum of the minima of two rows, which only columns of both contribute to, the sum of the
    maxima is 2 - m. So only images that share a column with the query are visited.
    """
    queries, gallery = original.shape
    # The transposed rows of the gallery: row c lists the gallery images with column c.
    begin = encoding.starts[queries]
    columns = encoding.columns[begin:]
    order = np.argsort(columns, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(columns, minlength=queries + gallery))])
    images = encoding.rows()[begin:] - np.int32(queries)
    by_column = SparseRows(starts, images[order], encoding.weights[begin:][order])
    for query, distances in enumerate(original):
        own = slice(encoding.starts[query], encoding.starts[query + 1])
        entries, sizes = by_column.entries(encoding.columns[own])
        minima = np.minimum(by_column.weights[entries], np.repeat(encoding.weights[own], sizes))
        shared = np.bincount(by_column.columns[entries], minima, minlength=gallery)
        np.minimum(shared, 1.0, out=shared)  # float32 weights sum to 1 up to rounding
        jaccard = 1.0 - shared / (2.0 - shared)
        distances[:] = (1.0 - lambda_value) * jaccard + lambda_value * distances
    return original
