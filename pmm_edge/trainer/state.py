"""One process trains in a run folder: a second one would write over what the first one learned."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from pmm_edge.data.dataset import ReidDataset
from pmm_edge.errors import OutputError
from pmm_edge.files import written_whole
from pmm_edge.model import Checkpoint, save_checkpoint
from pmm_edge.runs import LAST
from pmm_edge.spec import RetrievalFigures
from pmm_edge.trainer.config import TrainConfig
from pmm_edge.trainer.setup import model_spec
from pmm_edge.trainer.step import Trainee

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = "run.lock"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a run folder, which is made where it does not exist; a process that ends, however it ends, lets go of it.

    Where the system or the file system has no locks, nothing is held.

    Raises:
        OutputError: another process trains in the folder, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a")  # never removed: who had it open already would then hold another file
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}", "Choose another folder with --out") from error
    with file:
        if not _locked(file):
            raise OutputError(
                f"another process is training in {folder}", "Wait for its end or stop it, or choose another --out"
            )
        yield


def _locked(file: IO[str]) -> bool:
    """Lock a file until it is closed; False where somebody else holds it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


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
