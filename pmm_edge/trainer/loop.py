"""`pmm train`: from a data set to checkpoints, and on again from where a run stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import pmm_edge
from pmm_edge.data.crops import Crops
from pmm_edge.data.dataset import ReidDataset, scan
from pmm_edge.data.replacements import Replacements
from pmm_edge.data.sampler import identity_batches
from pmm_edge.errors import CheckFailedError, DataError, ModelError, PmmError
from pmm_edge.model import Checkpoint, ReidNetwork, load_checkpoint, save_checkpoint
from pmm_edge.progress import Report, silent
from pmm_edge.runs import BEST, LAST, AboutRun, about_run, new_run_folder
from pmm_edge.spec import RetrievalFigures
from pmm_edge.trainer.config import TrainConfig, differences
from pmm_edge.trainer.device import choose_device, choose_precision, deterministic, memory_errors_explained
from pmm_edge.trainer.distributed import World, joined
from pmm_edge.trainer.evaluation import evaluate_network
from pmm_edge.trainer.interrupt import stop_requested
from pmm_edge.trainer.journal import Journal
from pmm_edge.trainer.meter import Meter
from pmm_edge.trainer.presets import read_config
from pmm_edge.trainer.schedule import learning_rate
from pmm_edge.trainer.setup import class_indices, fingerprint, init_from, model_spec, new_network, retrieval_figures
from pmm_edge.trainer.step import Shard, prepare, shard_seed, train_step

CONFIG = "config.toml"
BAD_BATCH = "bad_batch.pt"
_AGREE_STEPS = 10
"""Steps between two questions whether any process was asked to stop: each costs a message to all."""


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
class Position:
    """How far a run is: whole epochs, steps into the next one, and what was measured on the way."""

    epoch: int = 0
    step: int = 0
    best: RetrievalFigures | None = None
    before: RetrievalFigures | None = None
    stale: int = 0
    """Evaluations since the best one."""


def train(
    config: TrainConfig,
    data: Path,
    *,
    layout: str | None = None,
    out: Path | None = None,
    report: Report = silent,
    warn: Callable[[str], None] = lambda text: None,
) -> TrainResult:
    """Train from the start; under `torchrun`, together with the other processes.

    Args:
        config: the run, see `presets`.
        data: a data set's folder.
        layout: its layout's name; recognised by itself where None.
        out: the run folder to make; `runs/<time>-<preset>` by default.
        warn: told what a user should know although the run goes on.

    Raises:
        DataError: the data set cannot be used.
        OutputError: the run folder cannot be made or written.
        CheckFailedError: the loss is not finite.
    """
    with joined() as world:
        dataset = scan(data, layout)
        network = new_network(config, dataset.train.identities)
        if config.init_from:
            warn(f"{config.init_from}: {init_from(network, Path(config.init_from))}")
        choose_device(config.device, world.local_rank)  # refused before a folder is made
        about = AboutRun(config.preset, str(dataset.root.resolve()), pmm_edge.__version__)
        folder = Path(world.share(str(new_run_folder(about, out)) if world.leads else ""))
        if world.leads:
            (folder / CONFIG).write_text(config.to_toml(), encoding="utf-8")
        run = Run(config, dataset, folder, network, world, report, warn)
        return run.go(Position())


def resume(folder: Path, *, report: Report = silent, warn: Callable[[str], None] = lambda text: None) -> TrainResult:
    """Go on with an interrupted run, exactly as if it had not stopped.

    Raises:
        ModelError: the folder is no run, holds no checkpoint, or its settings were changed.
        DataError: the data set has changed since.
    """
    about = about_run(folder)
    if about is None:
        raise ModelError(f"{folder} is no run folder", "Name one that pmm train made, such as runs/<time>-quick")
    if not (folder / LAST).exists():
        raise ModelError(f"{folder} was stopped before its first checkpoint", "Start it again with pmm train")
    with joined() as world:
        checkpoint = load_checkpoint(folder / LAST)
        config = TrainConfig(**checkpoint.training["config"])
        if changed := differences(read_config(folder / CONFIG), config):
            raise ModelError(
                f"{folder / CONFIG} differs from what the run began with ({'; '.join(changed)})",
                "Put it back, or start a new run with these settings",
            )
        dataset = scan(Path(about.data))
        if checkpoint.training["fingerprint"] != fingerprint(dataset.train):
            raise DataError(
                f"{dataset.root} has other training images than when {folder} began",
                "Put the data set back as it was, or start a new run",
            )
        run = Run(config, dataset, folder, checkpoint.network(), world, report, warn)
        return run.go(run.restored(checkpoint))


class Run:
    """A run in progress: the parts that every epoch needs."""

    def __init__(
        self,
        config: TrainConfig,
        dataset: ReidDataset,
        folder: Path,
        network: ReidNetwork,
        world: World,
        report: Report,
        warn: Callable[[str], None],
    ) -> None:
        self.config, self.dataset, self.folder, self.world = config, dataset, folder, world
        self.report: Report = report if world.leads else silent
        self.warn = warn
        self.device = choose_device(config.device, world.local_rank)
        dtype = choose_precision(config.precision, self.device)
        self.trainee = prepare(network, config, self.device, dtype, world)
        self.used, self.classes = class_indices(dataset.train)
        paths = [dataset.train.paths[index] for index in self.used]
        replacements = Replacements(paths, self.classes, config.max_bad_images, self._warn)
        cache = int(config.cache_gib * 2**30)
        self.train_crops = Crops(paths, config.height, config.width, cache, replacements)
        self.query_crops, self.gallery_crops = (
            Crops(split.paths, config.height, config.width, cache) for split in (dataset.query, dataset.gallery)
        )
        self.shards = world.size * config.accumulate
        self.journal: Journal | None = None

    def restored(self, checkpoint: Checkpoint) -> Position:
        """Put everything back to where a checkpoint left it, and say where that was."""
        state = checkpoint.training
        self.trainee.optimizer.load_state_dict(state["optimizer"])
        self.trainee.scaler.load_state_dict(state["scaler"])
        if self.trainee.average:
            self.trainee.average.load_state_dict(state["average"])
        best, before = (RetrievalFigures(**state[name]) if state[name] else None for name in ("best", "before"))
        return Position(state["epoch"], state["step"], best, before, state["stale"])

    def go(self, position: Position) -> TrainResult:
        """Train from `position` to the last epoch, or until a stop is asked for."""
        with (
            Journal(self.folder, active=self.world.leads) as self.journal,
            stop_requested() as stop,
            deterministic(self.config.deterministic),
            memory_errors_explained(self.device, self.config.batch, self.config.images_per_identity * self.shards),
        ):
            trainee = self.trainee
            self.journal.say(f"{self.device}, {trainee.dtype}, {self.dataset.root}, from epoch {position.epoch + 1}")
            if position.before is None and self.world.leads:
                position.before = self._evaluate(position)
            while position.epoch < self.config.epochs:
                if self._epoch(position, stop):
                    position.epoch, position.step = position.epoch + 1, 0
                    if position.epoch % self.config.evaluate_every == 0 or position.epoch == self.config.epochs:
                        self._judge(position)
                self._save_last(position)
                if self.world.agree(stop()) and position.epoch < self.config.epochs:
                    self.journal.say(f"interrupted in epoch {position.epoch + 1}, step {position.step}; all is saved")
                    return self._result(position, finished=False)
                if self.world.agree(0 < self.config.patience <= position.stale):
                    self.journal.say(f"stopped: no better mAP in {position.stale} evaluations")
                    break
        return self._result(position, finished=True)

    def _epoch(self, position: Position, stop: Callable[[], bool]) -> bool:
        """Train an epoch from its step `position.step`; False where a stop was asked for on the way."""
        config, epoch = self.config, position.epoch + 1
        rate = learning_rate(epoch, config.epochs)
        for group in self.trainee.optimizer.param_groups:
            group["lr"] = rate
        batches = self._batches(epoch)
        meter = Meter()
        for shards in self._shards(batches, epoch, position.step, meter):
            loss, parts = train_step(self.trainee, shards, config)
            meter.add(loss, parts, position.step, len(batches[position.step]))
            position.step += 1
            if meter.due() or position.step == len(batches):
                self._require_finite(meter, epoch)
                done, total = (epoch - 1) * len(batches) + position.step, config.epochs * len(batches)
                self.report("train", done, total, f"epoch {epoch}/{config.epochs} · {meter.text()}")
            if position.step < len(batches) and self._asked_to_stop(stop, position.step):
                return False
        extra = {"images_per_second": meter.images_per_second(), "data_wait": meter.data_wait(), "lr": rate}
        self._journal.record("train", epoch, {**meter.means(), **extra})
        return True

    def _asked_to_stop(self, stop: Callable[[], bool], step: int) -> bool:
        if self.world.size == 1:
            return stop()
        return step % _AGREE_STEPS == 0 and self.world.agree(stop())

    def _batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """The epoch's batches over all processes, the same in each of them."""
        config = self.config
        batches = identity_batches(
            self.classes,
            config.batch // config.images_per_identity,
            config.images_per_identity,
            np.random.default_rng([config.seed, epoch]),
        )
        # Each shard needs two identities of its own; what is left at the end of an epoch may be too few.
        least = 2 * self.shards * config.images_per_identity
        whole = [batch for batch in batches if len(batch) >= least]
        if not whole:
            raise PmmError(
                f"{self.dataset.train.identities} identities are too few for {self.shards} parts of a batch",
                f"Each part needs two: train with fewer processes or less accumulation, at most"
                f" {self.dataset.train.identities // 2} parts",
            )
        return whole

    def _shards(
        self, batches: list[NDArray[np.int64]], epoch: int, first_step: int, meter: Meter
    ) -> Iterator[list[Shard]]:
        """For each step from `first_step` on this process's shards, decoded ahead and on the device."""
        accumulate, config = self.config.accumulate, self.config
        own = range(self.world.rank * accumulate, (self.world.rank + 1) * accumulate)
        parts = [self._split(batch)[number] for batch in batches[first_step:] for number in own]
        ahead = self.train_crops.prefetched(parts, ahead=2 * accumulate)
        try:
            for step in range(first_step, len(batches)):
                asked = time.perf_counter()
                crops = [next(ahead) for _ in own]
                meter.waited(time.perf_counter() - asked)
                indices = parts[(step - first_step) * accumulate :][:accumulate]
                yield [
                    self._on_device(images, self.classes[chosen], shard_seed(config.seed, epoch, step, number))
                    for images, chosen, number in zip(crops, indices, own, strict=True)
                ]
        finally:
            ahead.close()

    def _split(self, batch: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """A batch in shards of whole identities."""
        identities = batch.reshape(-1, self.config.images_per_identity)
        return [part.ravel() for part in np.array_split(identities, self.shards)]

    def _on_device(self, crops: NDArray[np.uint8], classes: NDArray[np.int64], seed: int) -> Shard:
        return Shard(self._copied(torch.from_numpy(crops)), self._copied(torch.from_numpy(classes)), seed)

    def _copied(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()  # so that the copy goes on while the GPU works
        return tensor.to(self.device, non_blocking=True)

    def _require_finite(self, meter: Meter, epoch: int) -> None:
        step = meter.bad_step()
        if step is None:
            return
        indices = self._batches(epoch)[step]
        path = self.folder / BAD_BATCH
        images = [str(self.train_crops.paths[index]) for index in indices]
        seeds = [shard_seed(self.config.seed, epoch, step, number) for number in range(self.shards)]
        if self.world.leads:
            crops = torch.from_numpy(self.train_crops.batch(indices))
            torch.save({"epoch": epoch, "step": step, "images": images, "crops": crops, "seeds": seeds}, path)
        raise CheckFailedError(
            f"the loss of epoch {epoch}, step {step + 1} is not finite; its batch is in {path}",
            f"{self.folder / LAST} is from before it. A new run with --precision fp32 or --clip-norm 10 may avoid it",
        )

    def _judge(self, position: Position) -> None:
        """Evaluate, and keep the network as best.pt where its mAP is the highest so far."""
        if self.world.leads:
            figures = self._evaluate(position)
            position.stale += 1
            if position.best is None or figures.mAP > position.best.mAP:
                position.best, position.stale = figures, 0
                spec = model_spec(self.config, self.dataset, self.trainee.network, figures)
                save_checkpoint(self.folder / BEST, Checkpoint(spec, self.trainee.judged.state_dict()))
        self.world.wait()

    def _evaluate(self, position: Position) -> RetrievalFigures:
        result = evaluate_network(
            self.trainee.judged, self.dataset, self.query_crops, self.gallery_crops, self.device, self.report
        )
        figures = retrieval_figures(result)
        self._journal.record("evaluate", position.epoch, {**asdict(figures), "rank5": result.rank(5)})
        return figures

    def _save_last(self, position: Position) -> None:
        """Write `last.pt` with all it takes to go on."""
        if not self.world.leads:
            return
        trainee = self.trainee
        training: dict[str, Any] = {
            "config": asdict(self.config),
            "fingerprint": fingerprint(self.dataset.train),
            "epoch": position.epoch,
            "step": position.step,
            "stale": position.stale,
            "best": asdict(position.best) if position.best else None,
            "before": asdict(position.before) if position.before else None,
            "optimizer": trainee.optimizer.state_dict(),
            "scaler": trainee.scaler.state_dict(),
            "average": trainee.average.state_dict() if trainee.average else None,
        }
        spec = model_spec(self.config, self.dataset, trainee.network, None)
        save_checkpoint(self.folder / LAST, Checkpoint(spec, trainee.network.state_dict(), training))
        if self.config.keep > 1 and position.step == 0:
            self._keep_epoch(position.epoch)

    def _keep_epoch(self, epoch: int) -> None:
        """Keep this epoch's checkpoint beside `last.pt`, as a second name for the same file, and drop the oldest."""
        kept = self.folder / f"epoch-{epoch:04d}.pt"
        kept.unlink(missing_ok=True)
        kept.hardlink_to(self.folder / LAST)
        for old in sorted(self.folder.glob("epoch-*.pt"))[: -self.config.keep]:
            old.unlink()

    def _result(self, position: Position, finished: bool) -> TrainResult:
        return TrainResult(self.folder, position.epoch, finished, position.best, position.before)

    @property
    def _journal(self) -> Journal:
        assert self.journal is not None  # `go` opens it before anything is written
        return self.journal

    def _warn(self, text: str) -> None:
        self._journal.say(f"warning: {text}")
        self.warn(text)
