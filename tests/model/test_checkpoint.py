"""Weights from files: ours, torchvision's, and those of the paper's authors."""

from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision

import pmm_edge as pmm
from pmm_edge.errors import ModelError, PmmError
from pmm_edge.model import load_checkpoint, save_checkpoint
from pmm_edge.model.checkpoint import _OUR_NAMES, imagenet_weights, load_any_weights, load_pretrained


def network(seed=0):
    torch.manual_seed(seed)
    return pmm.build_model("pmm", num_classes=4, backbone="resnet18", height=96, width=64)


def assert_same(one, other):
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_torchvision_weights_load_completely_or_are_refused(tmp_path):
    source, model = torchvision.models.resnet18().state_dict(), network()
    for weights in (source, [1, 2], {"conv1.weight": 3}):
        torch.save(weights, tmp_path / "weights.pth")
        if weights is source:
            load_pretrained(model, "resnet18", tmp_path / "weights.pth")
        else:
            with pytest.raises(ModelError):
                load_pretrained(model, "resnet18", tmp_path / "weights.pth")
    assert_same(model.backbone.state_dict(), {name: source[name] for name in source if not name.startswith("fc.")})


def test_imagenet_weights_without_a_network_name_the_place_for_the_file(monkeypatch):
    def unreachable(*arguments, **options):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(PmmError) as caught:
        imagenet_weights("resnet50")
    assert ".pth into" in caught.value.remedy and "--backbone-weights none" in caught.value.remedy
    with pytest.raises(PmmError) as caught:
        imagenet_weights("resnet10")
    assert "resnet10" in caught.value.problem and "--backbone-weights none" in caught.value.remedy


@pytest.fixture(scope="module")
def released():
    """A network, and its state dict as the authors' code would have saved it."""
    source = network()
    theirs = {ours: name for name, ours in _OUR_NAMES.items()}
    tensors = {}
    for name, tensor in source.state_dict().items():
        prefix = max((ours for ours in theirs if name.startswith(ours)), key=len)
        value = tensor[:, :, None, None] if name == "stage1.linear.weight" else tensor
        tensors["module." + theirs[prefix] + name.removeprefix(prefix)] = value
    return source, tensors


@pytest.mark.parametrize("form", ["file", "content", "state dict"])
def test_a_released_checkpoint_loads_in_every_form(released, tmp_path, form):
    source, tensors = released
    content = {"state_dict": tensors, "rank1": np.float64(0.94), "epoch": 400}
    path = tmp_path / "model_best.pth.tar"
    torch.save(content, path)
    other = network(seed=1)
    pmm.load_released_checkpoint(other, {"file": path, "content": content, "state dict": tensors}[form])
    assert_same(source.state_dict(), other.state_dict())
    assert_same(source.state_dict(), load_any_weights(path))


@pytest.mark.parametrize("content", [{"global_softmax.weight": torch.zeros(9, 512)}, {"a": torch.zeros(1)}, {"b": 2}])
def test_a_released_checkpoint_that_does_not_fit_is_refused(content):
    with pytest.raises(ModelError):
        pmm.load_released_checkpoint(network(), content)


def test_a_checkpoint_survives_its_file(tiny_checkpoint, tmp_path):
    checkpoint = load_checkpoint(tiny_checkpoint)
    checkpoint.training["epoch"] = 3
    save_checkpoint(tmp_path / "copy.pt", checkpoint)
    copy = load_checkpoint(tmp_path / "copy.pt")
    assert (copy.spec, copy.training) == (checkpoint.spec, {"epoch": 3})
    assert_same(copy.weights, checkpoint.weights)
    assert_same(copy.network().state_dict(), checkpoint.weights)
    assert_same(load_any_weights(tmp_path / "copy.pt"), checkpoint.weights)


@pytest.mark.parametrize("damage", ["missing", "truncated", "code", "version"])
def test_a_file_that_is_not_a_checkpoint_of_ours_is_refused(tiny_checkpoint, tmp_path, damage):
    path = tmp_path / "broken.pt"
    if damage == "truncated":
        path.write_bytes(tiny_checkpoint.read_bytes()[:100_000])
    elif damage == "code":
        torch.save(network, path)
    elif damage == "version":
        torch.save({**torch.load(tiny_checkpoint, weights_only=True), "format": "pmm-edge checkpoint 9"}, path)
    with pytest.raises(ModelError) as caught:
        load_checkpoint(path)
    assert str(path) in caught.value.problem


def test_weights_that_do_not_fit_the_spec_are_refused(tiny_checkpoint):
    checkpoint = load_checkpoint(tiny_checkpoint)
    del checkpoint.weights["stage1.bn.bias"]
    with pytest.raises(ModelError):
        checkpoint.network()
