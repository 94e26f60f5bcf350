"""Retrieval with the network as it stands in training."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pmm_edge.data.augment import normalize
from pmm_edge.data.crops import Crops
from pmm_edge.data.dataset import ReidDataset
from pmm_edge.progress import Report, silent
from pmm_edge.retrieval import RetrievalResult, evaluate

BATCH = 64


def embed_split(
    model: nn.Module, crops: Crops, device: torch.device, *, what: str = "evaluate", report: Report = silent
) -> NDArray[np.float32]:
    """Embeddings (N, D) float32 of all crops, in evaluation mode and float32; the mode is put back."""
    was_training = model.training
    model.eval()
    batches = np.array_split(np.arange(len(crops)), -(-len(crops) // BATCH))
    embeddings = []
    with torch.inference_mode():
        for done, images in enumerate(crops.prefetched(batches)):
            embeddings.append(model(normalize(torch.from_numpy(images).to(device))).cpu().numpy())
            report(what, done + 1, len(batches))
    model.train(was_training)
    return np.concatenate(embeddings)


def evaluate_network(
    model: nn.Module, dataset: ReidDataset, query: Crops, gallery: Crops, device: torch.device, report: Report = silent
) -> RetrievalResult:
    """CMC, mAP and mINP of a network on a data set's query and gallery."""
    return evaluate(
        embed_split(model, query, device, what="embed query", report=report),
        embed_split(model, gallery, device, what="embed gallery", report=report),
        dataset.query.pids,
        dataset.gallery.pids,
        dataset.query.camids,
        dataset.gallery.camids,
    )
