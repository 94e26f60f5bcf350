"""Euclidean and cosine distances between embeddings, in numpy."""

from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pmm_edge.errors import DataError
from pmm_edge.spec import Distance

BLOCK_BYTES = 32 << 20
"""Maximum size of a block of the float64 distance matrix."""
_CACHED = 1 << 18  # distances that are processed at once and stay in the cache of a core

# Squared distances below this fraction of the squared norm are rounding errors of the matrix product: float64
# has a step of 2e-16, and thousands of terms add up. As a distance it is 1.4e-7 of the norm, about one float32 step.
ROUNDING = 2e-14


def pairwise_distances(
    query_features: ArrayLike, gallery_features: ArrayLike, distance: Distance = "euclidean"
) -> NDArray[np.float32]:
    """Compute the distances between (Q, D) and (G, D) embeddings: (Q, G) float32.

    The cosine distance is 1 - cosine, in 0..2. The distance of identical embeddings is exactly 0, whatever their norm.
    Raises DataError for wrong shapes, NaN or infinity and, by cosine, for embeddings of length 0.
    """
    query, gallery = check_pair(query_features, gallery_features, distance)
    distances = np.empty((len(query), len(gallery)), np.float32)
    for start, block in distance_blocks(query, gallery, distance):
        distances[start : start + len(block)] = block
    return distances


def distance_blocks(
    query: NDArray[Any], gallery: NDArray[Any], distance: Distance | Literal["squared"] = "euclidean"
) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield `(first query, (rows, G) distances)` of the pair that `check_pair` returned for the same distance.

    They are float32, and float64 for `squared` Euclidean distances. Block after block: the 3,368 x 15,913 distances of
    Market-1501 are never in memory at once.

    ||q - g||² = ||q||² + ||g||² - 2 q·g suffers from cancellation: in float32, the distance of identical embeddings
    of norm 5,000 would be several units. In float64 the error stays below one float32 step of the embeddings, and
    smaller values are set to 0. The cosine distance is ||q - g||² / 2 for unit vectors, with the same precision.
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
        # At such a small distance both norms are nearly equal. This also removes negative values.
        squared[squared < ROUNDING * norms] = 0.0
        if distance == "cosine":
            squared *= 0.5
        elif distance == "euclidean":
            np.sqrt(squared, out=squared)
        yield start, squared if distance == "squared" else squared.astype(np.float32)


def positive_lengths(features: NDArray[Any]) -> NDArray[np.float64]:
    """Compute the L2 norms of checked features: (N, D) -> (N,). Raises DataError for embeddings of length 0."""
    lengths = np.sqrt(np.einsum("ij,ij->i", features, features, dtype=np.float64))
    if not lengths.all():
        problem = "some embeddings have length 0 and therefore no cosine"
        raise DataError(problem, "Check the model: it has no output for these images")
    return lengths


def both_distances(
    query: NDArray[Any], gallery: NDArray[Any], row_lengths: NDArray[np.float64], column_lengths: NDArray[np.float64]
) -> Iterator[tuple[int, NDArray[np.float32], NDArray[np.float32]]]:
    """Yield `(first query, Euclidean distances, cosine distances)` of checked features, both (rows, G) float32.

    One matrix product serves both. The lengths are those of `positive_lengths`.
    """
    wide, squares = gallery.astype(np.float64), column_lengths**2
    step, part = rows_per_block(len(gallery)), max(1, _CACHED // len(gallery))
    for block in range(0, len(query), step):
        products = (-2.0 * query[block : block + step].astype(np.float64)) @ wide.T
        for start in range(0, len(products), part):
            product = products[start : start + part]
            norms = row_lengths[block + start : block + start + len(product), None]
            squared = product + norms**2
            squared += squares
            squared[squared < ROUNDING * norms**2] = 0.0
            euclidean = np.sqrt(squared, out=squared).astype(np.float32)
            product /= 2 * norms
            product /= column_lengths
            product += 1.0
            product[product < ROUNDING / 2] = 0.0
            yield block + start, euclidean, product.astype(np.float32)


def rows_per_block(columns: int) -> int:
    """Number of rows of `columns` float64 values that fit into `BLOCK_BYTES`, at least one."""
    return max(1, BLOCK_BYTES // (8 * columns))


def check_pair(
    query_features: ArrayLike, gallery_features: ArrayLike, distance: Distance = "euclidean"
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return finite embeddings as (Q, D) and (G, D) floating arrays, for cosine distances as float64 unit vectors.

    Raises DataError for anything else, and for unit vectors of embeddings that are all zeros.
    """
    if distance not in get_args(Distance):
        raise DataError(f"the distance is '{distance}'", f"Choose {' or '.join(get_args(Distance))}")
    pair = []
    for features, name in ((query_features, "query features"), (gallery_features, "gallery features")):
        array = check_matrix(features, name)
        if not (finite := finite_rows(array)).all():
            remedy = "Check the images and the model's precision (FP16 overflows above 65,504)"
            raise DataError(f"{name} contain NaN or infinity, first in row {finite.argmin()}", remedy)
        pair.append(_unit_vectors(array, name) if distance == "cosine" else array)
    query, gallery = pair
    if query.shape[1] != gallery.shape[1]:
        problem = f"query embeddings have {query.shape[1]} values, gallery embeddings {gallery.shape[1]}"
        raise DataError(problem, "Compute both with the same model")
    return query, gallery


def _unit_vectors(array: NDArray[Any], name: str) -> NDArray[np.float64]:
    wide = array.astype(np.float64)
    largest = np.maximum(wide.max(axis=1), -wide.min(axis=1))
    if not largest.all():
        problem = f"{name} contain embeddings of length 0, which have no cosine, first in row {largest.argmin()}"
        raise DataError(problem, "Use Euclidean distance, or check the model: it has no output for these images")
    wide /= largest[:, None]  # their squares neither overflow nor underflow
    wide /= np.sqrt(np.einsum("ij,ij->i", wide, wide))[:, None]
    return wide


def check_matrix(values: ArrayLike, name: str) -> NDArray[Any]:
    """Return real numbers as a floating array with two dimensions; raise DataError for anything else."""
    array = as_array(values, name)
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "iuf":
        problem = f"{name} have shape {array.shape} and dtype {array.dtype}"
        raise DataError(problem, "Pass a two-dimensional array of real numbers")
    return array if array.dtype.kind == "f" else array.astype(np.float64)


def as_array(values: Any, name: str) -> NDArray[Any]:
    """Return an array of numbers, sequences or a torch tensor, whatever its device; raise DataError for others."""
    try:
        if hasattr(values, "detach"):  # a tensor, which may need gradients; numpy has no bfloat16
            values = values.detach().cpu()
            values = values.float() if values.is_floating_point() and values.element_size() < 4 else values
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise DataError(f"{name} cannot be converted to an array ({error})", "Pass a numpy array") from error


def finite_rows(embeddings: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Which rows have only finite values: (N, D) -> (N,)."""
    return np.asarray(np.isfinite(embeddings).all(axis=1))


def unit_length(embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    """Divide (N, D) embeddings by their L2 norm; zeros stay zeros."""
    return embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)


def cosines(reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> NDArray[np.float64]:
    """Compute the cosine similarity of each pair of rows: (N, D), (N, D) -> (N,).

    It is 0 if the candidate is not finite or only one of the rows is all zeros, and 1 if both are.
    """
    finite = finite_rows(candidate)
    expected = reference.astype(np.float64)
    actual = np.where(finite[:, None], candidate, 0.0).astype(np.float64)
    norms = np.linalg.norm(expected, axis=1), np.linalg.norm(actual, axis=1)
    product = norms[0] * norms[1]
    equal = ((norms[0] == 0) & (norms[1] == 0) & finite).astype(np.float64)
    return np.minimum(np.divide((expected * actual).sum(axis=1), product, out=equal, where=product > 0), 1.0)
