"""The stage of `gpu_check.py` that trains the methods: one process, which decodes images and loads kernels once."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from gpu_stages import reset_memory
from method_tables import FIGURES, mean_and_deviation, rows_named

from pmm_edge.data.augment import normalize
from pmm_edge.data.dataset import ReidDataset, scan
from pmm_edge.data.loader import Crops
from pmm_edge.data.synthetic import SyntheticConfig, cached_synthetic
from pmm_edge.runtime.embed_files import evaluate_dataset
from pmm_edge.trainer.config import TrainConfig, choose_config
from pmm_edge.trainer.device import World, choose_machine
from pmm_edge.trainer.logging import Meter
from pmm_edge.trainer.step import Feed, learning_rate, prepare, set_learning_rate, train_step
from pmm_edge.trainer.train import EVALUATION_BATCH, new_network

if TYPE_CHECKING:
    from gpu_stages import Check


def train_all(check: Check) -> None:
    """Train every row with every seed.

    The rows of a seed come before those of the next one, so that an interrupted stage has a whole table of the first.
    """
    sizes, rows, longest = check.sizes, rows_named(check.sizes.rows), 0.0
    data = scan(cached_synthetic(SyntheticConfig(**sizes.method_data))).without_junk()
    settings = sizes.methods | {"epochs": check.method_epochs, "precision": "bf16", "device": check.device.type}
    base = choose_config(settings=settings)
    test = Crops([*data.query.paths, *data.gallery.paths], base.height, base.width)
    decoded = Feed(data.train, base, World(), check.device).crops
    names = ", ".join(f"{name} {value}" for name, value in sizes.methods.items())
    table = f"Methods on {data.name}: {check.method_epochs} epochs, {names}, bf16"
    finished: dict[str, list[dict[str, float]]] = {name: [] for name in rows}
    waiting = [(seed, name) for seed in sizes.seeds for name in rows]
    total = len(waiting)
    while waiting and time.monotonic() + longest < check.deadline - 3:
        seed, name = waiting[0]
        with check.part(f"{name}, seed {seed}"):
            reset_memory()
            start, config = time.monotonic(), choose_config(config=base, settings={**rows[name], "seed": seed})
            feed = Feed(data.train, config, World(), check.device)
            feed.crops = decoded
            if (found := _train(config, feed, test, data, check.deadline - 3)) is None:
                break
            longest = max(longest, time.monotonic() - start)
            finished[name].append(found)
            percent = {f"{figure}, %": 100 * found[figure] for figure in FIGURES}
            check.add("Each training", f"{name}, seed {seed}", percent | {"s": time.monotonic() - start})
        del waiting[0]
        check.found["figures"] = [one for one in check.found["figures"] if one["table"] != table]
        for row, results in finished.items():
            if results:
                cells = {f"{key}, %": mean_and_deviation([result[key] for result in results]) for key in FIGURES}
                check.add(table, row, {"seeds": len(results), **cells})
    if waiting:
        check.found["status"] = "timeout"
        check.skip(f"{len(waiting)} of {total} trainings", f"the longest took {longest:.0f} s; no time was left")


def _train(config: TrainConfig, feed: Feed, test: Crops, data: ReidDataset, deadline: float) -> dict[str, float] | None:
    """Train as `pmm train` does, without what a run saves; figures at the end, or None if the time is over."""
    trainee = prepare(new_network(config, feed.num_classes), config, *choose_machine(config, World()))
    for epoch in range(1, config.epochs + 1):
        batches, meter = feed.batches(epoch), Meter()
        for step, shards in enumerate(feed.shards(batches, epoch, 0, meter)):
            set_learning_rate(trainee, learning_rate(config, epoch, (step + 0.5) / len(batches)))
            meter.add(*train_step(trainee, shards, config), step, len(batches[step]))
        if meter.bad_step() is not None:
            raise FloatingPointError(f"the loss of epoch {epoch} is not finite")
        if time.monotonic() > deadline:
            return None
    network, parts = trainee.network.eval(), []
    with torch.inference_mode():
        for images in test.prefetched(np.array_split(np.arange(len(test)), -(-len(test) // EVALUATION_BATCH))):
            parts.append(network(normalize(torch.from_numpy(images).to(trainee.device))).cpu().numpy())
    found = evaluate_dataset(data, np.concatenate(parts)).figures()
    return {"Rank-1": found.rank1, "mAP": found.mAP, "mAP@50": found.mAP_at_50}
