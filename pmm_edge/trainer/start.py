"""`pmm train`: a run from a data set, and on again from where one stopped."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pmm_edge
from pmm_edge.data.checks import not_trained_on
from pmm_edge.data.dataset import ReidDataset, scan
from pmm_edge.errors import DataError, ModelError
from pmm_edge.files import remove_unfinished, written_whole
from pmm_edge.model import Checkpoint, ReidNetwork, load_checkpoint
from pmm_edge.model.checkpoint import any_weights
from pmm_edge.progress import Report, silent
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
from pmm_edge.trainer.alone import alone_in
from pmm_edge.trainer.config import TrainConfig, differences, overridden
from pmm_edge.trainer.distributed import World, joined
from pmm_edge.trainer.feed import check_shards
from pmm_edge.trainer.journal import METRICS
from pmm_edge.trainer.loop import BAD_BATCH, Run, TrainResult
from pmm_edge.trainer.position import Position, restore_position
from pmm_edge.trainer.presets import read_run_config
from pmm_edge.trainer.setup import chosen_machine, fingerprint, init_from, new_network

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
            for finding in not_trained_on(dataset.train):
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
