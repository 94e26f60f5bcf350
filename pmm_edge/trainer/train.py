"""Train a network: the whole workflow, from top to bottom.

`train` chooses the settings, reads the data set, builds or restores the network and opens the run folder. `fit` is the
loop over epochs, evaluations and checkpoints; the functions after it are its parts.
"""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

import pmm_edge
from pmm_edge.console import Report, silent
from pmm_edge.data.augment import normalize
from pmm_edge.data.checks import untrained_images
from pmm_edge.data.dataset import ReidDataset, scan
from pmm_edge.data.loader import Crops
from pmm_edge.data.synthetic import cached_synthetic
from pmm_edge.errors import CheckFailedError, DataError, ModelError, PmmError, PmmWarning, did_you_mean
from pmm_edge.files import remove_unfinished, written_whole
from pmm_edge.model import Checkpoint, ReidNetwork, build_model, save_checkpoint
from pmm_edge.model.backbone import zero_init_residuals
from pmm_edge.model.checkpoint import load_any_weights, load_pretrained
from pmm_edge.retrieval import evaluate
from pmm_edge.runs import ABOUT, BEST, CONFIG, LAST, AboutRun, about_run, new_run_folder, new_run_path, write_about_run
from pmm_edge.spec import RetrievalFigures
from pmm_edge.trainer.config import TrainConfig, choose_config, read_run_config
from pmm_edge.trainer.device import choose_machine, deterministic, torch_errors_explained
from pmm_edge.trainer.distributed import World, joined
from pmm_edge.trainer.logging import METRICS, Journal, Meter
from pmm_edge.trainer.state import Position, fingerprint, load_state, model_spec, restore_state, run_lock, save_state
from pmm_edge.trainer.step import Feed, Trainee, learning_rate, prepare, train_step

BAD_BATCH = "bad_batch.pt"
EVALUATION_BATCH = 64
SAVE_SECONDS = 30
"""Between two saves of last.pt without an evaluation: on a GPU, saving may take longer than an epoch."""
SYNC_STEPS = 10
"""Steps between two exchanges of stop requests and bad losses among GPU processes."""
_WRITTEN = (ABOUT, CONFIG, METRICS, LAST, BEST, BAD_BATCH, "epoch-*.pt")
"""Files of a run folder that only training writes."""


@dataclass(frozen=True)
class TrainResult:
    """How a training ended."""

    folder: Path
    epochs_done: int
    finished: bool
    """False if it was interrupted and can be resumed."""
    best: RetrievalFigures | None
    before: RetrievalFigures | None
    """Figures before the first step."""
    stop_requested: bool = False
    """Whether Ctrl-C or SIGTERM came; a run that was about to end has finished nevertheless."""


@dataclass
class Run:
    """A training in progress. `data` is the fingerprint of the data set; `stop()` whether Ctrl-C or SIGTERM came."""

    config: TrainConfig
    dataset: ReidDataset
    folder: Path
    world: World
    trainee: Trainee
    feed: Feed
    query: Crops
    gallery: Crops
    journal: Journal
    position: Position
    data: str
    stop: Callable[[], bool]
    report: Report
    saved: float = 0.0
    """When last.pt was written."""

    def warn(self, text: str) -> None:
        if self.world.leads:
            self.journal.write(f"warning: {text}")
            warnings.warn(text, PmmWarning, stacklevel=2)


def train(
    data: str | Path | None = None,
    *,
    preset: str | None = None,
    config: TrainConfig | Path | None = None,
    layout: str | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    report: Report = silent,
    **settings: Any,
) -> TrainResult:
    """Train a network, or resume an interrupted training.

    On a CPU, a resumed run ends with exactly the weights of an uninterrupted one. Started by `torchrun`, the processes
    train together.

    Example:
        >>> pmm.train("/data/Market-1501", preset="market1501", device=0)
        >>> pmm.train(epochs=30, lr=5e-4)                              # the synthetic data set, preset "quick"
        >>> pmm.train(resume=Path("runs/20261122-174200-quick"))

    Args:
        data: folder of the data set; the synthetic data set by default. With `resume`, its new place if it was moved.
        preset: name of a preset, `quick` by default.
        config: settings instead of a preset, or a TOML file of them.
        layout: layout of the data set if it is not detected.
        out: run folder to create, `runs/<time>-<preset>` by default.
        resume: run folder of an interrupted run, which continues with its own settings.
        report: receives the progress.
        **settings: fields of `TrainConfig` that replace those of the preset or configuration.

    Raises PmmError for a wrong setting and its subclasses DataError, ModelError (weights, or a folder that cannot be
    resumed), OutputError (a folder that cannot be written or is in use) and CheckFailedError (the loss is not finite).
    """
    if resume is None:
        chosen = choose_config(preset, config, settings)
        data = Path(data) if data else cached_synthetic(report=report)
    else:
        if settings or any(given is not None for given in (preset, config, layout, out)):
            raise PmmError(
                "a run is resumed with its own settings",
                "Leave out the other settings; only the new place of a moved data set may be given",
            )
        chosen = read_run_config(resume)
    with joined(chosen.device) as world, ExitStack() as lock:
        # Everything that can be refused is checked before a folder is created.
        dataset = _open_dataset(data, layout, resume)
        device, dtype = choose_machine(chosen, world)
        feed = Feed(dataset.train, chosen, world, device)
        if resume is None:
            folder, checkpoint = out or new_run_path(chosen.preset), None
            network = new_network(chosen, dataset.train.identities, world)
            if world.leads:
                lock.enter_context(run_lock(folder))
                about = AboutRun(chosen.preset, str(dataset.root.resolve()), pmm_edge.__version__, layout)
                new_run_folder(about, folder)
                with written_whole(folder / CONFIG) as temporary:
                    temporary.write_text(chosen.to_toml(), encoding="utf-8")
                for finding in untrained_images(dataset.train):
                    warnings.warn(finding.text, PmmWarning, stacklevel=2)
            folder = world.gather([folder])[0]
        else:
            folder = resume
            if world.leads:
                lock.enter_context(run_lock(folder))
            world.barrier()  # the other processes stop here if the first one is refused
            checkpoint = load_state(folder, chosen, dataset)
            network = checkpoint.network() if checkpoint else new_network(chosen, dataset.train.identities, world)
            if checkpoint:  # a moved data set keeps the name that the run knows it by
                dataset = replace(dataset, name=str(checkpoint.spec.dataset))
            known, place = about_run(folder), str(dataset.root.resolve())
            if world.leads and known and place != known.data:
                write_about_run(folder, replace(known, data=place))  # for later commands
        if world.leads:
            remove_unfinished(folder, _WRITTEN)

        position = msgspec.convert(checkpoint.training["position"], Position) if checkpoint else Position()
        evaluated = None if position.before is None else position.evaluated
        with (
            Journal(folder, position.epoch, evaluated, active=world.leads) as journal,
            stop_on_signal() as stop,
            torch_errors_explained(device, chosen, world),
            deterministic(chosen.deterministic),
        ):
            trainee = prepare(network, chosen, device, dtype, world)
            if checkpoint:
                restore_state(trainee, checkpoint)
            crops = _evaluation_crops(chosen, dataset, feed, world)
            seen, report = (fingerprint(dataset), report) if world.leads else ("", silent)
            run = Run(chosen, dataset, folder, world, trainee, feed, *crops, journal, position, seen, stop, report)
            finished = fit(run)
        return TrainResult(folder, position.epoch, finished, position.best, position.before, stop())


# Before the first step


def _open_dataset(data: str | Path | None, layout: str | None, resume: Path | None) -> ReidDataset:
    about = about_run(resume) if resume else None
    if about is None:
        assert data is not None  # `train` sets a default
        return scan(Path(data), layout)
    try:
        return scan(Path(data or about.data), about.layout)
    except DataError as error:
        if data is not None:
            raise
        remedy = f"Put it back, or name its new place: pmm train NEWPLACE --resume {resume}"
        raise DataError(error.problem, remedy) from error


def new_network(config: TrainConfig, num_classes: int, world: World | None = None) -> ReidNetwork:
    """Build the network of a run; weights that are not loaded are drawn from the seed of the run.

    Raises PmmError if the configuration does not describe a network, ModelError if weights are missing or do not fit.
    """
    world, weights = world or World(), config.backbone_weights
    if weights not in ("imagenet", "none") and not Path(weights).exists():
        remedy = f"{did_you_mean(weights, ('imagenet', 'none'))}Choose imagenet, none, or a file of torchvision weights"
        raise ModelError(f"the backbone weights {weights} do not exist", remedy)
    given = load_any_weights(Path(config.init_from)) if config.init_from else {}
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        settings = ("method", "backbone", "height", "width", "mix", "mix_blocks", "block_size")
        network = build_model(num_classes=num_classes, **{name: getattr(config, name) for name in settings})
    own = network.state_dict()
    fitting = {name: tensor for name, tensor in given.items() if name in own and own[name].shape == tensor.shape}
    # Old versions of torch did not save num_batches_tracked.
    needed = {name for name in own if name.startswith("backbone.") and not name.endswith("num_batches_tracked")}
    if weights == "none":
        zero_init_residuals(network.backbone)
    elif not needed <= fitting.keys():
        if not world.leads:
            world.barrier()
        load_pretrained(network, config.backbone, weights)  # the first process downloads, the others read its cache
        if world.leads:
            world.barrier()
    if config.init_from:
        if not fitting:
            remedy = "Choose the backbone and the method that it was trained with"
            raise ModelError(f"no tensor of {config.init_from} fits the network", remedy)
        network.load_state_dict(fitting, strict=False)
        if world.leads:
            counts = f"{len(fitting)} tensors loaded, {len(own) - len(fitting)} of the network's not found"
            unused = f"{len(given.keys() - fitting)} of the file's not used"
            warnings.warn(f"{config.init_from}: {counts}, {unused}", PmmWarning, stacklevel=2)
    return network


def _evaluation_crops(config: TrainConfig, dataset: ReidDataset, feed: Feed, world: World) -> tuple[Crops, Crops]:
    """Query and gallery, cached in the memory that the training images leave of `cache_gib`."""
    left = int(config.cache_gib * 2**30) - world.local_size * feed.crops.cached_bytes if world.leads else 0
    query = Crops(dataset.query.paths, config.height, config.width, left)
    return query, Crops(dataset.gallery.paths, config.height, config.width, left - query.cached_bytes)


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Treat Ctrl-C and SIGTERM as a request to save and stop; yield a function that tells whether one came.

    A second Ctrl-C raises KeyboardInterrupt.
    """
    requested = threading.Event()

    def handle(signum: int, frame: FrameType | None) -> None:
        # Schedulers and torchrun each send a SIGTERM: the second must not stop the saving.
        if requested.is_set() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        requested.set()

    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# The loop


def fit(run: Run) -> bool:
    """Train all epochs that are left; False if interrupted."""
    config, position, world = run.config, run.position, run.world
    run.journal.write(
        f"{run.trainee.device}, {run.trainee.dtype}, {run.dataset.root}, starting with epoch {position.epoch + 1}"
    )
    crops = [*[run.feed.crops] * world.local_size, run.query, run.gallery]
    cached, needed = (sum(sizes) / 2**30 for sizes in zip(*((c.cached_bytes, c.all_bytes) for c in crops), strict=True))
    if cached < needed:
        run.warn(
            f"{cached:.2g} of {needed:.2g} GiB of decoded images fit into the cache, the others are decoded each time;"
            f" --cache-gib {math.ceil(needed * 10) / 10:g} holds all"
        )
    if position.before is None and world.leads:
        position.before = evaluate_network(run)
    while True:
        due = position.epoch == config.epochs or position.epoch % config.evaluate_every == 0
        if due and position.step == 0 and position.epoch != position.evaluated:
            save_last(run)  # so that an unreadable gallery image does not cost the epoch
            if not evaluate_epoch(run):
                run.journal.write(f"interrupted in the evaluation of epoch {position.epoch}; the epoch is saved")
                return False
            save_last(run)
        if position.epoch == config.epochs:
            return True
        out_of_patience, stop = world.any(0 < config.patience <= position.stale, run.stop())
        if out_of_patience:
            run.journal.write(f"stopped: no better mAP in {position.stale} evaluations")
            return True
        if stop:
            save_last(run)
            run.journal.write(f"interrupted in epoch {position.epoch + 1}, step {position.step}; it is saved")
            return False
        if train_epoch(run):
            position.epoch, position.step = position.epoch + 1, 0
            if config.keep > 1 or time.monotonic() - run.saved > SAVE_SECONDS:
                save_last(run)


def train_epoch(run: Run) -> bool:
    """Train an epoch from its step `position.step`; False if interrupted."""
    config, position, feed, world = run.config, run.position, run.feed, run.world
    epoch = position.epoch + 1
    batches = feed.batches(epoch)
    meter, rate = Meter(), 0.0
    for shards in feed.shards(batches, epoch, position.step, meter):
        rate = learning_rate(config, epoch, (position.step + 0.5) / len(batches))
        for group in run.trainee.optimizer.param_groups:
            group["lr"] = rate
        loss, parts = train_step(run.trainee, shards, config)
        meter.add(loss, parts, position.step, len(batches[position.step]))
        position.step += 1
        last = position.step == len(batches)
        # Reading results waits for the device, and several processes do it in the same steps. On a CPU the exchange is
        # cheap, and torchrun kills a process 30 s after SIGTERM.
        alone, cheap = world.size == 1, run.trainee.device.type == "cpu"
        if last or (meter.due() or run.stop() if alone else cheap or position.step % SYNC_STEPS == 0):
            unreadable, bad = feed.replacements.take_new(), meter.bad_step()
            stop, any_unreadable, any_bad = world.any(run.stop(), bool(unreadable), bad is not None)
            if any_unreadable:
                for text in feed.replacements.register(world.gather(unreadable)):
                    run.warn(text)
            if any_bad:
                raise _not_finite(run, epoch, min(world.gather([] if bad is None else [bad])))
            done, total = (epoch - 1) * len(batches) + position.step, config.epochs * len(batches)
            run.report("train", done, total, f"epoch {epoch}/{config.epochs} · {meter.text()}")
            if stop and not last:
                return False
    extra = {"images_per_second": meter.images_per_second(), "data_wait": meter.data_wait(), "lr": rate}
    run.journal.record("train", epoch, {**meter.means(), **extra})
    return True


def _not_finite(run: Run, epoch: int, step: int) -> CheckFailedError:
    """Save the batch of a step whose loss is not finite, and return the error that names it."""
    path, feed = run.folder / BAD_BATCH, run.feed
    if run.world.leads:
        indices = feed.batches(epoch)[step]
        images, crops = [str(feed.paths[index]) for index in indices], torch.from_numpy(feed.crops.batch(indices))
        content = {"epoch": epoch, "step": step, "images": images, "crops": crops, "seeds": feed.seeds(epoch, step)}
        with written_whole(path) as temporary:
            torch.save(content, temporary)
    return CheckFailedError(
        f"the loss of epoch {epoch}, step {step + 1} is not finite; its batch is in {path}",
        f"{run.folder / LAST}, if there is one, is from before; try a new run with --precision fp32 or --clip-norm 10",
    )


def evaluate_epoch(run: Run) -> bool:
    """Evaluate, and save the network as best.pt if its mAP is the highest so far; False if interrupted."""
    position = run.position
    figures = evaluate_network(run) if run.world.leads else None
    if run.world.any(run.world.leads and figures is None)[0]:
        return False
    if figures:
        position.stale += 1
        if position.best is None or figures.mAP > position.best.mAP:
            position.best, position.stale = figures, 0
            spec = model_spec(run.config, run.dataset, run.trainee.network, figures)
            save_checkpoint(run.folder / BEST, Checkpoint(spec, run.trainee.evaluated.state_dict()))
    position.evaluated = position.epoch
    return True


def evaluate_network(run: Run) -> RetrievalFigures | None:
    """Embed query and gallery in float32, evaluate, and record the figures; None if interrupted."""
    query = _embed(run, run.query, "embed query")
    gallery = None if query is None else _embed(run, run.gallery, "embed gallery")
    if query is None or gallery is None:
        return None
    labels, others = run.dataset.query, run.dataset.gallery
    result = evaluate(query, gallery, labels.pids, others.pids, labels.camids, others.camids)
    figures = result.figures()
    run.journal.record("evaluate", run.position.epoch, {**asdict(figures), "rank5": result.rank(5)})
    return figures


def _embed(run: Run, crops: Crops, what: str) -> NDArray[np.float32] | None:
    """(N, D) float32; None if interrupted. A batch is never larger than one of training, so memory suffices."""
    batch = min(EVALUATION_BATCH, run.config.batch // run.feed.count)
    batches = np.array_split(np.arange(len(crops)), -(-len(crops) // batch))
    model, device = run.trainee.evaluated, run.trainee.device
    embedded: list[NDArray[np.float32]] = []
    done, was_training = 0, model.training
    model.eval()
    try:
        with torch.inference_mode(), closing(crops.prefetched(batches)) as ahead:
            for images in ahead:
                if run.stop():
                    return None
                embedded.append(model(normalize(torch.from_numpy(images).to(device))).cpu().numpy())
                done += len(images)
                run.report(what, done, len(crops))
    finally:
        model.train(was_training)
    return np.concatenate(embedded)


def save_last(run: Run) -> None:
    """Write last.pt."""
    run.saved = time.monotonic()
    if run.world.leads:
        save_state(run.folder, run.position, run.trainee, run.config, run.dataset, run.data)
