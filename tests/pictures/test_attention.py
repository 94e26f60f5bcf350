"""The maps are the network's own Grad-CAM, for every method, at test time."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pmm_edge.data.augment import normalize
from pmm_edge.images import read_crop
from pmm_edge.model import ReidNetwork, build_model, load_checkpoint
from pmm_edge.model.network import average_pool, max_pool
from pmm_edge.pictures.attention import (
    UnsuitableError,
    attention_of,
    checkpoint_with_heads,
    stage_maps,
    training_classes,
)
from pmm_edge.runtime.embed_files import find_images
from pmm_edge.trainer.step import class_indices

STAGES = {"pmm": 3, "bdb": 2, "baseline": 1}


def network_of(method: str) -> ReidNetwork:
    torch.manual_seed(1)
    return build_model(method, num_classes=5, backbone="resnet18", height=96, width=64).eval()


def images_of(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 96, 64, generator=torch.Generator().manual_seed(0))


def textbook(network: ReidNetwork, images: torch.Tensor) -> torch.Tensor:
    """Grad-CAM as its authors wrote it: channels weighted by the mean gradient of the predicted class's logit."""
    maps = []
    for number, head in enumerate((*network.average_heads, *network.max_heads)):
        features = network.backbone(images)
        deep = number >= len(network.average_heads)
        features = (network.bottleneck(features) if deep else features).detach().requires_grad_()
        logits = head((max_pool if deep else average_pool)(features))[1]
        (gradient,) = torch.autograd.grad(logits.max(dim=1).values.sum(), features)
        maps.append((gradient.mean(dim=(2, 3), keepdim=True) * features).sum(dim=1).clamp(min=0).detach())
    return torch.stack(maps, dim=1)


@pytest.mark.parametrize("method", STAGES)
def test_every_method_gives_the_textbooks_maps_of_its_predicted_classes(method: str) -> None:
    network, images = network_of(method), images_of(3)
    maps, classes = stage_maps(network, images)
    assert maps.shape == (3, STAGES[method], 6, 4)
    assert classes.shape == (3, STAGES[method])
    expected = textbook(network, images)
    assert expected.amax(dim=(2, 3)).min() > 0
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-6)


def test_of_the_true_class_stage_one_is_what_training_uses() -> None:
    network, images, pids = network_of("pmm"), images_of(4), torch.tensor([0, 1, 4, 2])
    maps, classes = stage_maps(network, images, pids)
    assert torch.equal(maps[:, 0], network.attention(images, pids))
    assert torch.equal(classes, pids[:, None].expand(4, 3))


def test_the_network_is_left_as_it_was() -> None:
    network = network_of("pmm").train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    stage_maps(network, images_of(2))
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_files_are_read_as_the_network_is_fed(tiny_checkpoint: Path, tiny_dataset: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    paths = find_images(tiny_dataset).paths[:36]  # more than a batch
    done: list[tuple[int, int]] = []
    found = attention_of(
        checkpoint, paths, device="cpu", report=lambda what, at, total, detail="": done.append((at, total))
    )
    assert (found.stages, found.maps.shape) == (("I", "II", "III"), (36, 3, 6, 4))
    assert done[-1] == (36, 36)
    crops = np.stack([read_crop(path, 96, 64) for path in paths[30:]])
    maps, classes = stage_maps(checkpoint.network(), normalize(torch.from_numpy(crops)))
    np.testing.assert_allclose(found.maps[30:], maps, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found[np.arange(30, 36)].classes, classes)


def test_an_export_has_no_classifiers(tiny_onnx: Path) -> None:
    with pytest.raises(UnsuitableError, match=r"model\.onnx is an export"):
        checkpoint_with_heads(tiny_onnx)


def test_classes_are_numbered_as_training_numbers_them(tiny_checkpoint: Path, tiny_dataset: Path) -> None:
    from dataclasses import replace

    from pmm_edge.data.dataset import read

    spec, train = load_checkpoint(tiny_checkpoint).spec, read(tiny_dataset).train
    train = replace(train, pids=np.where(train.pids == 2, 77, train.pids))
    with_junk = replace(train, pids=np.where(np.arange(12) % 6 == 0, -1, train.pids))
    for split in (train, with_junk):
        used, expected = class_indices(split)
        classes = training_classes(split.pids, spec, "tiny")
        np.testing.assert_array_equal(np.flatnonzero(classes >= 0), used)
        np.testing.assert_array_equal(classes[used], expected)
    with pytest.raises(UnsuitableError, match=r"4 classes.* 3 identities"):
        training_classes(train.pids[train.pids != 1], spec, "tiny")
