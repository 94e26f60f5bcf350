"""What a run folder holds besides its logs: the lock, and the checkpoints from which a run resumes exactly."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import torch
from filelock import FileLock, Timeout

import pmm_edge
from pmm_edge.errors import DataError, ModelError, OutputError
from pmm_edge.model import Checkpoint, ReidNetwork, load_checkpoint, save_checkpoint
from pmm_edge.runs import CONFIG, LAST
from pmm_edge.spec import Calibration, InputSpec, ModelSpec, RetrievalFigures
from pmm_edge.trainer.config import TrainConfig
from pmm_edge.trainer.step import Trainee
from pmm_edge.trainer.teacher import PARTS


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Create a run folder if needed and lock it, so that no second process trains in it.

    A file system without locks is used without one. Raises OutputError if another process trains in the folder, or it
    cannot be written.
    """
    lock = FileLock(folder / "run.lock")
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
    """The progress of a run."""

    epoch: int = 0  # complete epochs
    step: int = 0  # steps of the next epoch that are done
    evaluated: int = 0  # the last epoch that was evaluated
    stale: int = 0  # evaluations since the best one
    best: RetrievalFigures | None = None
    before: RetrievalFigures | None = None  # figures before the first step
    calibration: Calibration | None = None  # of the best epoch


def save_state(
    folder: Path, position: Position, trainee: Trainee, config: TrainConfig, spec: ModelSpec, data: str
) -> None:
    """Write `last.pt` atomically, with everything that training changes, or raise OutputError and keep the old one.

    No random state is saved: each shard has its own seed (see `Feed`). `data` is the fingerprint of the data set.
    """
    training = {"config": asdict(config), "data": data, "position": asdict(position)}
    if spec.teacher_sha256:
        training["distillation"] = dict(PARTS)
    training |= {name: part.state_dict() for name, part in trainee.stateful.items()}
    save_checkpoint(folder / LAST, Checkpoint(spec, trainee.network.state_dict(), training))


def load_state(folder: Path, config: TrainConfig, data: str, teacher: str | None = None) -> Checkpoint | None:
    """Read `last.pt` of a run that is to be resumed; None if it was stopped before its first checkpoint.

    `data` is the fingerprint of the data set, `teacher` the SHA-256 of the teacher's checkpoint, which may have moved.
    Raises ModelError if the settings, the teacher or the weights of distillation were changed, DataError if the data
    set was.
    """
    path = folder / LAST
    if not path.exists():
        return None
    checkpoint, now = load_checkpoint(path), asdict(config)
    with _incomplete():
        # A setting that did not exist yet had the effect of today's default.
        started, of_data = asdict(TrainConfig()) | checkpoint.training["config"], checkpoint.training["data"]
        changed = [
            f"{name}: {value!r}, was {before!r}"
            for name, value in now.items()
            if value != (before := started.get(name)) and not (name == "teacher" and value and before)
        ]
        checkpoint.training["position"] = msgspec.convert(checkpoint.training["position"], Position)
    if changed:
        raise ModelError(
            f"{folder / CONFIG} was changed since the run started ({'; '.join(changed)})",
            "Restore it, or start a new run with these settings",
        )
    if teacher != checkpoint.spec.teacher_sha256:
        problem = f"the teacher {config.teacher} (SHA-256 {teacher}) is not the one from which the run {folder} learns"
        remedy = f"Name a file with SHA-256 {checkpoint.spec.teacher_sha256} as teacher in {folder / CONFIG}"
        raise ModelError(problem, f"{remedy}, or start a new run")
    if teacher and (weights := checkpoint.training.get("distillation", PARTS)) != PARTS:
        problem = f"the run {folder} began with other weights of distillation ({weights}, now {PARTS})"
        raise ModelError(problem, "Start a new run, or resume it with the version of pmm-edge that began it")
    if data != of_data:
        raise DataError(
            f"the images of the data set have changed since the run {folder} started",
            f"Restore the data set, or start a new run; --init-from {path} takes its weights",
        )
    return checkpoint


def restore_state(trainee: Trainee, checkpoint: Checkpoint) -> None:
    """Load the optimizer, gradient scaler and average of a checkpoint, whose weights the network already has."""
    groups = trainee.optimizer.param_groups
    of_device = [{name: group[name] for name in ("lr", "capturable")} for group in groups]  # the run may have moved
    with _incomplete():
        for name, part in trainee.stateful.items():
            part.load_state_dict(checkpoint.training[name])
        for group, own in zip(trainee.optimizer.param_groups, of_device, strict=True):
            group.update(own)


@contextmanager
def _incomplete() -> Iterator[None]:
    """Report anything that `save_state` would not have written as a ModelError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, msgspec.MsgspecError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).splitlines()[:2])
        raise ModelError(f"{LAST} is not a complete state of a run ({reason})", "Start a new run") from error


def model_spec(
    config: TrainConfig, network: ReidNetwork, num_classes: int, dataset: str, teacher: str | None = None
) -> ModelSpec:
    """The spec that travels with the network from here on, without retrieval figures."""
    return ModelSpec(
        architecture=config.method,
        backbone=config.backbone,
        num_classes=num_classes,
        input=InputSpec(config.height, config.width),
        embedding_size=max(stop for _, stop in network.stages.values()),
        stages=network.stages,
        mix=config.mix if config.method == "pmm" else "none",
        mix_blocks=config.mix_blocks if config.method == "pmm" else None,
        block_size=config.block_size,
        rpp=config.rpp,
        dataset=dataset,
        teacher_sha256=teacher,
        tools={"pmm-edge": pmm_edge.__version__, "torch": str(torch.__version__)},  # torch's own type has no JSON form
    )
