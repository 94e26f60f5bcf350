"""PMM and the networks it is compared with: sizes, outputs, gradients."""

import pytest
import torch

import pmm_edge as pmm
from pmm_edge.errors import PmmError
from pmm_edge.model.network import drop_stripe

PIDS = torch.tensor([0, 0, 1, 1])


def parameters(method):
    with torch.device("meta"):
        return sum(p.numel() for p in pmm.build_model(method, num_classes=751).parameters())


def test_the_papers_networks_have_their_parameters():
    assert parameters("pmm") == pytest.approx(32.28e6, rel=2e-4)
    assert parameters("pmm") - parameters("bdb") == 751, "the layers of PMM except one bias"
    # ResNet-50 without its classifier, a layer 2048 -> 512, its batch norm, 751 classes.
    assert parameters("baseline") == 23_508_032 + (2048 * 512 + 512) + 2 * 512 + (512 * 751 + 751)


@pytest.mark.parametrize(("method", "sizes"), [("baseline", [512]), ("bdb", [512, 1024]), ("pmm", [512, 512, 512])])
def test_a_step_gives_an_output_per_stage_and_a_gradient_everywhere(method, sizes):
    torch.manual_seed(0)
    network = pmm.build_model(method, num_classes=2, backbone="resnet18", height=96, width=64)
    images = torch.randn(4, 3, 96, 64)
    outputs = network.train()(images, PIDS)
    assert [stage.embedding.shape for stage in outputs] == [(4, size) for size in sizes]
    assert [stage.logits.shape for stage in outputs] == [(4, 2)] * len(sizes)
    assert [stage.cam is not None for stage in outputs] == [method == "pmm"] * (len(sizes) - 1) + [False]
    loss, parts = pmm.pmm_loss(outputs, PIDS)
    assert len(parts) == 2 * len(sizes) and torch.allclose(loss, sum(parts.values()))
    loss.backward()
    assert all(p.grad is not None for p in network.parameters())
    assert [stop - start for start, stop in network.stages.values()] == sizes

    with torch.inference_mode():
        together = network.eval()(images)
        alone = torch.cat([network(image[None]) for image in images])
    assert together.shape == (4, sum(sizes)) and together.dtype == torch.float32
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_given_negatives_repeat_a_step_and_training_mode_needs_identities():
    torch.manual_seed(0)
    small = pmm.build_model("pmm", num_classes=4, backbone="resnet18", height=96, width=64)
    images = torch.randn(4, 3, 96, 64)
    drawn = small.train()(images, PIDS, generator=torch.Generator().manual_seed(1))
    again = small(images, PIDS, negatives=(drawn[0].negatives, drawn[1].negatives))
    for one, other in zip(drawn, again, strict=True):
        assert torch.equal(one.embedding, other.embedding)
    with pytest.raises(PmmError):
        small(images)


@pytest.mark.parametrize(
    ("arguments", "choices"),
    [
        ({"method": "mgn"}, "pmm, bdb, pcb"),
        ({"mix": "mixup"}, "a-hard-mix, dropblock"),
        ({"backbone": "vgg"}, "resnet10, resnet18"),
        ({"height": 192, "width": 64, "mix_blocks": 8}, "1 to 7"),
        ({"height": 48, "width": 32}, "smaller blocks"),
    ],
)
def test_a_wrong_argument_is_refused_with_the_choices(arguments, choices):
    with pytest.raises(PmmError) as caught:
        pmm.build_model(num_classes=4, **arguments)
    assert choices in caught.value.remedy


def test_bdb_drops_one_stripe_of_a_third_for_the_whole_batch_at_any_height():
    generator, starts = torch.Generator().manual_seed(0), set()
    for _ in range(300):
        dropped = drop_stripe(torch.ones(3, 2, 24, 8), generator) == 0
        assert torch.equal(dropped, dropped[:1, :1].expand_as(dropped))
        rows = torch.where(dropped[0, 0].all(dim=1))[0]
        assert len(rows) == 8 and rows[-1] - rows[0] == 7 and dropped[0, 0].sum() == 8 * 8
        starts.add(int(rows[0]))
    assert starts == set(range(17))
