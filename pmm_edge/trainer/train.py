"""Train a network: the whole workflow, from top to bottom.

`train` chooses the settings, reads the data set, builds or restores the network and opens the run folder. `fit` is the
loop over epochs, evaluations and checkpoints; the functions after it are its parts.
"""

import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import pmm_edge
from pmm_edge.console import Report, silent
from pmm_edge.data.augment import normalize
from pmm_edge.data.checks import analyze
from pmm_edge.data.dataset import ReidDataset, combine, data_sha256, read, scan
from pmm_edge.data.loader import Crops
from pmm_edge.data.synthetic import cached_synthetic
from pmm_edge.errors import CheckFailedError, DataError, ModelError, PmmError, PmmWarning, did_you_mean
from pmm_edge.files import remove_unfinished, written_whole
from pmm_edge.machine import threads
from pmm_edge.model import Checkpoint, ReidNetwork, build_model, save_checkpoint
from pmm_edge.model.aos import occlusion_epochs, probability_falls
from pmm_edge.model.backbone import zero_init_residuals
from pmm_edge.model.checkpoint import load_any_weights, load_pretrained
from pmm_edge.runs import BEST, CONFIG, LAST, AboutRun, about_run, new_run_folder, new_run_path, write_about_run
from pmm_edge.runtime.embed_files import cosine_figures, dataset_thresholds, evaluate_dataset
from pmm_edge.spec import Calibration, ModelSpec, RetrievalFigures
from pmm_edge.trainer.config import TrainConfig, choose_config, read_run_config
from pmm_edge.trainer.device import World, choose_machine, joined, torch_errors_explained
from pmm_edge.trainer.logging import Journal, Meter
from pmm_edge.trainer.state import Position, load_state, model_spec, restore_state, run_lock, save_state
from pmm_edge.trainer.step import (
    Feed,
    Indices,
    Trainee,
    learning_rate,
    prepare,
    set_learning_rate,
    start_phase,
    train_step,
)
from pmm_edge.trainer.teacher import Teacher, read_teacher

EVALUATION_BATCH = 64
SAVE_SECONDS = 30  # between two saves of last.pt without an evaluation: on a GPU, saving may take longer than an epoch
SYNC_STEPS = 10  # between two exchanges of stop requests and bad losses among GPU processes


@dataclass(frozen=True)
class TrainResult:
    """How a training ended."""

    folder: Path
    epochs_done: int
    finished: bool  # False if it was interrupted and can be resumed
    best: RetrievalFigures | None
    before: RetrievalFigures | None  # figures before the first step
    calibration: Calibration | None = None  # decision thresholds of best.pt; None if there are too few test people
    stop_requested: bool = False  # by Ctrl-C or SIGTERM; a run that was about to end has finished nevertheless


@dataclass
class Run:
    """A training in progress."""

    config: TrainConfig
    dataset: ReidDataset  # without junk
    fingerprint: str  # of the data set
    data_sha256: Callable[[], str]  # of query and gallery, as in certificates
    folder: Path
    world: World
    feed: Feed
    crops: Crops  # query images, then gallery images
    spec: ModelSpec
    trainee: Trainee
    position: Position
    journal: Journal
    stop: Callable[[], bool]  # whether Ctrl-C or SIGTERM came
    report: Report
    teacher: Teacher | None  # until it has embedded the training images
    saved: float = 0.0  # when last.pt was written

    def save(self) -> None:
        """Write last.pt."""
        self.saved = time.monotonic()
        if self.world.leads:
            save_state(self.folder, self.position, self.trainee, self.config, self.spec, self.fingerprint)

    def warn(self, text: str) -> None:
        if self.world.leads:
            self.journal.write(f"warning: {text}")
            warnings.warn(text, PmmWarning, stacklevel=2)


def train(
    data: str | Path | Sequence[str | Path] | None = None,
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
        >>> pmm.train(["/data/Market-1501", "/data/MSMT17_V1"], preset="market1501")
        >>> pmm.train(epochs=30, lr=5e-4)                              # the synthetic data set, preset "quick"
        >>> pmm.train(resume=Path("runs/20261122-174200-quick"))

    Args:
        data: folder of the data set; the synthetic data set by default. With `resume`, its new place if it was moved.
            Of several data sets, the training images are used together, with people and cameras kept apart, and query
            and gallery of the first one.
        preset: name of a preset, `quick` by default.
        config: settings instead of a preset, or a TOML file of them.
        layout: layout of the data sets if it is not detected.
        out: run folder to create, `runs/<time>-<preset>` by default.
        resume: run folder of an interrupted run, which continues with its own settings.
        report: receives the progress.
        **settings: fields of `TrainConfig` that replace those of the preset or configuration.

    Raises PmmError for a wrong setting and its subclasses DataError, ModelError (weights, or a folder that cannot be
    resumed), OutputError (a folder that cannot be written or is in use) and CheckFailedError (the loss is not finite).
    """
    places = [data] if isinstance(data, str | Path) else [*(data or ())]
    if resume is None:
        chosen, folder, moved = choose_config(preset, config, settings), out, ""
        sources = [(Path(place), layout) for place in places or [cached_synthetic(report=report)]]
    elif settings or any(given is not None for given in (preset, config, layout, out)):
        raise PmmError("a run is resumed with its own settings", "Leave out all but the new place of a moved data set")
    with joined(resume) as world, ExitStack() as stack:
        # Everything that can be refused is checked before a folder is created.
        if resume:  # the folder need not be on the machines of the other processes
            folder, (chosen, about) = resume, world.first(lambda: (read_run_config(resume), about_run(resume)))
            assert about  # or `read_run_config` had refused the folder
            started = [(about.data, about.layout), *about.more]
            words = f"pmm train {'NEWPLACE ' * len(started)}--resume {resume}"
            if len(places) not in (0, len(started)):
                problem = f"{resume} trains on {len(started)} data sets, not {len(places)}"
                raise PmmError(problem, f"Name them all: {words}")
            moved = "" if places else f"Put it back, or name its new place: {words}"
            places = places or [place for place, _ in started]
            sources = [(Path(place), layout) for place, (_, layout) in zip(places, started, strict=True)]
        try:
            datasets = [scan(*sources[0]), *(read(*source) for source in sources[1:])]
            dataset = combine(datasets)
        except DataError as error:
            raise DataError(error.problem, moved or error.remedy) from error
        device, dtype = choose_machine(chosen, world)
        feed = Feed(dataset.train, chosen, world, device)
        # Evaluation has the memory that the training images leave; each process fills its own part of it.
        judged = datasets[0].without_junk()
        cache, images = int(chosen.cache_gib * 2**30), [*judged.query.paths, *judged.gallery.paths]
        cache -= world.local_size * feed.crops.cached_bytes
        crops = Crops(images, chosen.height, chosen.width, cache, threads(world.local_size))
        fingerprint, test_images = dataset.fingerprint(), [*dataset.query.paths, *dataset.gallery.paths]
        check_same_work(world, chosen, fingerprint, datasets[0].root)
        teacher, teacher_sha256, teacher_size = None, None, None
        if chosen.teacher:
            teacher = read_teacher(Path(chosen.teacher), world, device, resume)
            chosen = replace(chosen, teacher=str(teacher.path.absolute()))  # resumed from anywhere
            teacher_sha256, teacher_size = teacher.sha256, teacher.spec.embedding_size
        (root, read_as), *more = [(str(one.root.absolute()), one.layout) for one in datasets]

        checkpoint, network = None, None if resume else new_network(chosen, feed.num_classes, world)

        def open_folder() -> Path:
            place = folder or new_run_path(chosen.preset)
            stack.enter_context(run_lock(place))
            if resume is None:
                new_run_folder(AboutRun(chosen.preset, root, pmm_edge.__version__, read_as, more=more), place)
                with written_whole(place / CONFIG) as temporary:
                    temporary.write_text(chosen.to_toml(), "utf-8", "surrogateescape")  # may name files
                for one in datasets:
                    for finding in analyze(one).warnings:
                        warnings.warn(f"{one.root}: {finding.text}", PmmWarning, stacklevel=2)
            for name in (CONFIG, LAST, BEST):  # the other files are written again at once
                remove_unfinished(place / name)
            return place

        folder = world.first(open_folder)  # the other processes stop here if the first one is refused
        if resume:
            checkpoint = world.first(lambda: load_state(folder, chosen, fingerprint, teacher_sha256))
            if world.leads and about:
                write_about_run(folder, replace(about, data=root, more=more))  # for later commands
        if checkpoint:
            network, position = checkpoint.network(), checkpoint.training["position"]
            spec = replace(checkpoint.spec, checkpoint_sha256=None)  # of calibrated weights, which change from here on
        else:
            network, position = network or new_network(chosen, feed.num_classes, world), Position()
            spec = model_spec(chosen, network, feed.num_classes, dataset.name, teacher_sha256)

        if chosen.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
            stack.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
            torch.use_deterministic_algorithms(True)
        evaluation = position.evaluated if position.before else None
        journal = stack.enter_context(Journal(folder, position.epoch, evaluation, world.leads))
        stop = stack.enter_context(stop_on_signal())
        report = report if world.leads else silent
        with torch_errors_explained(device, chosen, world):
            trainee = prepare(network, chosen, device, dtype, world, teacher_size)
            trainee.occlusion = feed.occlusion
            if checkpoint:
                restore_state(trainee, checkpoint)
            digest = lru_cache(maxsize=None)(partial(data_sha256, test_images, dataset.root, report))
            run = Run(
                chosen, judged, fingerprint, digest, folder, world, feed, crops, spec,
                trainee, position, journal, stop, report, teacher,
            )  # fmt: skip
            teacher = None  # its memory is free once it has embedded the images
            finished = fit(run)
        figures = position.best, position.before, position.calibration
        return TrainResult(folder, position.epoch, finished, *figures, stop())


def check_same_work(world: World, config: TrainConfig, fingerprint: str, data: Path) -> None:
    """Raise DataError if the processes read different data sets, PmmError if their settings differ."""
    work = {"data set": fingerprint, "version of pmm-edge": pmm_edge.__version__, **asdict(config)}
    every = world.gather([work])
    different = [name for name in work if any(each.get(name) != every[0].get(name) for each in every)]
    if "data set" in different:
        problem = f"the data set {data} is not the same in all {world.size} processes: names, labels or sizes differ"
        raise DataError(problem, "Copy it from one machine to the others")
    if different:
        problem = f"the {world.size} processes differ in {', '.join(different)}"
        raise PmmError(problem, "Start all of them with the same settings and the same version")


def new_network(config: TrainConfig, num_classes: int, world: World = World()) -> ReidNetwork:
    """Build the network of a run; weights that are not loaded are drawn from the seed of the run.

    Raises PmmError if the configuration does not describe a network, ModelError if weights are missing or do not fit.
    """
    weights = config.backbone_weights
    if weights not in ("imagenet", "none") and not Path(weights).exists():
        remedy = f"{did_you_mean(weights, ('imagenet', 'none'))}Choose imagenet, none, or a file of torchvision weights"
        raise ModelError(f"the backbone weights {weights} do not exist", remedy)
    given = load_any_weights(Path(config.init_from)) if config.init_from else {}
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        settings = ("method", "backbone", "height", "width", "mix", "mix_blocks", "block_size", "rpp", "embedding_size")
        network = build_model(num_classes=num_classes, **{name: getattr(config, name) for name in settings})
    own = network.state_dict()
    fitting = {name: tensor for name, tensor in given.items() if name in own and own[name].shape == tensor.shape}
    if weights == "none":
        zero_init_residuals(network.backbone)
    elif not {name for name in own if name.startswith("backbone.")} <= fitting.keys():
        world.first(lambda: load_pretrained(network, config.backbone, weights))  # downloads them
        if not world.leads:
            load_pretrained(network, config.backbone, weights)
    if config.init_from:
        if not fitting:
            raise ModelError(f"no tensor of {config.init_from} fits the network", "Choose its backbone and method")
        network.load_state_dict(fitting, strict=False)
        counts = f"{len(fitting)} of {len(given)} tensors fit the network, which has {len(own)}"
        if world.leads:
            warnings.warn(f"{config.init_from}: {counts}", PmmWarning, stacklevel=2)
    return network


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

    handled = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, handle) for number in handled}
    try:
        yield requested.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fit(run: Run) -> bool:
    """Train all epochs that are left; False if interrupted."""
    config, position, world = run.config, run.position, run.world
    run.journal.write(f"{run.trainee.device}, {run.trainee.dtype}, {run.dataset.root}, from epoch {position.epoch + 1}")
    crops = [*[run.feed.crops] * world.local_size, run.crops]
    cached, needed = sum(each.cached_bytes for each in crops) / 2**30, sum(each.all_bytes for each in crops) / 2**30
    if cached < needed:
        size = f"--cache-gib {math.ceil(needed * 10) / 10:g}"
        run.warn(f"{cached:.2g} of {needed:.2g} GiB of decoded images fit into the cache; {size} holds all")
    if position.before is None and (found := evaluate_network(run)):
        position.before, _ = found
    while True:
        due = position.epoch == config.epochs or position.epoch % config.evaluate_every == 0
        if due and position.step == 0 and position.epoch != position.evaluated:
            run.save()  # so that an unreadable gallery image does not cost the epoch
            if not evaluate_epoch(run):
                run.journal.write(f"interrupted in the evaluation of epoch {position.epoch}; the epoch is saved")
                return False
            run.save()
        if position.epoch == config.epochs:
            return True
        if 0 < config.patience <= position.stale:
            run.journal.write(f"stopped: no better mAP in {position.stale} evaluations")
            return True
        if world.any(run.stop())[0]:
            run.save()
            run.journal.write(f"interrupted in epoch {position.epoch + 1}, step {position.step}; it is saved")
            return False
        if not (measure_occlusion(run) and ask_teacher(run)):
            continue  # a stop was requested
        if train_epoch(run):
            position.epoch, position.step = position.epoch + 1, 0
            if time.monotonic() - run.saved > SAVE_SECONDS:
                run.save()


def train_epoch(run: Run) -> bool:
    """Train an epoch from its step `position.step`; False if interrupted."""
    config, position, feed, world = run.config, run.position, run.feed, run.world
    epoch = position.epoch + 1
    batches = feed.batches(epoch)
    meter, rate = Meter(), 0.0
    start_phase(run.trainee, config, epoch)
    for shards in feed.shards(batches, epoch, position.step, meter):
        rate = learning_rate(config, epoch, (position.step + 0.5) / len(batches))
        set_learning_rate(run.trainee, rate)
        loss, parts = train_step(run.trainee, shards, config)
        meter.add(loss, parts, position.step, len(batches[position.step]))
        position.step += 1
        last = position.step == len(batches)
        # Reading results waits for the device, and several processes do it in the same steps. On a CPU the exchange is
        # cheap, and torchrun kills a process 30 s after SIGTERM.
        alone, cheap = world.size == 1, run.trainee.device.type == "cpu"
        if last or (meter.due() or run.stop() if alone else cheap or position.step % SYNC_STEPS == 0):
            unreadable, bad = feed.crops.take_unreadable(), meter.bad_step()
            stop, any_unreadable, any_bad = world.any(run.stop(), bool(unreadable), bad is not None)
            if any_unreadable:
                for text in feed.crops.count_unreadable(world.gather(unreadable), config.max_bad_images):
                    run.warn(text)
            if any_bad:
                step = 1 + min(world.gather([] if bad is None else [bad]))
                raise CheckFailedError(
                    f"the loss of epoch {epoch}, step {step} is not finite in {run.folder}",
                    f"{LAST}, if there is one, is from before; try a new run with --precision fp32 or --clip-norm 10",
                )
            done, total, means = (epoch - 1) * len(batches) + position.step, config.epochs * len(batches), meter.means()
            speed = f"loss {means['loss']:.2f} · {means['images_per_second']:.0f} images/s"
            run.report("train", done, total, f"epoch {epoch}/{config.epochs} · {speed}")
            if stop and not last:
                return False
    run.journal.record("train", epoch, {**meter.means(), "lr": rate})
    return True


def evaluate_epoch(run: Run) -> bool:
    """Evaluate, and save the network as best.pt if its mAP is the highest so far; False if interrupted."""
    position, found = run.position, evaluate_network(run)
    if found is None:
        return False
    figures, spec = found
    position.stale += 1
    if spec:
        position.best, position.calibration, position.stale = figures, spec.calibration, 0
        if run.world.leads:
            best = Checkpoint(spec, run.trainee.evaluated.state_dict())
            save_checkpoint(run.folder / BEST, best)
    position.evaluated = position.epoch
    return True


def evaluate_network(run: Run) -> tuple[RetrievalFigures, ModelSpec | None] | None:
    """Embed query and gallery in float32, evaluate, and record the figures; None if interrupted.

    Returns the figures by Euclidean distance and, if they are the best of this training so far, the spec with all
    figures and decision thresholds. The first process ranks.
    """
    model = run.trainee.evaluated
    parts = for_all_images(run, model, run.crops, "embed", lambda images, _: model(images))
    if parts is None:
        return None
    embeddings = run.world.gather(parts, to_first=True)

    def rank() -> tuple[RetrievalFigures, ModelSpec | None]:
        rows, best, calibration = np.concatenate(embeddings), run.position.best, None
        result = evaluate_dataset(run.dataset, rows)
        figures = result.figures()
        run.journal.record("evaluate", run.position.epoch, {**asdict(figures), "rank5": result.rank(5)})
        if run.position.before is None or (best and figures.mAP <= best.mAP):
            return figures, None  # all that is kept of a network before training, or of one that is not the best
        try:
            calibration = dataset_thresholds(run.dataset, rows, run.data_sha256()).calibration
        except DataError as error:
            run.journal.write(f"no decision thresholds: {error}")
        cosine = cosine_figures(run.dataset, rows)
        return figures, replace(run.spec, retrieval=figures, retrieval_cosine=cosine, calibration=calibration)

    return run.world.first(rank)


def measure_occlusion(run: Run) -> bool:
    """Measure which occlusion hurts each training image most, if it is time to (`model/aos.py`); False if interrupted.

    It is saved with the run, because the network of this moment is not.
    """
    occlusion, position = run.trainee.occlusion, run.position
    due = position.step == 0 and position.epoch in occlusion_epochs(run.config.epochs)
    if occlusion is None or not due or occlusion.epoch == position.epoch:
        return True
    network, device = run.trainee.network, run.trainee.device

    def falls(images: torch.Tensor, indices: Indices) -> torch.Tensor:
        return probability_falls(network, images, torch.from_numpy(run.feed.classes[indices]).to(device))

    parts = for_all_images(run, network, run.feed.crops, "occlude", falls)
    if parts is None:
        return False
    occlusion.falls, occlusion.epoch = np.concatenate(run.world.gather(parts)), position.epoch
    return True


def ask_teacher(run: Run) -> bool:
    """Let the teacher, if there is one, embed all training images before the first step; False if interrupted.

    Its embeddings are not saved: a resumed run computes them again, to the same bits on a CPU.
    """
    feed, teacher = run.feed, run.teacher
    if teacher is None:
        return True
    size, workers = teacher.spec.input, feed.crops.workers
    crops = Crops(feed.paths, size.height, size.width, 0, workers, feed.crops.pids)  # each of them is needed once
    parts = for_all_images(run, teacher.network, crops, "teacher", lambda images, _: teacher.embed(images))
    if parts is None:
        return False
    feed.targets, run.teacher = teacher.targets(np.concatenate(run.world.gather(parts))), None
    return True


def for_all_images(
    run: Run, network: nn.Module, crops: Crops, what: str, compute: Callable[[torch.Tensor, Indices], torch.Tensor]
) -> list[NDArray[np.float32]] | None:
    """Results of `compute` in evaluation mode for this process's share of all images; None if interrupted.

    `compute` gets normalized images (N, 3, H, W) and their indices (N,). The batches do not depend on the number of
    processes. `what` is shown as progress.
    """
    device, world = run.trainee.device, run.world
    batch = min(EVALUATION_BATCH, run.config.batch // run.config.accumulate)  # of the memory of a training step
    batches = np.array_split(np.arange(len(crops)), -(-len(crops) // batch))
    first, end = (len(batches) * rank // world.size for rank in (world.rank, world.rank + 1))
    own, parts, was_training = iter(batches[first:end]), [], network.training
    world.copy_from_first(network.buffers())  # batch norm has seen other images in each process
    network.eval()
    try:
        with torch.inference_mode(), closing(crops.prefetched(batches[first:end])) as ahead:
            for done in range(0, len(batches), world.size):
                if world.any(run.stop())[0]:
                    return None
                for images in islice(ahead, 1):  # none if this process has one batch less
                    normalized = normalize(torch.from_numpy(images).to(device))
                    parts.append(compute(normalized, next(own)).cpu().numpy())
                run.report(what, min(done + world.size, len(batches)), len(batches))
    finally:
        network.train(was_training)
    return parts
