"""A training step: batches, learning rate, losses, and which images, labels and maps each mix really gives."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import CONFIG as TINY

from pmm_edge.data.augment import ERASE_PROBABILITY, augment
from pmm_edge.data.dataset import Split
from pmm_edge.errors import PmmError
from pmm_edge.model import StageOutput
from pmm_edge.model.mixing import MixedLabels, attentive_cutmix, cutmix, top_blocks
from pmm_edge.model.network import max_pool
from pmm_edge.trainer import step
from pmm_edge.trainer.config import TrainConfig
from pmm_edge.trainer.device import World
from pmm_edge.trainer.step import Feed, Shard, batch_hard_triplet_loss, identity_loss, learning_rate, prepare
from pmm_edge.trainer.train import new_network

PAPER_RATES = {1: 1e-4, 4: 1e-4, 5: 2e-4, 49: 1e-3, 50: 1e-3, 199: 1e-3, 200: 1e-4, 299: 1e-4, 300: 1e-5, 400: 1e-5}


def test_the_papers_schedule_and_a_short_training_on_the_same_curve():
    for epoch, rate in PAPER_RATES.items():
        assert learning_rate(TrainConfig(), epoch) == pytest.approx(rate)
        assert learning_rate(TrainConfig(lr=5e-4), epoch, 0.9) == pytest.approx(rate / 2)
    rates = [learning_rate(TrainConfig(epochs=20), epoch) for epoch in range(1, 21)]
    assert rates[0] == pytest.approx(1e-4) and rates[-1] == pytest.approx(1e-5)
    assert rates.count(pytest.approx(1e-3)) == 8 - 1


def test_refined_part_pooling_follows_the_whole_schedule_of_pcb_at_a_tenth_of_the_peak_rate():
    config = TrainConfig(method="pcb", rpp=True)
    assert [learning_rate(config, epoch) for epoch in (1, 300, 301, 400)] == pytest.approx([1e-4, 1e-5, 1e-4, 1e-4])
    alone = replace(config, rpp=False, epochs=300)
    assert all(learning_rate(config, epoch) == learning_rate(alone, epoch) for epoch in range(1, 301))


def test_cosine_warms_up_linearly_and_decays_to_zero():
    config = TrainConfig(epochs=10, lr=2e-3, schedule="cosine")
    points = {(1, 0.75): 1e-3, (2, 0.5): 2e-3, (6, 0.75): 1e-3, (10, 0.9999): 0.0}
    assert {point: learning_rate(config, *point) for point in points} == pytest.approx(points, abs=1e-9)


def feed_of(identities, processes, accumulate=1, **world):
    config = replace(TINY, batch=64, accumulate=accumulate, cache_gib=20 * 48 * 32 * 3 / 2**30)
    pids = np.repeat(np.arange(1, identities + 1), 2)
    train = Split([Path(f"{number}.jpg") for number in range(len(pids))], pids, np.ones_like(pids))
    return Feed(train, config, World(size=processes, **world), torch.device("cpu"))


@pytest.mark.parametrize(
    ("identities", "processes", "accumulate", "taken"),
    [(15, 2, 1, [14]), (15, 1, 2, [14]), (14, 4, 1, [12]), (16 + 15, 2, 2, [16, 12]), (16 + 7, 4, 1, [16])],
)
def test_the_rest_of_an_epoch_is_used_as_far_as_it_divides(identities, processes, accumulate, taken):
    feed = feed_of(identities, processes, accumulate)
    for epoch in (1, 2):
        batches = feed.batches(epoch)
        assert [len(batch) for batch in batches] == [4 * count for count in taken]
        people = feed.classes[np.concatenate(batches)]
        assert set(np.unique(people, return_counts=True)[1]) == {4}, "each identity once, with four images"


def test_a_batch_that_cannot_be_split_is_refused():
    for identities, processes in ((30, 5), (30, 16), (7, 4)):
        with pytest.raises(PmmError):
            feed_of(identities, processes)


def test_processes_share_memory_and_cores(monkeypatch):
    monkeypatch.setattr("pmm_edge.machine.usable_cores", lambda root=None: 8.0)
    crops = feed_of(30, 2, local_size=2).crops
    assert crops.cached_bytes == 10 * 48 * 32 * 3 and crops.workers == 4


def test_triplet_loss_takes_the_farthest_positive_and_the_nearest_negative():
    embeddings = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0], [10.0, 0.0]])
    pids = torch.tensor([0, 0, 0, 1])
    d = torch.cdist(embeddings, embeddings).tolist()
    hardest = [(4.0, 10.0), (d[1][2], 7.0), (d[2][1], d[2][3]), (0.0, 7.0)]
    expected = sum(math.log1p(math.exp(ap - an)) for ap, an in hardest) / 4
    assert batch_hard_triplet_loss(embeddings, pids).item() == pytest.approx(expected, rel=1e-5)
    equal = torch.ones(4, 8, requires_grad=True)
    batch_hard_triplet_loss(equal, pids).backward()
    assert torch.isfinite(equal.grad).all()


def test_identity_loss_smooths_labels_by_a_tenth_and_shares_mixed_ones_by_area():
    logits, target = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0.1 / 3 + 0.9, 0.1 / 3, 0.1 / 3])
    expected = -(target * torch.log_softmax(logits, dim=1)[0]).sum().item()
    assert identity_loss(logits, torch.tensor([0])).item() == pytest.approx(expected)
    torch.manual_seed(0)
    logits, embeddings = torch.randn(4, 3), torch.randn(4, 8)
    pids, other = torch.tensor([0, 0, 1, 1]), torch.tensor([2, 1, 0, 0])
    mixed = MixedLabels(other, torch.tensor([0.25, 0.75, 0.0, 1.0]))
    expected = sum(
        (1 - share) * identity_loss(logits[i : i + 1], pids[i : i + 1])
        + share * identity_loss(logits[i : i + 1], other[i : i + 1])
        for i, share in enumerate(mixed.share)
    )
    _, parts = step.pmm_loss([StageOutput(embeddings, logits)], pids, mixed)
    assert parts["identity_1"].item() == pytest.approx(expected.item() / 4)
    assert parts["triplet_1"].item() == batch_hard_triplet_loss(embeddings, torch.tensor([0, 1, 1, 0])).item()


CONFIG = replace(TINY, height=96, width=64, batch=16, mix_blocks=1, mix_block_size="3x2", erase_size=16, ema=0.0)
PIDS = torch.arange(4).repeat_interleave(4)
SEED = 11


@pytest.fixture
def crops():
    return torch.randint(0, 256, (16, 96, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def taken(monkeypatch, crops):
    """Take a step and return what the network and the loss received, and what the network returned."""

    def take(mix):
        config = replace(CONFIG, mix=mix)
        trainee = prepare(new_network(config, 4), config, torch.device("cpu"), torch.float32)
        seen = {"maps": [], "before": {name: tensor.clone() for name, tensor in trainee.network.state_dict().items()}}
        forward, loss = trainee.forward, step.pmm_loss

        def recorded_forward(images, pids, **named):
            seen.update(images=images.clone(), pids=pids)
            seen["outputs"] = forward(images, pids, **named)
            return seen["outputs"]

        def recorded_loss(outputs, pids, mixed=None):
            seen.update(loss_pids=pids, mixed=mixed)
            return loss(outputs, pids, mixed)

        def recorded_pool(features):
            seen["maps"].append(features.detach().clone())
            return max_pool(features)

        trainee.forward = recorded_forward
        trainee.network.bottleneck.register_forward_hook(
            lambda module, inputs, output: seen.update(unmixed=output.detach().clone())
        )
        with monkeypatch.context() as patch:
            patch.setattr("pmm_edge.model.network.max_pool", recorded_pool)
            patch.setattr(step, "pmm_loss", recorded_loss)
            step.train_step(trainee, [Shard(crops, PIDS, SEED)], config)
        assert torch.equal(seen["pids"], PIDS) and torch.equal(seen["loss_pids"], PIDS)
        return seen

    return take


def augmented(crops, probability=ERASE_PROBABILITY):
    """The images before any mix, and the generator in the state after the augmentation."""
    generator = torch.Generator().manual_seed(SEED)
    return augment(crops, CONFIG.erase_size, generator, probability), generator


def erased(images):
    return (images == 0).all(dim=1).flatten(1).sum(dim=1)


@pytest.mark.parametrize("mix", ["a-hard-mix", "dropblock", "none"])
def test_mixes_of_the_map_leave_images_and_labels_unchanged(taken, crops, mix):
    seen = taken(mix)
    assert torch.equal(seen["images"], augmented(crops)[0]) and seen["mixed"] is None
    assert 0 < (erased(seen["images"]) > 0).sum() < 16


def test_cutout_erases_a_square_of_every_image(taken, crops):
    seen = taken("cutout")
    assert torch.equal(seen["images"], augmented(crops, 1.0)[0]) and seen["mixed"] is None
    assert (erased(seen["images"]) == CONFIG.erase_size**2).all()


@pytest.mark.parametrize("mix", ["cutmix", "a-cutmix"])
def test_mixed_images_and_labels_reach_the_network_and_the_loss(taken, crops, mix):
    seen = taken(mix)
    images, generator = augmented(crops)
    if mix == "cutmix":
        expected, labels = cutmix(images, PIDS, generator)
    else:
        network = new_network(replace(CONFIG, mix=mix), 4)
        network.load_state_dict(seen["before"])
        expected, labels = attentive_cutmix(images, PIDS, network.attention(images, PIDS), (3, 2), 1, generator)
    assert torch.equal(seen["images"], expected) and not torch.equal(expected, images)
    assert torch.equal(seen["mixed"].other, labels.other) and torch.equal(seen["mixed"].share, labels.share)


@pytest.mark.parametrize("mix", ["cutout", "cutmix", "a-cutmix", "none"])
def test_mixes_of_images_leave_the_map_unchanged(taken, mix):
    second, third = (seen := taken(mix))["maps"]
    assert torch.equal(second, third) and torch.equal(second, seen["unmixed"])
    assert all(output.cam is None and output.negatives is None for output in seen["outputs"])


def test_dropblock_zeroes_one_block_of_each_sample(taken):
    dropped = [(features == 0).all(dim=1) for features in taken("dropblock")["maps"]]
    for positions in dropped:
        assert (positions.flatten(1).sum(dim=1) == 6).all() and (positions != positions[0]).any(), "all samples draw"
    assert not torch.equal(*dropped), "both stages draw"


def test_a_hard_mix_puts_the_negatives_features_where_the_previous_stage_looked(taken):
    seen = taken("a-hard-mix")
    for stage, mixed in zip(seen["outputs"], seen["maps"], strict=False):
        replaced = top_blocks(stage.cam, (3, 2), 1)
        assert (PIDS[stage.negatives] != PIDS).all()
        assert torch.equal(mixed, torch.where(replaced, seen["unmixed"][stage.negatives], seen["unmixed"]))
        assert not torch.equal(mixed, seen["unmixed"])
