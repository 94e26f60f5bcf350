"""Ctrl-C and SIGTERM as a request to save and stop, not as an accident."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import pmm_edge
from pmm_edge.console import Report, silent
from pmm_edge.data.augment import normalize
from pmm_edge.data.checks import untrained_images
from pmm_edge.data.dataset import ReidDataset, scan
from pmm_edge.data.loader import Crops
from pmm_edge.errors import CheckFailedError, DataError, ModelError, PmmError
from pmm_edge.files import remove_unfinished, written_whole
from pmm_edge.model import Checkpoint, ReidNetwork, load_checkpoint, save_checkpoint
from pmm_edge.model.checkpoint import any_weights
from pmm_edge.retrieval import RetrievalResult, evaluate
from pmm_edge.runs import (
    ABOUT,
    BEST,
    CONFIG,
    LAST,
    AboutRun,
    about_run,
    never_began,
    new_run_folder,
    new_run_path,
    write_about_run,
)
from pmm_edge.runtime.torch_backend import is_out_of_memory
from pmm_edge.spec import RetrievalFigures
from pmm_edge.trainer.config import TrainConfig, differences, overridden, read_run_config
from pmm_edge.trainer.device import compiler_errors_explained, deterministic, memory_errors_explained, owner
from pmm_edge.trainer.distributed import World, joined
from pmm_edge.trainer.feed import Feed, check_shards
from pmm_edge.trainer.logging import METRICS, Journal, Meter
from pmm_edge.trainer.setup import chosen_machine, fingerprint, init_from, model_spec, new_network
from pmm_edge.trainer.state import Position, alone_in, restore_position, save_position
from pmm_edge.trainer.step import learning_rate, prepare, train_step


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether a stop was asked for; a second Ctrl-C stops at once."""
    asked = threading.Event()

    def ask(signum: int, frame: FrameType | None) -> None:
        # Schedulers and torchrun each send a SIGTERM: the second must not undo the first one's saving.
        if asked.is_set() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


BATCH = 64


class Evaluation:
    """A data set's query and gallery, and the batch in which a network can embed them.

    The batch has nothing to do with that of training. It is halved where it does not fit into memory, and stays so.

    Args:
        warn: told of a smaller batch.
    """

    def __init__(
        self,
        dataset: ReidDataset,
        query: Crops,
        gallery: Crops,
        device: torch.device,
        report: Report = silent,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.query, self.gallery, self._dataset = query, gallery, dataset
        self._device, self._report, self._warn = device, report, warn
        self.batch = BATCH

    def judge(self, model: nn.Module, stop: Callable[[], bool] = lambda: False) -> RetrievalResult | None:
        """CMC, mAP and mINP of a network; None where `stop`, asked before each batch, said so.

        Raises:
            PmmError: the memory does not hold a single image's activations.
        """
        query = self._embeddings(model, self.query, "embed query", stop)
        gallery = None if query is None else self._embeddings(model, self.gallery, "embed gallery", stop)
        if query is None or gallery is None:
            return None
        who, others = self._dataset.query, self._dataset.gallery
        return evaluate(query, gallery, who.pids, others.pids, who.camids, others.camids)

    def _embeddings(
        self, model: nn.Module, crops: Crops, what: str, stop: Callable[[], bool]
    ) -> NDArray[np.float32] | None:
        """(N, D) float32 of all crops, embedded in float32."""
        embedded: list[NDArray[np.float32]] = []
        done = 0
        with _evaluating(model), torch.inference_mode():
            while done < len(crops):
                left = np.arange(done, len(crops))
                batches = np.array_split(left, -(-len(left) // self.batch))
                try:
                    with closing(crops.prefetched(batches)) as ahead:
                        for images in ahead:
                            if stop():
                                return None
                            embedded.append(model(normalize(torch.from_numpy(images).to(self._device))).cpu().numpy())
                            done += len(images)
                            self._report(what, done, len(crops))
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    self._take_less(error)
        return np.concatenate(embedded)

    def _take_less(self, error: Exception) -> None:
        if self.batch == 1:
            raise PmmError(
                f"evaluating a single image does not fit into the memory of {owner(self._device)}",
                "Free it (nvidia-smi shows who holds a GPU's), or choose a smaller --backbone or input",
            ) from error
        self.batch //= 2
        self._warn(f"evaluation does not fit into the memory of {owner(self._device)}: its batch is now {self.batch}")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; the mode is put back."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


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
        self.feed = Feed(dataset.train, config, world, self.device)
        self.evaluation = Evaluation(dataset, *self._test_crops(), self.device, self.report, self._warn)
        self.journal: Journal | None = None
        self._seen = fingerprint(dataset) if world.leads else ""
        self._saved = 0.0

    def _test_crops(self) -> tuple[Crops, Crops]:
        """Of query and gallery, in the memory that this machine's training images leave of `cache_gib`."""
        config, training = self.config, self.feed.crops
        left = int(config.cache_gib * 2**30) - self.world.local_size * training.cached_bytes
        if not self.world.leads:
            left = 0
        query = Crops(self.dataset.query.paths, config.height, config.width, left)
        gallery = Crops(self.dataset.gallery.paths, config.height, config.width, left - query.cached_bytes)
        return query, gallery

    def _say_what_is_not_kept(self) -> None:
        """Name the cache that would do where images are decoded again and again."""
        crops = [*[self.feed.crops] * self.world.local_size, self.evaluation.query, self.evaluation.gallery]
        kept, needed = (
            sum(sizes) / 2**30 for sizes in zip(*((c.cached_bytes, c.all_bytes) for c in crops), strict=True)
        )
        if kept == needed or not self.world.leads:
            return
        held = f"{kept:.2g} of {needed:.2g} GiB of decoded images are kept in memory, the others decoded each time"
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
        batches = self.feed.batches(epoch)
        meter = Meter()
        for shards in self.feed.shards(batches, epoch, position.step, meter):
            rate = learning_rate(config, epoch, (position.step + 0.5) / len(batches))
            for group in self.trainee.optimizer.param_groups:
                group["lr"] = rate
            loss, parts = train_step(self.trainee, shards, config)
            meter.add(loss, parts, position.step, len(batches[position.step]))
            position.step += 1
            last = position.step == len(batches)
            if last or self._time_to_look(meter, stop, position.step):
                unreadable = self.feed.replacements.take_new()
                stopping, any_unreadable = self.world.any_of(stop(), bool(unreadable))
                if any_unreadable:
                    for message in self.feed.replacements.register(self.world.gathered(unreadable)):
                        if self.world.leads:
                            self._warn(message)
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


_WRITTEN = (ABOUT, CONFIG, METRICS, LAST, BEST, BAD_BATCH, "epoch-*.pt")
"""What training alone writes in its folder, each file whole."""


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
        OutputError: the run folder cannot be made or written, or is another run's.
        CheckFailedError: the loss is not finite.
    """
    with joined(config.device) as world, ExitStack() as held:
        dataset = scan(data, layout)
        if world.leads:
            for finding in untrained_images(dataset.train):
                warn(finding.text)
        check_shards(config, dataset.train.identities, world)
        chosen_machine(config, world)  # refused before a folder is made
        network = _started(config, dataset, world, warn)
        about = AboutRun(config.preset, str(dataset.root.resolve()), pmm_edge.__version__, layout)
        folder = out or new_run_path(config.preset)
        if world.leads:
            held.enter_context(alone_in(folder))
            new_run_folder(about, folder)
            remove_unfinished(folder, _WRITTEN)
            with written_whole(folder / CONFIG) as temporary:
                temporary.write_text(config.to_toml(), encoding="utf-8")
        folder = Path(world.share(str(folder)))
        return Run(config, dataset, folder, network, world, report, warn).go(Position())


def resume(
    folder: Path,
    data: Path | None = None,
    *,
    report: Report = silent,
    warn: Callable[[str], None] = lambda text: None,
) -> TrainResult:
    """Go on with an interrupted run; on a CPU its weights become, bit for bit, those of a run that did not stop.

    In `metrics.jsonl` the line of the epoch that it stopped in averages the steps after the stop alone.

    Args:
        folder: the run's.
        data: where its data set is now; where it was by default.

    Raises:
        ModelError: the folder is no run, or its settings were changed.
        DataError: the data set is not there, or has changed since.
        OutputError: another process trains in the folder, or it cannot be written.
    """
    if never_began(folder):
        raise ModelError(f"the run of {folder} never began", f"Train into it: pmm train --out {folder}")
    config, about = read_run_config(folder), about_run(folder)
    assert about is not None  # read_run_config has seen to it
    with joined(config.device) as world, ExitStack() as held:
        if world.leads:
            held.enter_context(alone_in(folder))
            remove_unfinished(folder, _WRITTEN)
        world.wait()  # not to begin where the first process is refused
        dataset = _dataset_of(about, data, folder)
        if not (folder / LAST).exists():  # stopped before its first checkpoint: nothing was learned yet
            network = _started(config, dataset, world, warn)
            _remember(dataset, about, folder, world)
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
        if not fingerprint(dataset).startswith(str(seen)):  # an older one has names and labels alone
            raise DataError(
                f"{dataset.root} holds other images than when {folder} began",
                f"Put the data set back as it was, or start a new run (--init-from {folder / LAST} takes its weights)",
            )
        _remember(dataset, about, folder, world)
        dataset = replace(dataset, name=str(checkpoint.spec.dataset))  # which may be that of a folder it has left
        return _gone_on(Run(config, dataset, folder, checkpoint.network(), world, report, warn), checkpoint)


def _gone_on(run: Run, checkpoint: Checkpoint) -> TrainResult:
    return run.go(restore_position(run.trainee, checkpoint))


def _dataset_of(about: AboutRun, data: Path | None, folder: Path) -> ReidDataset:
    try:
        return scan(data or Path(about.data), about.layout)
    except DataError as error:
        if data is not None:
            raise
        remedy = f"Put it back, or give the data set's new place: pmm train NEWPLACE --resume {folder}"
        raise DataError(error.problem, remedy) from error


def _remember(dataset: ReidDataset, about: AboutRun, folder: Path, world: World) -> None:
    """Let later commands find a data set that was moved."""
    place = str(dataset.root.resolve())
    if world.leads and place != about.data:
        write_about_run(folder, replace(about, data=place))


def _started(config: TrainConfig, dataset: ReidDataset, world: World, warn: Callable[[str], None]) -> ReidNetwork:
    """The network before its first step, what is downloaded downloaded once."""
    given = any_weights(Path(config.init_from)) if config.init_from else {}
    if not world.leads:
        world.wait()
    network = new_network(config, dataset.train.identities, given)
    if world.leads:
        world.wait()
    if config.init_from:
        taken = init_from(network, given, Path(config.init_from))
        if world.leads:
            warn(f"{config.init_from}: {taken}")
    return network
