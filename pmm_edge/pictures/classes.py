"""Which class of a network each training image of a data set is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pmm_edge.data.dataset import DISTRACTOR_PID
from pmm_edge.pictures.unsuitable import UnsuitableError
from pmm_edge.spec import ModelSpec


def training_classes(pids: NDArray[np.int64], spec: ModelSpec, data: str) -> NDArray[np.int64]:
    """The class of each training image: identities numbered from 0 in their order, as training numbers them.

    Args:
        pids: (N,) of the whole training set.
        data: the data set, for messages.

    Returns:
        (N,) int64; -1 for junk and distractors, which no training uses.

    Raises:
        UnsuitableError: the network was not trained on as many people.
    """
    people = np.unique(pids[pids > DISTRACTOR_PID])
    if len(people) != spec.num_classes:
        raise UnsuitableError(
            f"the network knows {spec.num_classes:,} people, the training set of {data} shows {len(people):,}",
            "The classes of images are known for the data set that it was trained on: name that one with --data",
        )
    return np.where(pids > DISTRACTOR_PID, np.searchsorted(people, pids), -1)
