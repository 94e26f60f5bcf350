"""The picture of the mixing shows what the forward pass of training does."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pmm_edge.data.augment import normalize
from pmm_edge.data.dataset import read
from pmm_edge.model import build_model
from pmm_edge.pictures import UnsuitableError
from pmm_edge.pictures.mixing_grid import Mixing, draw_mixing, mixed_batch, mixing_grid
from pmm_edge.spec import InputSpec

CLASSES = np.repeat(np.arange(4), 2)


@pytest.fixture(scope="module")
def crops() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (8, 96, 64, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model("pmm", num_classes=4, backbone="resnet18", height=96, width=64, mix_blocks=1).eval()


@pytest.fixture(scope="module")
def found(network, crops: np.ndarray) -> Mixing:
    return mixed_batch(network, crops, CLASSES, InputSpec(96, 64), seed=3)


def test_the_mixture_is_the_anchor_but_for_the_blocks(found: Mixing, crops: np.ndarray) -> None:
    assert found.masks.sum(axis=(2, 3)).tolist() == [[6] * 8] * 2  # one block of 3x2
    for turn in range(2):
        for row in range(8):
            other = found.negatives[turn, row]
            assert CLASSES[other] != CLASSES[row]
            y, x = np.argwhere(found.masks[turn, row])[0] * 16
            expected = crops[row].copy()
            expected[y : y + 48, x : x + 32] = crops[other, y : y + 48, x : x + 32]
            np.testing.assert_array_equal(found.seen[turn, row], expected)


def test_maps_and_negatives_are_those_of_a_training_step(network, found: Mixing, crops: np.ndarray) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert (mixed_batch(network, crops, CLASSES, InputSpec(96, 64), seed=4).negatives != found.negatives).any()
    assert not network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())

    images, generator = normalize(torch.from_numpy(crops)), torch.Generator().manual_seed(3)
    one, two, _ = network.train()(images, torch.from_numpy(CLASSES), generator=generator)
    network.load_state_dict(before)
    network.eval()
    for turn, stage in enumerate((one, two)):
        np.testing.assert_array_equal(found.negatives[turn], stage.negatives)
        np.testing.assert_allclose(found.cams[turn], stage.cam, rtol=1e-3, atol=1e-5)
        block_sums = found.cams[turn].reshape(8, 2, 3, 2, 2).sum(axis=(2, 4)).reshape(8, 4)
        chosen = found.masks[turn].reshape(8, 2, 3, 2, 2).all(axis=(2, 4)).reshape(8, 4)
        np.testing.assert_array_equal(chosen.argmax(axis=1), block_sums.argmax(axis=1))


def test_a_row_for_each_anchor(found: Mixing, tiny_checkpoint: Path, tiny_dataset: Path) -> None:
    one, three = draw_mixing(found, [0]), draw_mixing(found, [0, 2, 4])
    assert one.width == three.width
    assert three.height > 2 * one.height
    train = read(tiny_dataset).train
    assert mixing_grid(tiny_checkpoint, train, count=2, device="cpu").width == one.width
    with pytest.raises(UnsuitableError, match=r"4 classes.* 3 identities"):
        mixing_grid(tiny_checkpoint, train.select(np.flatnonzero(train.pids != train.pids[0])))


@pytest.mark.parametrize(("method", "mix"), [("pmm", "dropblock"), ("bdb", "a-hard-mix"), ("baseline", "none")])
def test_other_training_has_no_picture_of_mixing(method: str, mix: str, crops: np.ndarray) -> None:
    network = build_model(method, num_classes=4, backbone="resnet10", height=96, width=64, mix=mix)
    with pytest.raises(UnsuitableError):
        mixed_batch(network, crops, CLASSES, InputSpec(96, 64), seed=0)
