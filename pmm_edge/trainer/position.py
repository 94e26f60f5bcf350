"""Where a run is, and `last.pt`: all it takes to go on from there."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from pmm_edge.data.dataset import ReidDataset
from pmm_edge.files import written_whole
from pmm_edge.model import Checkpoint, save_checkpoint
from pmm_edge.runs import LAST
from pmm_edge.spec import RetrievalFigures
from pmm_edge.trainer.config import TrainConfig
from pmm_edge.trainer.setup import model_spec
from pmm_edge.trainer.step import Trainee


@dataclass
class Position:
    """How far a run is: whole epochs, steps into the next one, and what was measured on the way."""

    epoch: int = 0
    step: int = 0
    best: RetrievalFigures | None = None
    before: RetrievalFigures | None = None
    judged: int = 0
    """The last epoch that was evaluated."""
    stale: int = 0
    """Evaluations since the best one."""


def save_position(
    position: Position, trainee: Trainee, config: TrainConfig, dataset: ReidDataset, seen: str, folder: Path
) -> None:
    """Write `last.pt`: the network, its optimiser, and where the run is.

    Args:
        seen: the `fingerprint` of the data set as the run began or went on.

    Raises:
        OutputError: the file cannot be written; the one before it is still there.
    """
    training = {
        "config": asdict(config),
        "fingerprint": seen,
        **asdict(position),
        "optimizer": trainee.optimizer.state_dict(),
        "scaler": trainee.scaler.state_dict(),
        "average": trainee.average.state_dict() if trainee.average else None,
    }
    spec = model_spec(config, dataset, trainee.network, None)
    save_checkpoint(folder / LAST, Checkpoint(spec, trainee.network.state_dict(), training))
    if config.keep > 1 and position.step == 0:
        keep_epoch(folder, position.epoch, config.keep)


def restore_position(trainee: Trainee, checkpoint: Checkpoint) -> Position:
    """Put everything that training changes back to where a checkpoint left it, and say where that was."""
    state = checkpoint.training
    trainee.optimizer.load_state_dict(state["optimizer"])
    trainee.scaler.load_state_dict(state["scaler"])
    if trainee.average:
        trainee.average.load_state_dict(state["average"])
    best, before = (RetrievalFigures(**state[name]) if state[name] else None for name in ("best", "before"))
    return Position(state["epoch"], state["step"], best, before, state["judged"], state["stale"])


def keep_epoch(folder: Path, epoch: int, keep: int) -> None:
    """Keep this epoch's checkpoint beside `last.pt`, and drop the oldest."""
    with written_whole(folder / f"epoch-{epoch:04d}.pt") as kept:
        try:
            kept.hardlink_to(folder / LAST)  # a second name for the same file
        except OSError:  # where files cannot have two
            shutil.copyfile(folder / LAST, kept)
    by_epoch = {int(path.stem[6:]): path for path in folder.glob("epoch-*.pt") if path.stem[6:].isdecimal()}
    for old in sorted(by_epoch)[:-keep]:  # by number: as text epoch-10000 stands before epoch-9999
        by_epoch[old].unlink()
