"""An epoch's batches, divided among processes and parts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pmm_edge.data.dataset import Split
from pmm_edge.data.loader import identity_batches
from pmm_edge.trainer.config import PRESETS
from pmm_edge.trainer.distributed import World
from pmm_edge.trainer.feed import Feed, check_shards

CONFIG = replace(PRESETS["quick"], batch=64, cache_gib=0.0)
EACH = CONFIG.images_per_identity


def feed_of(identities, processes, accumulate=1):
    config, world = replace(CONFIG, accumulate=accumulate), World(size=processes, local_size=processes)
    check_shards(config, identities, world)
    pids = np.repeat(np.arange(1, identities + 1), 2)
    train = Split([Path(f"{number}.jpg") for number in range(len(pids))], pids, np.ones_like(pids))
    return Feed(train, config, world, torch.device("cpu"))


@pytest.mark.parametrize(
    ("identities", "processes", "accumulate", "taken"),
    [
        (15, 2, 1, [14]),
        (15, 1, 2, [14]),
        (14, 4, 1, [12]),
        (16 + 15, 2, 2, [16, 12]),
        (16 + 7, 4, 1, [16]),
    ],
)
def test_what_is_left_of_an_epoch_is_trained_on_as_far_as_it_divides(identities, processes, accumulate, taken):
    feed = feed_of(identities, processes, accumulate)
    for epoch in (1, 2):
        batches = feed.batches(epoch)
        assert [len(batch) for batch in batches] == [EACH * count for count in taken]
        people = feed.classes[np.concatenate(batches)]
        assert set(np.unique(people, return_counts=True)[1]) == {EACH}, "whole identities, each once"


def test_batches_that_divide_are_as_the_sampler_gives_them():
    feed = feed_of(16 + 14, processes=2)
    whole = identity_batches(feed.classes, 64 // EACH, EACH, np.random.default_rng([CONFIG.seed, 3]))
    assert [batch.tolist() for batch in feed.batches(3)] == [batch.tolist() for batch in whole]
