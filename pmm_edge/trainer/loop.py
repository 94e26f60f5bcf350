"""A run in progress: epochs, evaluations and checkpoints, until it ends or is asked to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pmm_edge.data.crops import Crops
from pmm_edge.data.dataset import ReidDataset
from pmm_edge.errors import CheckFailedError
from pmm_edge.files import written_whole
from pmm_edge.model import Checkpoint, ReidNetwork, save_checkpoint
from pmm_edge.progress import Report, silent
from pmm_edge.runs import BEST, LAST
from pmm_edge.spec import RetrievalFigures
from pmm_edge.trainer.config import TrainConfig
from pmm_edge.trainer.device import compiler_errors_explained, deterministic, memory_errors_explained
from pmm_edge.trainer.distributed import World
from pmm_edge.trainer.evaluation import Evaluation
from pmm_edge.trainer.feed import Feed
from pmm_edge.trainer.interrupt import stop_requested
from pmm_edge.trainer.journal import Journal
from pmm_edge.trainer.meter import Meter
from pmm_edge.trainer.position import Position, save_position
from pmm_edge.trainer.schedule import learning_rate
from pmm_edge.trainer.setup import chosen_machine, fingerprint, model_spec
from pmm_edge.trainer.step import prepare, train_step

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
        self._seen = fingerprint(dataset) if world.leads else ""
        self._saved = 0.0

    def _test_crops(self) -> tuple[Crops, Crops]:
        """Of query and gallery, in the memory that this machine's training images leave of `cache_gib`."""
        config, training = self.config, self.feed.crops
        left = int(config.cache_gib * 2**30) - self.world.local_size * training.kept_bytes
        if training.short_of_memory or not self.world.leads:
            left = 0
        query = Crops(self.dataset.query.paths, config.height, config.width, left)
        gallery = Crops(self.dataset.gallery.paths, config.height, config.width, left - query.kept_bytes)
        return query, gallery

    def _say_what_is_not_kept(self) -> None:
        """Name the cache that would do where images are decoded again and again."""
        crops = [*[self.feed.crops] * self.world.local_size, self.evaluation.query, self.evaluation.gallery]
        kept, needed = (sum(sizes) / 2**30 for sizes in zip(*((c.kept_bytes, c.all_bytes) for c in crops), strict=True))
        if kept == needed or not self.world.leads:
            return
        held = f"{kept:.2g} of {needed:.2g} GiB of decoded images are kept in memory, the others decoded each time"
        if any(part.short_of_memory for part in crops):
            self._warn(f"{held}: the system gives no more, and training needs some; --cache-gib bounds what is taken")
        else:
            enough = math.ceil(needed * 10) / 10
            self._warn(f"{held}: --cache-gib is {self.config.cache_gib:.2g}, and {enough:g} would hold all")

    def go(self, position: Position) -> TrainResult:
        """Train from `position` to the last epoch, or until a stop is asked for."""
        judged = None if position.before is None else position.judged
        journal = Journal(self.folder, position.epoch, judged, active=self.world.leads)
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
        self._say_what_is_not_kept()
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
                unreadable = self.feed.replacements.found()
                stopping, any_unreadable = self.world.any_of(stop(), bool(unreadable))
                if any_unreadable:
                    self.feed.replacements.tell(self.world.gathered(unreadable))
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
        last = self.folder / LAST
        before = f"{last} is from before it. " if last.exists() else ""
        raise CheckFailedError(
            f"the loss of epoch {epoch}, step {step + 1} is not finite; its batch is in {path}",
            f"{before}A new run with --precision fp32 or --clip-norm 10 may avoid it",
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
        figures = result.figures()
        self._record("evaluate", position.epoch, {**asdict(figures), "rank5": result.rank(5)})
        return figures

    def _save_last(self, position: Position) -> None:
        self._saved = time.monotonic()
        if self.world.leads:
            save_position(position, self.trainee, self.config, self.dataset, self._seen, self.folder)

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
