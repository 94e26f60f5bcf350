"""What each mix really does in a training step: which images reach the network, which labels the loss."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pmm_edge.data.augment import ERASE_PROBABILITY, augment
from pmm_edge.model.alternatives import attention, attentive_cutmix, cutmix
from pmm_edge.model.mixing import top_blocks
from pmm_edge.model.network import max_pool
from pmm_edge.trainer import step
from pmm_edge.trainer.config import PRESETS
from pmm_edge.trainer.setup import new_network
from pmm_edge.trainer.step import Shard, prepare, train_step

CONFIG = replace(
    PRESETS["quick"], height=96, width=64, batch=16, mix_blocks=1, mix_block_size="3x2", erase_size=16, device="cpu"
)
PIDS = torch.arange(4).repeat_interleave(4)
SEED = 11


@pytest.fixture
def crops():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (16, 96, 64, 3), dtype=np.uint8))


@pytest.fixture
def taken(monkeypatch, crops):
    """Take a step and say what the network and the loss were given, and what the network gave."""

    def take(mix):
        config = replace(CONFIG, mix=mix)
        trainee = prepare(new_network(config, 4), config, torch.device("cpu"), torch.float32)
        seen = {"maps": []}
        forward, loss = trainee.forward, step.pmm_loss

        def recorded_forward(images, pids, **named):
            seen.update(images=images.clone(), pids=pids)
            # The weights and statistics as they are before the step.
            seen["before"] = {name: tensor.clone() for name, tensor in trainee.network.state_dict().items()}
            seen["outputs"] = forward(images, pids, **named)
            return seen["outputs"]

        def recorded_loss(outputs, pids, mixed=None):
            seen.update(loss_pids=pids, mixed=mixed)
            return loss(outputs, pids, mixed)

        def recorded_pool(features):
            seen["maps"].append(features.detach().clone())
            return max_pool(features)

        def recorded_map(module, inputs, output):
            seen["unmixed"] = output.detach().clone()

        trainee.forward = recorded_forward
        trainee.network.bottleneck.register_forward_hook(recorded_map)
        monkeypatch.setattr("pmm_edge.model.network.max_pool", recorded_pool)
        monkeypatch.setattr(step, "pmm_loss", recorded_loss)
        train_step(trainee, [Shard(crops, PIDS, SEED)], config)
        monkeypatch.setattr(step, "pmm_loss", loss)
        assert torch.equal(seen["pids"], PIDS) and torch.equal(seen["loss_pids"], PIDS)
        return seen

    return take


def augmented(crops, probability=ERASE_PROBABILITY):
    """The images before any mix, and the generator as augmentation leaves it."""
    generator = torch.Generator().manual_seed(SEED)
    return augment(crops, CONFIG.erase_size, generator, probability), generator


def erased(images):
    return (images == 0).all(dim=1).flatten(1).sum(dim=1)


@pytest.mark.parametrize("mix", ["a-hard-mix", "dropblock", "none"])
def test_what_mixes_on_the_map_leaves_images_and_labels_alone(taken, crops, mix):
    seen = taken(mix)
    assert torch.equal(seen["images"], augmented(crops)[0]) and seen["mixed"] is None
    assert 0 < (erased(seen["images"]) > 0).sum() < 16


def test_cutout_erases_a_square_of_every_image(taken, crops):
    seen = taken("cutout")
    assert torch.equal(seen["images"], augmented(crops, 1.0)[0]) and seen["mixed"] is None
    assert (erased(seen["images"]) == CONFIG.erase_size**2).all()


def test_cutmix_gets_the_augmented_images_and_its_labels_reach_the_loss(taken, crops):
    seen = taken("cutmix")
    images, generator = augmented(crops)
    expected, labels = cutmix(images, PIDS, generator)
    assert torch.equal(seen["images"], expected) and not torch.equal(expected, images)
    assert torch.equal(seen["mixed"].other, labels.other) and torch.equal(seen["mixed"].share, labels.share)


def test_attentive_cutmix_is_guided_by_the_network_in_training(taken, crops):
    seen = taken("a-cutmix")
    images, generator = augmented(crops)
    network = new_network(replace(CONFIG, mix="a-cutmix"), 4)
    network.load_state_dict(seen["before"])
    salience = attention(network, images, PIDS)
    expected, labels = attentive_cutmix(images, PIDS, salience, (3, 2), 1, generator)
    assert torch.equal(seen["images"], expected) and not torch.equal(expected, images)
    assert torch.equal(seen["mixed"].other, labels.other) and torch.equal(seen["mixed"].share, labels.share)


@pytest.mark.parametrize("mix", ["cutout", "cutmix", "a-cutmix", "none"])
def test_what_mixes_on_images_leaves_the_map_of_both_later_stages_as_it_is(taken, mix):
    second, third = (seen := taken(mix))["maps"]
    assert torch.equal(second, third) and not (second == 0).all(dim=1).any()
    assert all(output.cam is None and output.negatives is None for output in seen["outputs"])


def test_dropblock_zeroes_blocks_of_the_map(taken):
    for seen in taken("dropblock")["maps"]:
        assert ((seen == 0).all(dim=1).flatten(1).sum(dim=1) == 6).all(), "one block of 3x2 of each sample"


def test_a_hard_mix_puts_the_negative_s_features_where_the_stage_before_looked(taken):
    seen = taken("a-hard-mix")
    for stage, mixed in zip(seen["outputs"], seen["maps"], strict=False):
        replaced = top_blocks(stage.cam, (3, 2), 1)
        assert (PIDS[stage.negatives] != PIDS).all()
        assert torch.equal(mixed, torch.where(replaced, seen["unmixed"][stage.negatives], seen["unmixed"]))
        assert not torch.equal(mixed, seen["unmixed"])
