from urllib.error import URLError

import pytest
import torch

from pmm_edge.errors import PmmError
from pmm_edge.model.backbone import Backbone, imagenet_weights, load_backbone_weights


def test_torchvision_weights_load_whole(tmp_path):
    import torchvision

    torch.manual_seed(0)
    source = torchvision.models.resnet18().state_dict()
    backbone = Backbone("resnet18")
    load_backbone_weights(backbone, source)
    own = backbone.state_dict()
    assert set(source) - set(own) == {"fc.weight", "fc.bias"}
    assert all(torch.equal(own[name], source[name]) for name in own)


def test_weights_of_another_backbone_are_refused():
    import torchvision

    with pytest.raises(PmmError, match="do not fit the backbone"):
        load_backbone_weights(Backbone("resnet34"), torchvision.models.resnet18().state_dict())


def test_offline_says_what_to_do_and_never_starts_from_scratch(monkeypatch):
    def unreachable(*arguments, **options):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(PmmError, match=r"cannot be downloaded.*resnet50.*\.pth.*--backbone-weights none"):
        imagenet_weights("resnet50")
