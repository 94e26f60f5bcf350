import pytest
import torch

from pmm_edge.errors import PmmError
from pmm_edge.model import build_model
from pmm_edge.model.baselines import drop_stripe

PIDS = torch.tensor([0, 0, 1, 1])


def count(method):
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(method, num_classes=751).parameters())


def test_bdb_has_as_many_parameters_as_pmm_but_for_one_classifiers_bias():
    assert count("pmm") - count("bdb") == 751
    assert count("bdb") == pytest.approx(32.28e6, rel=2e-4)


def test_the_baseline_is_stage_one_alone():
    # ResNet-50 without its classifier, a 2048->512 layer, its batch norm, 751 classes.
    assert count("baseline") == 23_508_032 + (2048 * 512 + 512) + 2 * 512 + (512 * 751 + 751)


@pytest.mark.parametrize(("method", "sizes"), [("baseline", [512]), ("bdb", [512, 1024]), ("pmm", [512, 512, 512])])
def test_each_method_trains_and_embeds(method, sizes):
    torch.manual_seed(0)
    network = build_model(method, num_classes=2, backbone="resnet18", height=96, width=64)
    images = torch.randn(4, 3, 96, 64)
    outputs = network.train()(images, PIDS)
    assert [stage.embedding.shape[1] for stage in outputs] == sizes
    sum(stage.logits.sum() + stage.embedding.sum() for stage in outputs).backward()
    assert all(p.grad is not None for p in network.parameters())
    assert network.eval()(images).shape == (4, sum(sizes))
    assert [stop - start for start, stop in network.stages.values()] == sizes


def test_bdb_drops_one_stripe_of_a_third_for_the_whole_batch_anywhere():
    generator, starts = torch.Generator().manual_seed(0), set()
    for _ in range(300):
        dropped = drop_stripe(torch.ones(3, 2, 24, 8), generator) == 0
        assert torch.equal(dropped, dropped[:1, :1].expand_as(dropped))
        rows = torch.where(dropped[0, 0].all(dim=1))[0]
        assert len(rows) == 8 and rows[-1] - rows[0] == 7 and dropped[0, 0].sum() == 8 * 8
        starts.add(int(rows[0]))
    assert starts == set(range(17))


def test_unknown_names_say_what_there_is():
    with pytest.raises(PmmError, match="pmm, bdb, baseline"):
        build_model("pcb", num_classes=2)
    with pytest.raises(PmmError, match="a-hard-mix, dropblock"):
        build_model("pmm", num_classes=2, mix="mixup")
