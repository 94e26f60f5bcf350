"""Batches of P identities × K images, as the triplet loss needs them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def identity_batches(
    pids: NDArray[np.int64], identities: int, images: int, generator: np.random.Generator
) -> list[NDArray[np.int64]]:
    """One epoch: every identity once, with `images` of its images, `identities` of them in a batch.

    An identity with fewer images gives some of them more than once. The last batch holds the identities that are
    left; it is dropped where that is a single one, which has no negative.

    Args:
        pids: (N,) identity of each training image.
        generator: the same state gives the same epoch.

    Returns:
        Index vectors into `pids`, an identity's images side by side.
    """
    order = np.argsort(pids, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(pids[order])) + 1)
    drawn = [
        members[identity][_draw(len(members[identity]), images, generator)]
        for identity in generator.permutation(len(members))
    ]
    batches = [np.concatenate(drawn[start : start + identities]) for start in range(0, len(drawn), identities)]
    if len(drawn) % identities == 1:
        batches.pop()
    return batches


def _draw(available: int, wanted: int, generator: np.random.Generator) -> NDArray[np.int64]:
    if available >= wanted:
        return generator.permutation(available)[:wanted]
    return np.concatenate([generator.permutation(available), generator.integers(available, size=wanted - available)])
