"""What a run is made of before it starts: network, classes, spec, and the fingerprint of its data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import pmm_edge
from pmm_edge.data.dataset import DISTRACTOR_PID, ReidDataset, Split
from pmm_edge.errors import ModelError, PmmError, did_you_mean
from pmm_edge.model import ReidNetwork, build_model
from pmm_edge.model.backbone import begin_bottlenecks_as_identities
from pmm_edge.model.checkpoint import load_pretrained
from pmm_edge.spec import InputSpec, ModelSpec, RetrievalFigures
from pmm_edge.trainer.config import TrainConfig
from pmm_edge.trainer.device import choose_device, choose_precision
from pmm_edge.trainer.distributed import World


def chosen_machine(config: TrainConfig, world: World) -> tuple[torch.device, torch.dtype]:
    """The device and the precision that this process trains with.

    Raises:
        PmmError: the device is not there, or cannot do what the configuration asks for.
    """
    device = choose_device(config.device, world.local_rank)
    if config.sync_batch_norm and world.size > 1 and device.type == "cpu":
        raise PmmError(
            "batch norm cannot be synchronised on the CPU: torch does it between GPUs only",
            "Leave --sync-batch-norm out (--no-sync-batch-norm), or train on GPUs",
        )
    return device, choose_precision(config.precision, device)


def new_network(config: TrainConfig, num_classes: int, given: Mapping[str, Tensor] | None = None) -> ReidNetwork:
    """The network of a run before its first step; what no weights are given for starts from `config.seed`.

    Args:
        given: tensors that `init_from` will take: where they fill the backbone, its own weights are not fetched.

    Raises:
        PmmError: the configuration names no network, or weights that cannot be had.
    """
    weights = config.backbone_weights
    if weights not in ("imagenet", "none") and not Path(weights).exists():
        meant = did_you_mean(weights, ("imagenet", "none"))
        remedy = f"{meant}Choose imagenet, none, or a file of torchvision's weights"
        raise ModelError(f"the backbone weights {weights} do not exist", remedy)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        network = build_model(
            config.method,
            num_classes=num_classes,
            backbone=config.backbone,
            height=config.height,
            width=config.width,
            mix=config.mix,
            mix_blocks=config.mix_blocks,
            block_size=config.block_size,
        )
    if weights == "none":
        begin_bottlenecks_as_identities(network.backbone)
    elif not _fills_backbone(given or {}, network):
        load_pretrained(network, config.backbone, weights)
    return network


def _fills_backbone(given: Mapping[str, Tensor], network: ReidNetwork) -> bool:
    own = {f"backbone.{name}": tensor for name, tensor in network.backbone.state_dict().items()}
    # Counts of batches are no weights: files of old versions of torch have none.
    return all(
        name in given and given[name].shape == tensor.shape
        for name, tensor in own.items()
        if not name.endswith("num_batches_tracked")
    )


@dataclass(frozen=True)
class Taken:
    """What `init_from` a checkpoint did."""

    taken: list[str]
    left: list[str]
    """Tensors of the network that the checkpoint lacks or has in another shape: they start afresh."""
    unused: list[str]
    """Tensors of the checkpoint that the network has no place for."""

    def __str__(self) -> str:
        text = f"{len(self.taken)} tensors taken"
        for count, what in ((self.left, "start afresh"), (self.unused, "of the checkpoint not used")):
            if count:
                text += f", {len(count)} {what} ({', '.join(count[:3])}{', ...' if len(count) > 3 else ''})"
        return text


def init_from(network: ReidNetwork, given: Mapping[str, Tensor], path: Path) -> Taken:
    """Take all tensors that fit from those of the checkpoint `path`.

    Raises:
        ModelError: nothing in it fits.
    """
    own = network.state_dict()
    fitting = {name: tensor for name, tensor in given.items() if name in own and own[name].shape == tensor.shape}
    if not fitting:
        raise ModelError(f"no tensor of {path} fits the network", "Choose the backbone and method it was trained with")
    network.load_state_dict(fitting, strict=False)
    return Taken(list(fitting), [name for name in own if name not in fitting], [n for n in given if n not in own])


def class_indices(train: Split) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the images that show somebody, and their identities numbered from 0."""
    used = np.flatnonzero(train.pids > DISTRACTOR_PID)
    return used, np.unique(train.pids[used], return_inverse=True)[1].astype(np.int64)


def model_spec(
    config: TrainConfig, dataset: ReidDataset, network: ReidNetwork, figures: RetrievalFigures | None
) -> ModelSpec:
    """What travels with the network from here on."""
    stages = network.stages
    return ModelSpec(
        architecture=config.method,
        backbone=config.backbone,
        num_classes=dataset.train.identities,
        input=InputSpec(config.height, config.width),
        embedding_size=max(stop for _, stop in stages.values()),
        stages=stages,
        mix=config.mix if config.method == "pmm" else "none",
        mix_blocks=config.mix_blocks if config.method == "pmm" else None,
        block_size=config.block_size,
        dataset=dataset.name,
        retrieval=figures,
        tools={"pmm-edge": pmm_edge.__version__, "torch": str(torch.__version__)},
    )


def fingerprint(dataset: ReidDataset) -> str:
    """Names and labels of all images, then the sizes of the training images' files; a resumed run must see the same.

    A query or gallery image may be replaced, as one that cannot be read has to be: no weight depends on it.
    """
    names, sizes = hashlib.sha256(), hashlib.sha256()
    for split in (dataset.train, dataset.query, dataset.gallery):
        for path, pid, camid in zip(split.paths, split.pids, split.camids, strict=True):
            names.update(f"{path.name} {pid} {camid}\n".encode())
    for path in dataset.train.paths:
        sizes.update(f"{_size(path)}\n".encode())
    return f"{names.hexdigest()} {sizes.hexdigest()}"


def _size(path: Path) -> int:
    """In bytes; -1 of a file that is not there, which training passes over as it does any that cannot be read."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
