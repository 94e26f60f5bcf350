"""PCB and refined part pooling: their sizes, loops over samples, parts and positions, the phases of a training."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import pmm_edge as pmm
from pmm_edge.model.network import StageOutput
from pmm_edge.model.pcb import pcb_loss, refinement_epochs, stripes

PIDS = torch.tensor([0, 0, 1, 1])


def pcb(rpp=False, refined=False, height=96):
    torch.manual_seed(0)
    network = pmm.build_model("pcb", num_classes=3, backbone="resnet18", height=height, width=64, rpp=rpp)
    for norm in [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]:
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.normal_(norm.bias, 0, 0.2)
    network.refined = refined
    return network.eval()


def parameters(**options):
    with torch.device("meta"):
        return sum(p.numel() for p in pmm.build_model("pcb", num_classes=751, **options).parameters())


def test_parameters_and_map_are_the_papers():
    # ResNet-50, a shared 1x1 convolution 2048 -> 256 with batch norm, six classifiers of 751 identities.
    expected = 23_508_032 + 2048 * 256 + 2 * 256 + 6 * (256 * 751 + 751)
    assert parameters() == expected and parameters(rpp=True) == expected + 2048 * 6
    with torch.device("meta"):
        network = pmm.build_model("pcb", num_classes=751).eval()
        features = network.backbone(torch.empty(2, 3, 384, 128))
        assert features.shape == (2, 2048, 24, 8) and network.part_vectors(features).shape == (2, 2048, 6, 1)
        assert network.embed(features).shape == (2, 1536)


def test_stripes_are_equal_where_six_divides_the_map_and_cover_every_row_elsewhere():
    assert stripes(24) == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20), (20, 24)]
    for rows in range(1, 40):
        covered = {row for start, stop in stripes(rows) for row in range(start, stop)}
        assert covered == set(range(rows)) and all(start < stop for start, stop in stripes(rows))
        one = torch.arange(rows, dtype=torch.float)[None, None]
        expected = [one[0, 0, start:stop].mean() for start, stop in stripes(rows)]
        torch.testing.assert_close(F.adaptive_avg_pool1d(one, 6)[0, 0], torch.stack(expected))


@pytest.mark.parametrize(("refined", "height"), [(False, 96), (False, 80), (True, 96)])
def test_the_embedding_is_that_of_loops_over_samples_parts_and_positions(refined, height):
    network = pcb(rpp=refined, refined=refined, height=height).double()
    images = torch.randn(3, 3, height, 64).double()
    with torch.inference_mode():
        actual, features = network(images), network.backbone(images)
        rows = []
        for sample in features:
            parts = []
            for part, (start, stop) in enumerate(stripes(sample.shape[1])):
                total, weight_sum = torch.zeros(len(sample)).double(), 0.0
                for y in range(sample.shape[1]):
                    for x in range(sample.shape[2]):
                        weight = float(start <= y < stop)
                        if refined:
                            scores = network.part_classifier.weight[:, :, 0, 0] @ sample[:, y, x]
                            weight = (scores[part].exp() / scores.exp().sum()).item()
                        total, weight_sum = total + weight * sample[:, y, x], weight_sum + weight
                vector = total / (sample[0].numel() / 6 if refined else weight_sum)
                reduced, bn = network.head.reduction.weight[:, :, 0, 0] @ vector, network.head.bn
                scaled = (reduced - bn.running_mean) / (bn.running_var + bn.eps).sqrt() * bn.weight + bn.bias
                parts.append(scaled.clamp(min=0))
            rows.append(torch.cat(parts))
    torch.testing.assert_close(actual, torch.stack(rows).float(), rtol=1e-5, atol=1e-5)


def test_the_loss_is_the_sum_of_the_parts_cross_entropy_without_smoothing():
    logits = [torch.randn(4, 3, requires_grad=True) for _ in range(6)]
    loss, parts = pcb_loss([StageOutput(torch.zeros(4, 256), each) for each in logits], PIDS)
    expected = sum(-each.log_softmax(1)[row, pid] / 4 for each in logits for row, pid in enumerate(PIDS.tolist()))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert list(parts) == [f"identity_{number}" for number in range(1, 7)]


def test_a_step_gives_six_parts_and_each_phase_trains_what_it_should():
    network = pcb(rpp=True).train()
    images = torch.randn(4, 3, 96, 64)
    for phase in (0, 1, 2):
        network.start_phase(phase)
        network.zero_grad()
        outputs = network(images, PIDS)
        assert [part.embedding.shape for part in outputs] == [(4, 256)] * 6
        pcb_loss(outputs, PIDS)[0].backward()
        moved = {name for name, p in network.named_parameters() if p.grad is not None}
        every = {name for name, _ in network.named_parameters()}
        part = {"part_classifier.weight"}
        assert moved == [every - part, part, every][phase]
    other = pcb(rpp=True)
    other.load_state_dict(network.state_dict())
    assert other.refined


def test_the_phases_share_the_epochs():
    assert [refinement_epochs(epochs) for epochs in (3, 8, 80, 400)] == [(1, 2), (6, 7), (60, 70), (300, 350)]
