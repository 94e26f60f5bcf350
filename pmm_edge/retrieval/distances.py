"""Euclidean distances between embeddings, in numpy, a block of queries at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pmm_edge.errors import DataError

BLOCK_BYTES = 32 << 20
"""How large a block of the float64 distance matrix may be while it is computed."""

# A squared distance below this share of the squared norm is rounding error of the product, not a distance:
# float64's step is 2e-16, and some thousand terms add up. As a distance it is 1.4e-7 of the norm, about one
# float32 step of the embeddings themselves.
_ROUNDING = 2e-14

_REMEDY_FINITE = "Check the images and the precision of the model (FP16 overflows above 65,504)"


def checked_features(features: ArrayLike, name: str) -> NDArray[Any]:
    """Return embeddings as an (N, D) floating array.

    Raises:
        DataError: not two-dimensional, empty, no numbers, or not finite.
    """
    array = np.asarray(features)
    if array.ndim != 2 or 0 in array.shape:
        raise DataError(f"{name} have shape {array.shape}", "Pass a (number of images, embedding size) array")
    if not np.issubdtype(array.dtype, np.floating):
        if not np.issubdtype(array.dtype, np.integer):
            raise DataError(f"{name} hold {array.dtype}", "Pass real numbers, e.g. float32")
        array = array.astype(np.float64)
    if bad := describe_not_finite(array):
        raise DataError(f"{name}: {bad}", _REMEDY_FINITE)
    return array


def checked_pair(query_features: ArrayLike, gallery_features: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    """Check both sides, and that their embeddings have one size.

    Raises:
        DataError: as `checked_features`, or the embedding sizes differ.
    """
    query = checked_features(query_features, "query features")
    gallery = checked_features(gallery_features, "gallery features")
    if query.shape[1] != gallery.shape[1]:
        raise DataError(
            f"query embeddings have {query.shape[1]} values, gallery embeddings {gallery.shape[1]}",
            "Embed both with the same model",
        )
    return query, gallery


def describe_not_finite(array: NDArray[Any]) -> str:
    """Say how many rows of an (N, M) array hold NaN or infinity, and the first; empty if none does."""
    with np.errstate(over="ignore", invalid="ignore"):
        # A sum makes no mask of the array's size; only a row whose sum is not finite needs a closer look.
        suspects = np.flatnonzero(~np.isfinite(array.sum(axis=1)))
    bad = [int(row) for row in suspects if not np.isfinite(array[row]).all()]
    if not bad:
        return ""
    return f"NaN or infinity in {len(bad):,} of {len(array):,} rows, the first is row {bad[0]}"


def rows_per_block(columns: int) -> int:
    """How many rows of `columns` float64 values fit `BLOCK_BYTES`, at least one."""
    return max(1, BLOCK_BYTES // (8 * max(1, columns)))


def squared_distance_blocks(query: NDArray[Any], gallery: NDArray[Any]) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yield `(first query row, (rows, G) float64 squared Euclidean distances)`, block after block.

    ||q - g||² = ||q||² + ||g||² - 2 q·g cancels: in float32, identical embeddings of norm 5,000 come out units
    apart. In float64 the error stays below one float32 step of the embeddings, and what is smaller than that is
    set to 0. Checked features only (`checked_features`).
    """
    wide_gallery = gallery.astype(np.float64, copy=False)
    gallery_norms = np.einsum("ij,ij->i", wide_gallery, wide_gallery)
    step = rows_per_block(len(gallery))
    for start in range(0, len(query), step):
        rows = query[start : start + step].astype(np.float64)
        norms = np.einsum("ij,ij->i", rows, rows)[:, None]
        rows *= -2.0
        squared = rows @ wide_gallery.T
        squared += norms
        squared += gallery_norms
        # Where the distance is this small both norms agree, so one gives the scale. Negatives go, too.
        squared[squared < _ROUNDING * norms] = 0.0
        yield start, squared


def distance_blocks(query: NDArray[Any], gallery: NDArray[Any]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield `(first query row, (rows, G) float32 Euclidean distances)`, block after block.

    So Market-1501's 3,368 x 15,913 distances never need to be in memory at once. Checked features only.
    """
    for start, squared in squared_distance_blocks(query, gallery):
        yield start, np.sqrt(squared, out=squared).astype(np.float32)


def euclidean_distances(query_features: ArrayLike, gallery_features: ArrayLike) -> NDArray[np.float32]:
    """Euclidean distance of every query to every gallery embedding.

    Args:
        query_features: (Q, D) real numbers.
        gallery_features: (G, D) real numbers.

    Returns:
        (Q, G) float32. Identical embeddings are exactly 0 apart, whatever their norm.

    Raises:
        DataError: shapes that do not fit, NaN or infinity.
    """
    query, gallery = checked_pair(query_features, gallery_features)
    distances = np.empty((len(query), len(gallery)), np.float32)
    for start, block in distance_blocks(query, gallery):
        distances[start : start + len(block)] = block
    return distances


def unit_length(embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    """Embeddings (N, D) over their L2 norm; all zeros stay so."""
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings / np.maximum(norms, 1e-12)


def cosines(reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosine similarity of each row, (N, D), (N, D) -> (N,).

    That of a row that is not finite, or all zeros beside one that is not, is 0: nothing of the reference is left in
    it. Two rows of zeros are equal and have cosine 1.
    """
    expected, actual = reference.astype(np.float64), candidate.astype(np.float64)
    finite = finite_rows(actual)
    actual = np.where(finite[:, None], actual, 0.0)
    norms = np.linalg.norm(expected, axis=1), np.linalg.norm(actual, axis=1)
    product = norms[0] * norms[1]
    equal = ((norms[0] == 0) & (norms[1] == 0) & finite).astype(np.float64)
    return np.minimum(np.divide((expected * actual).sum(axis=1), product, out=equal, where=product > 0), 1.0)


def finite_rows(embeddings: NDArray[np.floating]) -> NDArray[np.bool_]:
    """(N, D) -> (N,)."""
    return np.asarray(np.isfinite(embeddings).all(axis=1))
