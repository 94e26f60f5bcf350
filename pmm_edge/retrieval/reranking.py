"""k-reciprocal re-ranking (Zhong et al., Re-ranking Person Re-identification with k-reciprocal Encoding, CVPR 2017).

Queries and gallery form one set of N = Q + G images. No N x N matrix is ever stored: a first pass over blocks of
distances keeps the nearest neighbors and the largest distance of each image, and everything else is sparse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pmm_edge.console import Report, silent
from pmm_edge.retrieval.distances import check_pair, distance_blocks
from pmm_edge.spec import Distance

K1 = 20  # neighbors for the k-reciprocal sets
K2 = 6  # neighbors whose encodings are averaged (local query expansion)
LAMBDA = 0.3  # weight of the original distance
_IMAGES_PER_PART = 64


class SparseRows(NamedTuple):
    """A sparse (N, N) float32 matrix; row r has the ascending `columns[starts[r]:starts[r + 1]]` and their weights."""

    starts: NDArray[np.int64]
    columns: NDArray[np.int32]
    weights: NDArray[np.float32]

    @classmethod
    def join(cls, parts: Sequence[tuple[NDArray[np.intp], NDArray[np.int32], NDArray[np.float32]]]) -> SparseRows:
        """Join consecutive rows, given as the number of entries of each row, the columns and the weights."""
        sizes, columns, weights = map(np.concatenate, zip(*parts, strict=True))
        return cls(np.append(0, np.cumsum(sizes)), columns, weights)

    def entries(self, rows: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Indices of the entries of `rows`, row after row, and the number of entries of each."""
        sizes = self.starts[rows + 1] - self.starts[rows]
        ends = np.cumsum(sizes)
        return np.arange(ends[-1]) + np.repeat(self.starts[rows] - (ends - sizes), sizes), sizes


def rerank_distances(
    query_features: ArrayLike, gallery_features: ArrayLike, distance: Distance = "euclidean", report: Report = silent
) -> NDArray[np.float32]:
    """Compute the re-ranked distances between (Q, D) and (G, D) embeddings: (Q, G) float32.

    `(1 - LAMBDA) * Jaccard distance of the k-reciprocal neighbors + LAMBDA * squared Euclidean distance`, where the
    latter is divided by the largest of the query (equation 12, and the authors' code). By cosine, embeddings are first
    scaled to unit length: half the squared Euclidean distance is then 1 - cosine. `report` is called with the number
    of images whose neighbors are known, which takes most of the time.
    """
    query, gallery = check_pair(query_features, gallery_features, distance)
    # float16 would overflow in the squares of `_encode`.
    images = np.concatenate([query, gallery], dtype=np.result_type(query, gallery, np.float32))
    original = np.empty((len(query), len(gallery)), np.float32)
    neighbors, farthest = _neighbors(images, min(K1 + 1, len(images)), original, report)
    # Half of K1, rounded half to even as in the authors' code, and the image itself.
    encoding = _encode(images, neighbors, neighbors[:, : round(K1 / 2) + 1], farthest)
    _blend(original, _expand(encoding, neighbors[:, :K2]))
    return original


def _neighbors(
    images: NDArray[Any], count: int, original: NDArray[np.float32], report: Report
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Find the nearest neighbors of each image, (N, count), itself first, and its largest squared distance, (N,).

    Ties are in order of index. Also fills `original` (Q, G) with squared distances divided by the query's largest.
    """
    neighbors, farthest = np.empty((len(images), count), np.int32), np.empty(len(images))
    queries = len(original)
    for start, squared in distance_blocks(images, images, "squared"):
        stop = start + len(squared)
        largest = squared.max(axis=1)
        farthest[start:stop] = np.where(largest > 0, largest, 1.0)  # all images are identical: their distances stay 0
        if start < queries:
            part = slice(start, min(stop, queries))
            original[part] = squared[: queries - start, queries:] / farthest[part, None]
        own = np.arange(len(squared))
        squared[own, start + own] = -1.0  # an image is its own nearest neighbor even if it has duplicates
        for row, nearest in zip(squared.astype(np.float32), neighbors[start:stop], strict=True):
            candidates = np.flatnonzero(row <= np.partition(row, count - 1)[count - 1])
            nearest[:] = candidates[np.argsort(row[candidates], kind="stable")[:count]]
        report("re-ranking", stop, len(images))
    return neighbors, farthest


def _reciprocal(neighbors: NDArray[np.int32]) -> NDArray[np.int32]:
    """Set each neighbor that does not have the image among its own k neighbors to -1 (equation 5): (N, k)."""
    reciprocal = np.full_like(neighbors, -1)
    for start in range(0, len(neighbors), _IMAGES_PER_PART):
        part = neighbors[start : start + _IMAGES_PER_PART]
        own = np.arange(start, start + len(part), dtype=np.int32)[:, None, None]
        mutual = (neighbors[part] == own).any(axis=2)
        reciprocal[start : start + len(part)][mutual] = part[mutual]
    return reciprocal


def _encode(
    images: NDArray[Any], neighbors: NDArray[np.int32], half: NDArray[np.int32], farthest: NDArray[np.float64]
) -> SparseRows:
    """Encode each image by its k-reciprocal set (equation 7): weights exp(-distance), summing to 1.

    The `half` sets of members that overlap with it by two thirds are joined to a set (equation 6).
    """
    none = np.int32(-1)
    reciprocal, half_reciprocal = _reciprocal(neighbors), _reciprocal(half)
    half_size = (half_reciprocal >= 0).sum(axis=1)
    parts = []
    for start in range(0, len(neighbors), _IMAGES_PER_PART):
        own = reciprocal[start : start + _IMAGES_PER_PART]  # (n, k), -1 where not reciprocal
        theirs = np.where(own[:, :, None] >= 0, half_reciprocal[own], none)  # (n, k, h)
        flat = theirs.reshape(len(own), -1, 1)
        is_own = (flat == own[:, None, :]).any(axis=2) & (flat[:, :, 0] >= 0)
        shared = is_own.reshape(theirs.shape).sum(axis=2)
        joins = 3 * shared > 2 * half_size[own]
        joined = np.where(joins[:, :, None], theirs, none).reshape(len(own), -1)
        members = np.sort(np.concatenate([own, joined], axis=1), axis=1)
        keep = members >= 0
        keep[:, 1:] &= members[:, 1:] != members[:, :-1]
        sizes, columns = keep.sum(axis=1), members[keep]
        rows = np.repeat(np.arange(start, start + len(own)), sizes)
        # For these few pairs, subtract: the product form would suffer from cancellation.
        difference = images[rows] - images[columns]
        weights = np.exp(-np.einsum("ij,ij->i", difference, difference) / farthest[rows])
        weights /= np.repeat(np.add.reduceat(weights, np.cumsum(sizes) - sizes), sizes)
        parts.append((sizes, columns, weights.astype(np.float32)))
    return SparseRows.join(parts)


def _expand(matrix: SparseRows, nearest: NDArray[np.int32]) -> SparseRows:
    """Average the rows of each image's `nearest`, (N, k2): local query expansion (equation 11)."""
    total, k2 = nearest.shape
    parts = []
    for start in range(0, total, _IMAGES_PER_PART):
        part = nearest[start : start + _IMAGES_PER_PART]
        entries, entry_counts = matrix.entries(part.ravel())
        target = np.repeat(np.repeat(np.arange(len(part)), k2), entry_counts)
        keys, place = np.unique(target * total + matrix.columns[entries], return_inverse=True)
        weights = np.bincount(place, matrix.weights[entries]) / k2
        sizes = np.bincount(keys // total, minlength=len(part))
        parts.append((sizes, (keys % total).astype(np.int32), weights.astype(np.float32)))
    return SparseRows.join(parts)


def _blend(original: NDArray[np.float32], encoding: SparseRows) -> None:
    """Blend the original distances with the Jaccard distances of the encodings (equation 10), in place.

    Rows sum to 1: if m is the sum of the minima of two rows, that of the maxima is 2 - m, and m needs common columns.
    """
    queries, gallery = original.shape
    # The transposed rows of the gallery: row c lists the gallery images with column c.
    begin = encoding.starts[queries]
    columns = encoding.columns[begin:]
    order = np.argsort(columns, kind="stable")
    starts = np.append(0, np.cumsum(np.bincount(columns, minlength=queries + gallery)))
    images = np.repeat(np.arange(gallery, dtype=np.int32), np.diff(encoding.starts[queries:]))
    by_column = SparseRows(starts, images[order], encoding.weights[begin:][order])
    for query, distances in enumerate(original):
        own = slice(encoding.starts[query], encoding.starts[query + 1])
        entries, sizes = by_column.entries(encoding.columns[own])
        minima = np.minimum(by_column.weights[entries], np.repeat(encoding.weights[own], sizes))
        # float32 weights sum to 1 up to rounding
        shared = np.minimum(np.bincount(by_column.columns[entries], minima, minlength=gallery), 1.0)
        jaccard = 1.0 - shared / (2.0 - shared)
        distances[:] = (1.0 - LAMBDA) * jaccard + LAMBDA * distances
