"""What a run folder holds besides its logs: the lock, and the checkpoints from which a run resumes exactly."""

from __future__ import annotations

import errno
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout

import pmm_edge
from pmm_edge.data.dataset import ReidDataset
from pmm_edge.errors import DataError, ModelError, OutputError
from pmm_edge.files import written_whole
from pmm_edge.model import Checkpoint, ReidNetwork, load_checkpoint, save_checkpoint
from pmm_edge.runs import CONFIG, LAST
from pmm_edge.spec import InputSpec, ModelSpec, RetrievalFigures
from pmm_edge.trainer.config import TrainConfig
from pmm_edge.trainer.step import Trainee

LOCK = "run.lock"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Create a run folder if needed and lock it, so that no second process trains in it.

    The lock ends with the process. A file system without locks is used without one. Raises OutputError if another
    process trains in the folder, or it cannot be written.
    """
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        remedy = "Wait until it ends, stop it, or choose another --out"
        raise OutputError(f"another process is training in {folder}", remedy) from error
    except OSError as error:
        if error.errno != errno.ENOLCK:
            raise OutputError(f"cannot write {folder}: {error.strerror}", "Choose another folder with --out") from error
    try:
        yield
    finally:
        lock.release()


@dataclass
class Position:
    """How far a run is: complete epochs, steps of the next one that are done, and the last epoch that was evaluated.

    `stale` counts the evaluations since the best one; `before` are the figures before the first step.
    """

    epoch: int = 0
    step: int = 0
    evaluated: int = 0
    stale: int = 0
    best: RetrievalFigures | None = None
    before: RetrievalFigures | None = None


def save_state(
    folder: Path, position: Position, trainee: Trainee, config: TrainConfig, dataset: ReidDataset, data: str
) -> None:
    """Write `last.pt` atomically, with everything that training changes; keep older epochs if configured.

    No random state is saved: each shard has its own seed (see `Feed`). `data` is the `fingerprint` of the data set.
    Raises OutputError if the file cannot be written; the previous one is kept.
    """
    training = {
        "config": asdict(config),
        "data": data,
        "position": asdict(position),
        "optimizer": trainee.optimizer.state_dict(),
        "scaler": trainee.scaler.state_dict(),
        "average": trainee.average.state_dict() if trainee.average else None,
    }
    spec = model_spec(config, dataset, trainee.network, None)
    save_checkpoint(folder / LAST, Checkpoint(spec, trainee.network.state_dict(), training))
    if config.keep > 1 and position.step == 0:
        keep_epoch(folder, position.epoch, config.keep)


def load_state(folder: Path, config: TrainConfig, dataset: ReidDataset) -> Checkpoint | None:
    """Read `last.pt` of a run that is to be resumed; None if it was stopped before its first checkpoint.

    Raises ModelError if the settings were changed, DataError if the data set was.
    """
    path = folder / LAST
    if not path.exists():
        return None
    checkpoint = load_checkpoint(path)
    started, now = checkpoint.training.get("config", {}), asdict(config)
    changed = [f"{name}: {now[name]!r}, was {started.get(name)!r}" for name in now if now[name] != started.get(name)]
    if changed:
        raise ModelError(
            f"{folder / CONFIG} was changed since the run started ({'; '.join(changed)})",
            "Restore it, or start a new run with these settings",
        )
    if fingerprint(dataset) != checkpoint.training["data"]:
        raise DataError(
            f"the images of {dataset.root} have changed since the run {folder} started",
            f"Restore the data set, or start a new run; --init-from {path} takes its weights",
        )
    return checkpoint


def restore_state(trainee: Trainee, checkpoint: Checkpoint) -> None:
    """Load the optimizer, gradient scaler and average of a checkpoint, whose weights the network already has."""
    trainee.optimizer.load_state_dict(checkpoint.training["optimizer"])
    trainee.scaler.load_state_dict(checkpoint.training["scaler"])
    if trainee.average:
        trainee.average.load_state_dict(checkpoint.training["average"])


def keep_epoch(folder: Path, epoch: int, keep: int) -> None:
    """Keep a copy of `last.pt` for this epoch and remove all but the newest `keep` copies."""
    with written_whole(folder / f"epoch-{epoch:04d}.pt") as kept:
        shutil.copyfile(folder / LAST, kept)
    by_epoch = {int(path.stem[6:]): path for path in folder.glob("epoch-*.pt") if path.stem[6:].isdecimal()}
    for old in sorted(by_epoch)[:-keep]:
        by_epoch[old].unlink()


def model_spec(
    config: TrainConfig, dataset: ReidDataset, network: ReidNetwork, figures: RetrievalFigures | None
) -> ModelSpec:
    """The spec that travels with the network from here on."""
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
        tools={"pmm-edge": pmm_edge.__version__, "torch": str(torch.__version__)},  # torch's own type has no JSON form
    )


def fingerprint(dataset: ReidDataset) -> str:
    """SHA-256 of the names and labels of all images and the file sizes of the training images.

    A query or gallery image may be replaced by a readable copy: no weight depends on it.
    """
    digest = hashlib.sha256()
    for split in (dataset.train, dataset.query, dataset.gallery):
        for path, pid, camid in zip(split.paths, split.pids, split.camids, strict=True):
            size = path.stat().st_size if split is dataset.train and path.exists() else ""
            digest.update(f"{path.name} {pid} {camid} {size}\n".encode())
    return digest.hexdigest()
