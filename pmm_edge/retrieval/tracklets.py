"""Pool the embeddings of tracklets: several frames of one person in one camera become one embedding."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pmm_edge.errors import DataError
from pmm_edge.retrieval.distances import as_array, check_matrix, finite_rows


def pool(
    embeddings: ArrayLike, track_ids: ArrayLike, quality: ArrayLike | None = None
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Pool (N, D) embeddings of images to one embedding per tracklet: the (T,) sorted ids and (T, D) float32.

        ids, pooled = pmm_edge.pool(embedder.embed(crops), track_ids)

    The direction is the mean of the unit vectors of the images, so that an image with a long embedding does not count
    more than others. The length is the mean length of the embeddings: a pooled embedding lies where those of single
    images lie, so that both can be compared by either distance, and one image, or equal ones, are pooled to themselves.
    Thresholds of single images accept more false matches (docs/tracklets.md).

    Args:
        embeddings: (N, D) finite real numbers, N >= 1; arrays, or tensors on any device.
        track_ids: (N,) integers or texts; images with the same one belong to one tracklet.
        quality: (N,) weights of the images in both means, such as detection scores; None weights all equally.

    Raises DataError for wrong shapes, NaN or infinity, or if a weight is negative or all weights of a tracklet are 0.
    """
    rows, ids = check_matrix(embeddings, "embeddings"), as_array(track_ids, "track ids")
    weights = np.ones(len(rows)) if quality is None else as_array(quality, "quality")
    for name, values, kinds in (("track ids", ids, "iuSU"), ("quality", weights, "biuf")):
        if values.shape != (len(rows),) or values.dtype.kind not in kinds:
            problem = f"{name} have shape {values.shape} and dtype {values.dtype} for {len(rows):,} embeddings"
            raise DataError(problem, "Pass one for each embedding: an integer or text as track id, a number as quality")
    if not (finite := finite_rows(rows)).all():
        raise DataError(f"embedding {finite.argmin()} contains NaN or infinity", "Leave it out, or check the image")
    if not (usable := np.isfinite(weights) & (weights >= 0)).all():
        problem = f"the quality of embedding {usable.argmin()} is {weights[usable.argmin()]}"
        raise DataError(problem, "Pass finite weights of 0 or more")
    unique, numbers = np.unique(ids, return_inverse=True)
    totals = np.bincount(numbers.ravel(), weights)
    if not totals.all():
        problem = f"all images of tracklet {unique[totals.argmin()]} have quality 0"
        raise DataError(problem, "Leave the tracklet out, or pass a positive weight for one of them")
    order = np.argsort(numbers.ravel(), kind="stable")
    pooled = np.empty((len(unique), rows.shape[1]), np.float32)
    for number, members in enumerate(np.split(order, np.cumsum(np.bincount(numbers.ravel()))[:-1])):
        wide, shares = rows[members].astype(np.float64), weights[members] / totals[number]
        lengths = np.linalg.norm(wide, axis=1)
        mean = (shares / np.maximum(lengths, 1e-12)) @ wide
        pooled[number] = mean * (shares @ lengths / max(float(np.linalg.norm(mean)), 1e-12))
    return unique, pooled
