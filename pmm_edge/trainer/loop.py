"""`pmm train`: from a data set to checkpoints, and on again from where a run stopped."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import pmm_edge
from pmm_edge.data.crops import Crops
from pmm_edge.data.dataset import ReidDataset, scan
from pmm_edge.errors import CheckFailedError, DataError, ModelError
from pmm_edge.files import written_whole
from pmm_edge.model import Checkpoint, ReidNetwork, load_checkpoint, save_checkpoint
from pmm_edge.progress import Report, silent
from pmm_edge.runs import BEST, LAST, AboutRun, about_run, new_run_folder
from pmm_edge.spec import RetrievalFigures
from pmm_edge.trainer.config import TrainConfig, differences, overridden
from pmm_edge.trainer.device import compiler_errors_explained, deterministic, memory_errors_explained
from pmm_edge.trainer.distributed import World, joined
from pmm_edge.trainer.evaluation import Evaluation
from pmm_edge.trainer.feed import Feed, check_shards
from pmm_edge.trainer.interrupt import stop_requested
from pmm_edge.trainer.journal import Journal
from pmm_edge.trainer.meter import Meter
from pmm_edge.trainer.presets import read_config
from pmm_edge.trainer.schedule import learning_rate
from pmm_edge.trainer.setup import chosen_machine, fingerprint, init_from, model_spec, new_network, retrieval_figures
from pmm_edge.trainer.step import prepare, train_step

CONFIG = "config.toml"
BAD_BATCH = "bad_batch.pt"
_AGREE_STEPS = 10
"""Steps between two agreements of several processes, on a stop or a bad loss: each costs a message to all."""
_SAVE_SECONDS = 30
"""Between two saves of last.pt, which takes longer than an epoch may on a GPU."""


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
    stop_asked: bool = False
    """Ctrl-C or SIGTERM came; a run that was about to end has finished all the same."""


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
    with joined(config.device) as world:
        dataset = scan(data, layout)
        check_shards(config, dataset.train.identities, world)
        chosen_machine(config, world)  # refused before a folder is made
        network = _started(config, dataset, world, warn)
        about = AboutRun(config.preset, str(dataset.root.resolve()), pmm_edge.__version__, layout)
        folder = Path(world.share(str(new_run_folder(about, out)) if world.leads else ""))
        if world.leads:
            with written_whole(folder / CONFIG) as temporary:
                temporary.write_text(config.to_toml(), encoding="utf-8")
        return Run(config, dataset, folder, network, world, report, warn).go(Position())


def resume(folder: Path, *, report: Report = silent, warn: Callable[[str], None] = lambda text: None) -> TrainResult:
    """Go on with an interrupted run, exactly as if it had not stopped.

    Raises:
        ModelError: the folder is no run, or its settings were changed.
        DataError: the data set has changed since.
    """
    about = about_run(folder)
    if about is None or not (folder / CONFIG).exists():
        raise ModelError(f"{folder} is no run folder", "Name one that pmm train made, such as runs/<time>-quick")
    config = read_config(folder / CONFIG)
    with joined(config.device) as world:
        dataset = scan(Path(about.data), about.layout)
        if not (folder / LAST).exists():  # stopped before its first checkpoint: nothing was learned yet
            network = _started(config, dataset, world, warn)
            return Run(config, dataset, folder, network, world, report, warn).go(Position())
        checkpoint = load_checkpoint(folder / LAST)
        began_with, seen = (checkpoint.training.get(name) for name in ("config", "fingerprint"))
        if not isinstance(began_with, dict):
            raise ModelError(f"{folder / LAST} holds no training to go on with", "Put the run's own last.pt back")
        if changed := differences(config, overridden(TrainConfig(), began_with)):
            raise ModelError(
                f"{folder / CONFIG} differs from what the run began with ({'; '.join(changed)})",
                "Put it back, or start a new run with these settings",
            )
        if seen != fingerprint(dataset):
            raise DataError(
                f"{dataset.root} holds other images than when {folder} began",
                "Put the data set back as it was, or start a new run",
            )
        run = Run(config, dataset, folder, checkpoint.network(), world, report, warn)
        return run.go(run.restored(checkpoint))


def _started(config: TrainConfig, dataset: ReidDataset, world: World, warn: Callable[[str], None]) -> ReidNetwork:
    """The network before its first step, what is downloaded downloaded once."""
    if not world.leads:
        world.wait()
    network = new_network(config, dataset.train.identities)
    if world.leads:
        world.wait()
    if config.init_from:
        taken = init_from(network, Path(config.init_from))
        if world.leads:
            warn(f"{config.init_from}: {taken}")
    return network


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
        self.device, dtype = chosen_machine(config, world)
        with self._memory_explained():
            self.trainee = prepare(network, config, self.device, dtype, world)
        self.feed = Feed(dataset.train, config, world, self.device, self._warn)
        self.evaluation = Evaluation(dataset, *self._test_crops(), self.device, self.report, self._warn)
        self.journal: Journal | None = None
        self._saved = 0.0

    def _test_crops(self) -> tuple[Crops, Crops]:
        """Of query and gallery, in the memory that the training images of all processes leave of `cache_gib`."""
        config = self.config
        left = int(config.cache_gib * 2**30) - self.world.size * self.feed.crops.kept_bytes if self.world.leads else 0
        query = Crops(self.dataset.query.paths, config.height, config.width, left)
        gallery = Crops(self.dataset.gallery.paths, config.height, config.width, left - query.kept_bytes)
        return query, gallery

    def restored(self, checkpoint: Checkpoint) -> Position:
        """Put everything back to where a checkpoint left it, and say where that was."""
        state = checkpoint.training
        self.trainee.optimizer.load_state_dict(state["optimizer"])
        self.trainee.scaler.load_state_dict(state["scaler"])
        if self.trainee.average:
            self.trainee.average.load_state_dict(state["average"])
        best, before = (RetrievalFigures(**state[name]) if state[name] else None for name in ("best", "before"))
        return Position(state["epoch"], state["step"], best, before, state["judged"], state["stale"])

    def go(self, position: Position) -> TrainResult:
        """Train from `position` to the last epoch, or until a stop is asked for."""
        journal = Journal(self.folder, position.epoch, active=self.world.leads)
        exact = deterministic(self.config.deterministic)
        with (
            journal as self.journal,
            stop_requested() as stop,
            self._memory_explained(),
            self._compiler_explained(),
            exact,
        ):
            finished = self._train(position, stop)
        return TrainResult(self.folder, position.epoch, finished, position.best, position.before, stop())

    def _train(self, position: Position, stop: Callable[[], bool]) -> bool:
        """All epochs that are left; False where a stop was asked for on the way."""
        self._say(f"{self.device}, {self.trainee.dtype}, {self.dataset.root}, from epoch {position.epoch + 1}")
        if position.before is None and self.world.leads:
            position.before = self._evaluate(position, stop)
        while True:
            if self._judgement_due(position):
                self._save_last(position)  # so that a gallery that cannot be read does not cost the epoch
                if not self._judge(position, stop):
                    self._say(f"interrupted in the evaluation of epoch {position.epoch}; all before it is saved")
                    return False
                self._save_last(position)
            if position.epoch == self.config.epochs:
                return True
            if self.world.agree(0 < self.config.patience <= position.stale):
                self._say(f"stopped: no better mAP in {position.stale} evaluations")
                return True
            if self.world.agree(stop()):
                self._save_last(position)
                self._say(f"interrupted in epoch {position.epoch + 1}, step {position.step}; all is saved")
                return False
            if self._epoch(position, stop):
                position.epoch, position.step = position.epoch + 1, 0
                if self.config.keep > 1 or time.monotonic() - self._saved > _SAVE_SECONDS:
                    self._save_last(position)

    def _judgement_due(self, position: Position) -> bool:
        epoch = position.epoch
        if position.step or epoch == position.judged:
            return False
        return epoch == self.config.epochs or epoch % self.config.evaluate_every == 0

    def _epoch(self, position: Position, stop: Callable[[], bool]) -> bool:
        """Train an epoch from its step `position.step`; False where a stop was asked for on the way."""
        config, epoch = self.config, position.epoch + 1
        rate = learning_rate(epoch, config.epochs)
        for group in self.trainee.optimizer.param_groups:
            group["lr"] = rate
        batches = self.feed.batches(epoch)
        meter = Meter()
        for shards in self.feed.shards(batches, epoch, position.step, meter):
            loss, parts = train_step(self.trainee, shards, config)
            meter.add(loss, parts, position.step, len(batches[position.step]))
            position.step += 1
            last = position.step == len(batches)
            if last or self._time_to_look(meter, stop, position.step):
                stopping = self.world.agree(stop())
                self._require_finite(meter, epoch)
                done, total = (epoch - 1) * len(batches) + position.step, config.epochs * len(batches)
                self.report("train", done, total, f"epoch {epoch}/{config.epochs} · {meter.text()}")
                if stopping and not last:
                    return False
        extra = {"images_per_second": meter.images_per_second(), "data_wait": meter.data_wait(), "lr": rate}
        self._record("train", epoch, {**meter.means(), **extra})
        return True

    def _time_to_look(self, meter: Meter, stop: Callable[[], bool], step: int) -> bool:
        """Whether to read results now, which waits for the device: several processes do it at the same steps."""
        if self.world.size > 1:
            # On a CPU a message costs nothing beside a step, and torchrun kills 30 s after it asked to stop.
            return self.device.type == "cpu" or step % _AGREE_STEPS == 0
        return meter.due() or stop()

    def _require_finite(self, meter: Meter, epoch: int) -> None:
        step = self.world.first(meter.bad_step())
        if step is None:
            return
        path = self.folder / BAD_BATCH
        if self.world.leads:
            indices = self.feed.batches(epoch)[step]
            content = {
                "epoch": epoch,
                "step": step,
                "images": [str(self.feed.paths[index]) for index in indices],
                "crops": torch.from_numpy(self.feed.crops.batch(indices)),
                "seeds": self.feed.seeds(epoch, step),
            }
            with written_whole(path) as temporary:
                torch.save(content, temporary)
        raise CheckFailedError(
            f"the loss of epoch {epoch}, step {step + 1} is not finite; its batch is in {path}",
            f"{self.folder / LAST} is from before it. A new run with --precision fp32 or --clip-norm 10 may avoid it",
        )

    def _judge(self, position: Position, stop: Callable[[], bool]) -> bool:
        """Evaluate, and keep the network as best.pt where its mAP is the highest so far; False where interrupted."""
        figures = self._evaluate(position, stop) if self.world.leads else None
        if self.world.agree(self.world.leads and figures is None):
            return False
        if figures:
            position.stale += 1
            if position.best is None or figures.mAP > position.best.mAP:
                position.best, position.stale = figures, 0
                spec = model_spec(self.config, self.dataset, self.trainee.network, figures)
                save_checkpoint(self.folder / BEST, Checkpoint(spec, self.trainee.judged.state_dict()))
        position.judged = position.epoch
        return True

    def _evaluate(self, position: Position, stop: Callable[[], bool]) -> RetrievalFigures | None:
        """The figures of the network as it stands; None where interrupted: whoever goes on evaluates it again."""
        result = self.evaluation.judge(self.trainee.judged, stop)
        if result is None:
            return None
        figures = retrieval_figures(result)
        self._record("evaluate", position.epoch, {**asdict(figures), "rank5": result.rank(5)})
        return figures

    def _save_last(self, position: Position) -> None:
        """Write `last.pt` with all it takes to go on."""
        self._saved = time.monotonic()
        if not self.world.leads:
            return
        trainee = self.trainee
        training: dict[str, Any] = {
            "config": asdict(self.config),
            "fingerprint": fingerprint(self.dataset),
            "epoch": position.epoch,
            "step": position.step,
            "judged": position.judged,
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
        """Keep this epoch's checkpoint beside `last.pt`, and drop the oldest."""
        with written_whole(self.folder / f"epoch-{epoch:04d}.pt") as kept:
            try:
                kept.hardlink_to(self.folder / LAST)  # a second name for the same file
            except OSError:  # where files cannot have two
                shutil.copyfile(self.folder / LAST, kept)
        for old in sorted(self.folder.glob("epoch-*.pt"))[: -self.config.keep]:
            old.unlink()

    def _memory_explained(self) -> AbstractContextManager[None]:
        unit = self.config.images_per_identity * self.config.accumulate * self.world.size
        return memory_errors_explained(self.device, self.config.batch, unit)

    def _compiler_explained(self) -> AbstractContextManager[None]:
        return compiler_errors_explained() if self.config.compile else nullcontext()

    def _record(self, kind: str, epoch: int, values: dict[str, float]) -> None:
        if self.journal:
            self.journal.record(kind, epoch, values)

    def _say(self, text: str) -> None:
        if self.journal:
            self.journal.say(text)

    def _warn(self, text: str) -> None:
        self._say(f"warning: {text}")
        self.warn(text)
