"""`pmm train`: a run from a data set, and on again from where one stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pmm_edge
from pmm_edge.data.dataset import ReidDataset, scan
from pmm_edge.errors import DataError, ModelError
from pmm_edge.files import written_whole
from pmm_edge.model import ReidNetwork, load_checkpoint
from pmm_edge.progress import Report, silent
from pmm_edge.runs import LAST, AboutRun, about_run, new_run_folder
from pmm_edge.trainer.config import TrainConfig, differences, overridden
from pmm_edge.trainer.distributed import World, joined
from pmm_edge.trainer.feed import check_shards
from pmm_edge.trainer.loop import Run, TrainResult
from pmm_edge.trainer.position import Position, restore_position
from pmm_edge.trainer.presets import read_config
from pmm_edge.trainer.setup import chosen_machine, fingerprint, init_from, new_network

CONFIG = "config.toml"


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
        return run.go(restore_position(run.trainee, checkpoint))


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
