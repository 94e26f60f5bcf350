"""`pmm train`: from a data set to checkpoints, and on again from where a run stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import pmm_edge
from pmm_edge.data.crops import Crops
from pmm_edge.data.dataset import ReidDataset, scan
from pmm_edge.data.sampler import identity_batches
from pmm_edge.errors import CheckFailedError, DataError, ModelError
from pmm_edge.model import PMM, Checkpoint, load_checkpoint, save_checkpoint
from pmm_edge.progress import Report, silent
from pmm_edge.runs import BEST, LAST, AboutRun, about_run, new_run_folder
from pmm_edge.spec import RetrievalFigures
from pmm_edge.trainer.config import TrainConfig, read_config
from pmm_edge.trainer.device import choose_device, choose_precision
from pmm_edge.trainer.evaluation import evaluate_network
from pmm_edge.trainer.interrupt import stop_requested
from pmm_edge.trainer.journal import Journal
from pmm_edge.trainer.meter import Meter
from pmm_edge.trainer.schedule import learning_rate
from pmm_edge.trainer.setup import class_indices, fingerprint, model_spec, new_network, retrieval_figures
from pmm_edge.trainer.step import Trainee, prepare, train_step

CONFIG = "config.toml"


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    folder: Path
    epochs_done: int
    finished: bool
    """False where it was interrupted; `last.pt` holds all it takes to go on."""
    best: RetrievalFigures | None
    """Of `best.pt`."""
    before: RetrievalFigures | None
    """Of the network as it was before its first step: what training has to beat."""


@dataclass
class _Position:
    """How far a run is: whole epochs, steps into the next one, and the best figures so far."""

    epoch: int = 0
    step: int = 0
    best: RetrievalFigures | None = None
    before: RetrievalFigures | None = None


def train(config: TrainConfig, data: Path, *, out: Path | None = None, report: Report = silent) -> TrainResult:
    """Train from the start.

    Args:
        config: the run, see `presets`.
        data: a data set's folder.
        out: the run folder to make; `runs/<time>-<preset>` by default.

    Raises:
        DataError: the data set cannot be used.
        OutputError: the run folder cannot be made or written.
        CheckFailedError: the loss is not finite.
    """
    dataset = scan(data)
    device = choose_device(config.device)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = new_network(config, dataset)
    about = AboutRun(config.preset, str(data.resolve()), pmm_edge.__version__)
    folder = new_run_folder(about, out=out)
    (folder / CONFIG).write_text(config.to_toml(), encoding="utf-8")
    return _Run(config, dataset, folder, model, device, report).go(_Position())


def resume(folder: Path, *, report: Report = silent) -> TrainResult:
    """Go on with an interrupted run, exactly as if it had not stopped.

    Raises:
        ModelError: the folder is no run, or holds no checkpoint.
        DataError: the data set has changed since.
    """
    about = about_run(folder)
    if about is None:
        raise ModelError(f"{folder} is no run folder", "Name one that pmm train made, such as runs/<time>-quick")
    if not (folder / LAST).exists():
        raise ModelError(f"{folder} was stopped before its first checkpoint", "Start it again with pmm train")
    config = read_config(folder / CONFIG)
    dataset = scan(Path(about.data))
    checkpoint = load_checkpoint(folder / LAST)
    if checkpoint.training["fingerprint"] != fingerprint(dataset.train):
        raise DataError(
            f"{dataset.root} has other training images than when {folder} began",
            "Put the data set back as it was, or start a new run",
        )
    run = _Run(config, dataset, folder, checkpoint.network(), choose_device(config.device), report)
    return run.go(run.restored(checkpoint))


class _Run:
    """A run in progress: the parts that every epoch needs."""

    def __init__(
        self,
        config: TrainConfig,
        dataset: ReidDataset,
        folder: Path,
        model: PMM,
        device: torch.device,
        report: Report,
    ) -> None:
        self.config, self.dataset, self.folder, self.report = config, dataset, folder, report
        self.trainee: Trainee = prepare(model, config, device, choose_precision(config.precision, device))
        self.train_crops, self.query_crops, self.gallery_crops = (
            Crops(split.paths, config.height, config.width) for split in (dataset.train, dataset.query, dataset.gallery)
        )
        self.used, self.classes = class_indices(dataset.train)

    def restored(self, checkpoint: Checkpoint) -> _Position:
        """Put the optimiser back to where a checkpoint left it, and say where that was."""
        state = checkpoint.training
        self.trainee.optimizer.load_state_dict(state["optimizer"])
        self.trainee.scaler.load_state_dict(state["scaler"])
        best, before = (RetrievalFigures(**state[name]) if state[name] else None for name in ("best", "before"))
        return _Position(state["epoch"], state["step"], best, before)

    def go(self, position: _Position) -> TrainResult:
        """Train from `position` to the last epoch, or until a stop is asked for."""
        with Journal(self.folder) as journal, stop_requested() as stop:
            trainee = self.trainee
            journal.say(f"{trainee.device}, {trainee.dtype}, data {self.dataset.root}, from epoch {position.epoch + 1}")
            if position.before is None:
                position.before = self._evaluate(position, journal)
            while position.epoch < self.config.epochs:
                if self._epoch(position, journal, stop):
                    position.epoch, position.step = position.epoch + 1, 0
                    if position.epoch % self.config.evaluate_every == 0 or position.epoch == self.config.epochs:
                        self._keep_best(position, self._evaluate(position, journal))
                self._save(LAST, position)
                if stop() and position.epoch < self.config.epochs:
                    journal.say(f"interrupted at step {position.step} of epoch {position.epoch + 1}; all is saved")
                    return TrainResult(self.folder, position.epoch, False, position.best, position.before)
        return TrainResult(self.folder, position.epoch, True, position.best, position.before)

    def _epoch(self, position: _Position, journal: Journal, stop: Callable[[], bool]) -> bool:
        """Train an epoch from its step `position.step`; False where a stop was asked for on the way."""
        config, epoch = self.config, position.epoch + 1
        rate = learning_rate(epoch, config.epochs)
        for group in self.trainee.optimizer.param_groups:
            group["lr"] = rate
        order = np.random.default_rng([config.seed, epoch])
        batches = identity_batches(self.classes, config.identities_per_batch, config.images_per_identity, order)
        left = batches[position.step :]
        meter = Meter()
        crops_ahead = self.train_crops.prefetched([self.used[indices] for indices in left])
        for indices, crops in zip(left, crops_ahead, strict=True):
            meter.add(*self._step(epoch, position.step, crops, self.classes[indices]), count=len(indices))
            position.step += 1
            if meter.due() or position.step == len(batches):
                detail = f"epoch {epoch}/{config.epochs} · {meter.text()}"
                done, total = (epoch - 1) * len(batches) + position.step, config.epochs * len(batches)
                self._require_finite(meter, epoch)
                self.report("train", done, total, detail)
            if stop() and position.step < len(batches):
                crops_ahead.close()
                return False
        journal.record("train", epoch, {**meter.means(), "images_per_second": meter.images_per_second(), "lr": rate})
        return True

    def _step(
        self, epoch: int, step: int, crops: NDArray[np.uint8], classes: NDArray[np.int64]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        device = self.trainee.device
        # Each step has its own seed, so a resumed run draws what the uninterrupted one would have drawn.
        seed = int(np.random.SeedSequence([self.config.seed, epoch, step]).generate_state(1, np.uint64)[0] >> 1)
        return train_step(
            self.trainee,
            torch.from_numpy(crops).to(device, non_blocking=True),
            torch.from_numpy(classes).to(device, non_blocking=True),
            self.config.erase_size,
            torch.Generator(device).manual_seed(seed),
        )

    def _require_finite(self, meter: Meter, epoch: int) -> None:
        bad = [name for name, value in meter.means().items() if not np.isfinite(value)]
        if bad:
            raise CheckFailedError(
                f"epoch {epoch}: {', '.join(bad)} is not finite",
                f"Go on from {self.folder / LAST} with --precision fp32, or train with a lower rate",
            )

    def _evaluate(self, position: _Position, journal: Journal) -> RetrievalFigures:
        result = evaluate_network(
            self.trainee.model, self.dataset, self.query_crops, self.gallery_crops, self.trainee.device, self.report
        )
        figures = retrieval_figures(result)
        journal.record("evaluate", position.epoch, {**asdict(figures), "rank5": result.rank(5)})
        return figures

    def _keep_best(self, position: _Position, figures: RetrievalFigures) -> None:
        if position.best is None or figures.mAP > position.best.mAP:
            position.best = figures
            self._save(BEST, position, figures)

    def _save(self, name: str, position: _Position, figures: RetrievalFigures | None = None) -> None:
        """Write `last.pt` with all it takes to go on, or `best.pt` with its figures in the spec."""
        spec = replace(model_spec(self.config, self.dataset, len(np.unique(self.classes))), retrieval=figures)
        training: dict[str, Any] = {}
        if name == LAST:
            training = {
                "epoch": position.epoch,
                "step": position.step,
                "best": asdict(position.best) if position.best else None,
                "before": asdict(position.before) if position.before else None,
                "optimizer": self.trainee.optimizer.state_dict(),
                "scaler": self.trainee.scaler.state_dict(),
                "fingerprint": fingerprint(self.dataset.train),
            }
        save_checkpoint(self.folder / name, Checkpoint(spec, self.trainee.model.state_dict(), training))
