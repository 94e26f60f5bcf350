"""The maps are the network's own Grad-CAM, for every method, at test time; their overlap is known by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pmm_edge.data.augment import normalize
from pmm_edge.images import read_crop
from pmm_edge.model import ReidNetwork, build_model, load_checkpoint
from pmm_edge.model.cama import CAMA
from pmm_edge.model.network import average_pool, max_pool
from pmm_edge.model.pcb import PCB
from pmm_edge.pictures import UnsuitableError
from pmm_edge.pictures.attention import attention_of, overlap, stage_maps
from pmm_edge.runtime.listing import find_images

NAMES = ("I", "II", "III")


def images_of(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 96, 64, generator=torch.Generator().manual_seed(0))


def textbook(network: ReidNetwork, images: torch.Tensor) -> torch.Tensor:
    """Grad-CAM as its authors wrote it: channels weighted by the mean gradient of the predicted class's logit.

    For PCB and CAMA, the gradient is not averaged: it is 0 outside the stripe or the branch.
    """
    maps = []
    if isinstance(network, PCB | CAMA):
        features = network.backbone(images).detach().requires_grad_()
        for part in network.train_stages(features, torch.zeros(3, dtype=torch.long), None, None):
            (gradient,) = torch.autograd.grad(part.logits.max(dim=1).values.sum(), features, retain_graph=True)
            maps.append((gradient * features).sum(dim=1).clamp(min=0).detach())
        return torch.stack(maps, dim=1)
    for number, head in enumerate((*network.average_heads, *network.max_heads)):
        features = network.backbone(images)
        deep = number >= len(network.average_heads)
        features = (network.bottleneck(features) if deep else features).detach().requires_grad_()
        logits = head((max_pool if deep else average_pool)(features))[1]
        (gradient,) = torch.autograd.grad(logits.max(dim=1).values.sum(), features)
        maps.append((gradient.mean(dim=(2, 3), keepdim=True) * features).sum(dim=1).clamp(min=0).detach())
    return torch.stack(maps, dim=1)


@pytest.mark.parametrize(
    ("method", "stages"), [("pmm", 3), ("bdb", 2), ("baseline", 1), ("aos", 1), ("pcb", 6), ("cama", 3)]
)
def test_every_method_gives_the_textbooks_maps_of_its_predicted_classes(method: str, stages: int) -> None:
    torch.manual_seed(1)
    network, images = build_model(method, num_classes=5, backbone="resnet18", height=96, width=64).eval(), images_of(3)
    maps, classes = stage_maps(network, images)
    assert maps.shape == (3, stages, 6, 4)
    assert classes.shape == (3, stages)
    expected = textbook(network, images)
    assert expected.amax(dim=(2, 3)).min() > 0
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-6)

    before = {name: tensor.clone() for name, tensor in network.train().state_dict().items()}
    stage_maps(network, images)
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_files_are_read_as_the_network_is_fed(tiny_checkpoint: Path, tiny_dataset: Path, tiny_onnx: Path) -> None:
    paths = find_images(tiny_dataset).paths[:36]  # more than a batch
    done: list[tuple[int, int]] = []
    found = attention_of(
        tiny_checkpoint, paths, device="cpu", report=lambda what, at, total, detail="": done.append((at, total))
    )
    assert (tuple(found.spec.stages), found.maps.shape) == (NAMES, (36, 3, 6, 4))
    assert done[-1] == (36, 36)
    crops = np.stack([read_crop(path, 96, 64) for path in paths[30:]])
    maps, classes = stage_maps(load_checkpoint(tiny_checkpoint).network(), normalize(torch.from_numpy(crops)))
    np.testing.assert_allclose(found.maps[30:], maps, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found.classes[30:], classes)
    with pytest.raises(UnsuitableError, match=r"model\.onnx is an export"):
        attention_of(tiny_onnx, paths)


def test_equal_maps_overlap_completely_whatever_their_strength() -> None:
    one = np.random.default_rng(0).random((5, 1, 6, 3)).astype(np.float32)
    found = overlap(np.concatenate([one, 7 * one, 0.01 * one], axis=1), NAMES)
    assert (found.images, found.mean, found.empty) == (5, pytest.approx(1), 0)


def test_overlap_by_hand() -> None:
    # Shares 3/4, 1/4, 0, 0 and 1/4, 1/4, 1/2, 0 have 1/4 + 1/4 in common; the second image 1/2, 1/2 and 1, 0: 1/2.
    found = overlap([[[[3, 1], [0, 0]], [[1, 1], [2, 0]]], [[[2, 2], [0, 0]], [[5, 0], [0, 0]]]], NAMES[:2])
    assert found.pairs == {"I-II": pytest.approx(0.5)}
    assert found.chance == pytest.approx((0.75 + 0.5) / 2)  # stage I of one image with stage II of the other
    found = overlap([[[[1, 0]], [[1, 0]], [[0, 1]]]], NAMES)
    assert (found.pairs, found.mean) == ({"I-II": 1, "I-III": 0, "II-III": 0}, pytest.approx(1 / 3))
    assert found.chance is None  # there is no other image


def test_empty_maps_are_counted_and_excluded_and_a_single_stage_has_no_pair() -> None:
    found = overlap([[[[1, 0]], [[0, 0]]], [[[1, 0]], [[1, 0]]]], NAMES[:2])
    assert (found.empty, found.mean) == (1, 1)
    nothing = overlap([[[[1, 0]], [[0, 0]]]], NAMES[:2])
    assert (nothing.mean, nothing.pairs, nothing.empty) == (None, {"I-II": None}, 1)
    found = overlap(np.ones((4, 1, 2, 2), np.float32), ("I",))
    assert (found.images, found.pairs, found.mean, found.chance) == (4, {}, None, None)
