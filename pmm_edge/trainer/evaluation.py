"""Retrieval with the network as it stands in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pmm_edge.data.augment import normalize
from pmm_edge.data.crops import Crops
from pmm_edge.data.dataset import ReidDataset
from pmm_edge.errors import PmmError
from pmm_edge.progress import Report, silent
from pmm_edge.retrieval import RetrievalResult, evaluate
from pmm_edge.runtime.torch_backend import is_out_of_memory
from pmm_edge.trainer.device import owner

BATCH = 64


class Evaluation:
    """A data set's query and gallery, and the batch in which a network can embed them.

    The batch has nothing to do with that of training. It is halved where it does not fit into memory, and stays so.

    Args:
        warn: told of a smaller batch.
    """

    def __init__(
        self,
        dataset: ReidDataset,
        query: Crops,
        gallery: Crops,
        device: torch.device,
        report: Report = silent,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.query, self.gallery, self._dataset = query, gallery, dataset
        self._device, self._report, self._warn = device, report, warn
        self.batch = BATCH

    def judge(self, model: nn.Module, stop: Callable[[], bool] = lambda: False) -> RetrievalResult | None:
        """CMC, mAP and mINP of a network; None where `stop`, asked before each batch, said so.

        Raises:
            PmmError: the memory does not hold a single image's activations.
        """
        query = self._embeddings(model, self.query, "embed query", stop)
        gallery = None if query is None else self._embeddings(model, self.gallery, "embed gallery", stop)
        if query is None or gallery is None:
            return None
        who, others = self._dataset.query, self._dataset.gallery
        return evaluate(query, gallery, who.pids, others.pids, who.camids, others.camids)

    def _embeddings(
        self, model: nn.Module, crops: Crops, what: str, stop: Callable[[], bool]
    ) -> NDArray[np.float32] | None:
        """(N, D) float32 of all crops, embedded in float32."""
        embedded: list[NDArray[np.float32]] = []
        done = 0
        with _evaluating(model), torch.inference_mode():
            while done < len(crops):
                left = np.arange(done, len(crops))
                batches = np.array_split(left, -(-len(left) // self.batch))
                try:
                    with closing(crops.prefetched(batches)) as ahead:
                        for images in ahead:
                            if stop():
                                return None
                            embedded.append(model(normalize(torch.from_numpy(images).to(self._device))).cpu().numpy())
                            done += len(images)
                            self._report(what, done, len(crops))
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    self._take_less(error)
        return np.concatenate(embedded)

    def _take_less(self, error: Exception) -> None:
        if self.batch == 1:
            raise PmmError(
                f"evaluating a single image does not fit into the memory of {owner(self._device)}",
                "Free it (nvidia-smi shows who holds a GPU's), or choose a smaller --backbone or input",
            ) from error
        self.batch //= 2
        self._warn(f"evaluation does not fit into the memory of {owner(self._device)}: its batch is now {self.batch}")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; the mode is put back."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
