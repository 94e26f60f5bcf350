"""What a run is made of before it starts: network, classes, spec, and the fingerprint of its data."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import pmm_edge
from pmm_edge.data.dataset import DISTRACTOR_PID, ReidDataset, Split
from pmm_edge.model import PMM, build_model
from pmm_edge.model.backbone import imagenet_weights, load_backbone_weights
from pmm_edge.model.checkpoint import read_torch_file
from pmm_edge.retrieval import RetrievalResult
from pmm_edge.spec import InputSpec, ModelSpec, RetrievalFigures
from pmm_edge.trainer.config import TrainConfig


def new_network(config: TrainConfig, dataset: ReidDataset) -> PMM:
    """The network of a run before its first step; the heads start from torch's global generator."""
    model = build_model(
        "pmm",
        num_classes=dataset.train.identities,
        backbone=config.backbone,
        height=config.height,
        width=config.width,
        mix_blocks=config.mix_blocks,
        block_size=(config.block_height, config.block_width),
    )
    if config.backbone_weights == "imagenet":
        load_backbone_weights(model.backbone, imagenet_weights(config.backbone))
    elif config.backbone_weights != "none":
        load_backbone_weights(model.backbone, read_torch_file(Path(config.backbone_weights)))
    return model


def class_indices(train: Split) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the images that show somebody, and their identities numbered from 0."""
    used = np.flatnonzero(train.pids > DISTRACTOR_PID)
    return used, np.unique(train.pids[used], return_inverse=True)[1].astype(np.int64)


def model_spec(config: TrainConfig, dataset: ReidDataset, num_classes: int) -> ModelSpec:
    """What travels with the network from here on."""
    return ModelSpec(
        architecture="pmm",
        backbone=config.backbone,
        num_classes=num_classes,
        input=InputSpec(config.height, config.width),
        embedding_size=max(stop for _, stop in PMM.stages.values()),
        stages=PMM.stages,
        mix_blocks=config.mix_blocks,
        block_size=(config.block_height, config.block_width),
        dataset=dataset.name,
        tools={"pmm-edge": pmm_edge.__version__, "torch": torch.__version__},
    )


def retrieval_figures(result: RetrievalResult) -> RetrievalFigures:
    """The figures that a spec carries."""
    return RetrievalFigures(result.rank(1), result.mAP, result.mINP, result.mAP_at_50)


def fingerprint(split: Split) -> str:
    """Names and labels of the training images; a resumed run must see the same."""
    names = "\n".join(path.name for path in split.paths)
    digest = hashlib.sha256(names.encode()).hexdigest()
    return f"{len(split)} images, {digest[:16]}"
