import pytest
import torch

import pmm_edge as pmm
from pmm_edge.errors import ModelError, PmmError
from pmm_edge.model.backbone import Backbone


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_paper_network_has_its_parameters_and_map():
    with torch.device("meta"):
        model = pmm.build_model("pmm", num_classes=751, backbone="resnet50")
        assert parameters(model) == pytest.approx(32.28e6, rel=2e-4)
        assert model.backbone(torch.empty(2, 3, 384, 128)).shape == (2, 2048, 24, 8)


@pytest.mark.parametrize(("backbone", "channels"), [("resnet18", 512), ("resnet34", 512), ("resnet101", 2048)])
def test_other_backbones(backbone, channels):
    with torch.device("meta"):
        assert Backbone(backbone)(torch.empty(1, 3, 192, 64)).shape == (1, channels, 12, 4)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return pmm.build_model("pmm", num_classes=4, backbone="resnet18", height=96, width=64)


def test_training_step_gives_three_stages_and_a_gradient_everywhere(small):
    images, pids = torch.randn(8, 3, 96, 64), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    outputs = small.train()(images, pids)
    assert [stage.embedding.shape for stage in outputs] == [(8, 512)] * 3
    assert [stage.logits.shape for stage in outputs] == [(8, 4)] * 3
    assert [stage.cam is not None for stage in outputs] == [True, True, False]
    loss, parts = pmm.pmm_loss(outputs, pids)
    assert torch.allclose(loss, sum(parts.values()))
    loss.backward()
    assert all(p.grad is not None for p in small.parameters())


def test_fixed_negatives_and_a_seeded_generator_repeat_a_step(small):
    images, pids = torch.randn(4, 3, 96, 64), torch.tensor([0, 0, 1, 1])
    drawn = small.train()(images, pids, generator=torch.Generator().manual_seed(1))
    negatives = (drawn[0].negatives, drawn[1].negatives)
    again = small(images, pids, negatives=negatives)
    for one, other in zip(drawn, again, strict=True):
        assert torch.equal(one.embedding, other.embedding)


def test_the_embedding_of_an_image_does_not_depend_on_its_batch(small):
    images = torch.randn(4, 3, 96, 64)
    with torch.inference_mode():
        together = small.eval()(images)
        alone = torch.cat([small(image[None]) for image in images])
    assert together.shape == (4, 1536)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_wrong_use_is_one_clear_line(small):
    with pytest.raises(PmmError, match="identities"):
        small.train()(torch.randn(2, 3, 96, 64))
    with pytest.raises(PmmError, match="resnet18, resnet34"):
        pmm.build_model("pmm", num_classes=4, backbone="vgg")
    with pytest.raises(PmmError, match="from 1 to 7"):
        pmm.build_model("pmm", num_classes=4, height=192, width=64, mix_blocks=8)


def test_a_released_checkpoint_of_another_size_says_so(small):
    weights = {"global_softmax.weight": torch.zeros(9, 512)}
    with pytest.raises(ModelError, match="does not fit"):
        pmm.load_released_checkpoint(small, weights)
    with pytest.raises(ModelError, match="'layer9' is no tensor"):
        pmm.load_released_checkpoint(small, {"layer9": torch.zeros(1)})


def test_a_released_file_loads_with_dataparallel_names_and_numpy_scalars(tmp_path):
    import numpy as np

    from pmm_edge.model.checkpoint import _OURS

    torch.manual_seed(0)
    model = pmm.build_model("pmm", num_classes=4, backbone="resnet18", height=96, width=64)
    theirs = {ours: released for released, ours in _OURS.items()}
    released = {}
    for name, tensor in model.state_dict().items():
        prefix = max((ours for ours in theirs if name.startswith(ours)), key=len)
        value = tensor[:, :, None, None] if name == "stage1.linear.weight" else tensor
        released["module." + theirs[prefix] + name.removeprefix(prefix)] = value
    path = tmp_path / "model_best.pth.tar"
    torch.save({"state_dict": released, "rank1": np.float64(0.94), "epoch": 400}, path)
    other = pmm.build_model("pmm", num_classes=4, backbone="resnet18", height=96, width=64)
    pmm.load_released_checkpoint(other, path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
