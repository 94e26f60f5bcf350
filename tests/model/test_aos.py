"""Adversarial occlusion: windows, the falls of the probability against loops, draws, mirrored windows."""

import numpy as np
import pytest
import torch

import pmm_edge as pmm
from pmm_edge.data.augment import augment, normalize
from pmm_edge.model.aos import Occlusion, occlusion_epochs, probability_falls, window_corners, window_side


@pytest.mark.parametrize(("height", "width", "count"), [(384, 128, 30), (256, 128, 36), (80, 32, 27), (9, 3, 16)])
def test_windows_of_a_tenth_reach_every_border(height, width, count):
    side, corners = window_side(height, width), window_corners(height, width)
    assert side**2 == pytest.approx(0.1 * height * width, rel=0.5)
    assert len(corners) == len(np.unique(corners, axis=0)) == count
    assert corners.min(axis=0).tolist() == [0, 0]
    assert (corners.max(axis=0) + side).tolist() == [height, width]


def test_the_falls_are_those_of_loops_over_samples_and_windows():
    torch.manual_seed(0)
    network = pmm.build_model("aos", num_classes=3, backbone="resnet10", height=96, width=32).eval()
    images, pids = torch.randn(3, 3, 96, 32), torch.tensor([0, 2, 1])
    falls, side = probability_falls(network, images, pids), window_side(96, 32)

    def probability(image, pid):
        logits = network.stage1.classifier(network(image[None]))[0].tolist()
        return np.exp(logits[pid]) / np.exp(logits).sum()

    with torch.no_grad():
        for sample, (image, pid) in enumerate(zip(images, pids.tolist(), strict=True)):
            for window, (row, column) in enumerate(window_corners(96, 32).tolist()):
                occluded = image.clone()
                for y in range(row, row + side):
                    occluded[:, y, column : column + side] = 0
                expected = max(0.0, probability(image, pid) - probability(occluded, pid))
                assert falls[sample, window].item() == pytest.approx(expected, abs=1e-5)
    assert (falls > 0).any() and (falls == 0).any()


def test_windows_are_drawn_with_probabilities_proportional_to_the_falls():
    occlusion, random = Occlusion(3, 96, 32), np.random.default_rng(0)
    occlusion.falls[1, [2, 5]] = 0.3, 0.1
    indices = np.repeat([0, 1], 4000)
    corners = occlusion.draw(indices, random)
    uniform, drawn = (np.unique(corners[indices == image], axis=0, return_counts=True) for image in (0, 1))
    assert len(uniform[0]) == len(occlusion.corners) and uniform[1].min() > 50
    assert (drawn[0] == occlusion.corners[[2, 5]]).all() and drawn[1][0] / 4000 == pytest.approx(0.75, abs=0.03)
    other = Occlusion(3, 96, 32)
    other.load_state_dict(occlusion.state_dict())
    assert (other.falls == occlusion.falls).all()
    with pytest.raises(ValueError):
        Occlusion(4, 96, 32).load_state_dict(occlusion.state_dict())


def test_a_flipped_image_is_occluded_at_the_mirrored_position():
    crops = torch.randint(1, 255, (200, 24, 12, 3), dtype=torch.uint8)
    corners = torch.tensor([3, 1]).repeat(200, 1)
    images = augment(crops, 5, torch.Generator().manual_seed(0), 1.0, corners)
    plain, seen = normalize(crops), set()
    for image, original in zip(images, plain, strict=True):
        column = int(torch.where((image == 0).all(dim=0))[1].min())
        inside = torch.zeros(24, 12, dtype=torch.bool)
        inside[3:8, column : column + 5] = True
        assert torch.equal(image, (original if column == 1 else original.flip(2)).masked_fill(inside, 0.0))
        seen.add(column)
    assert seen == {1, 12 - 5 - 1}


def test_the_network_is_measured_twice():
    assert [occlusion_epochs(epochs) for epochs in (1, 4, 36, 400)] == [(1, 1), (1, 2), (9, 18), (100, 200)]
