import numpy as np
import pytest
import torch

from pmm_edge.data.augment import augment, normalize
from pmm_edge.spec import IMAGENET_MEAN, IMAGENET_STD


@pytest.fixture
def crops():
    return torch.randint(0, 256, (400, 24, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_normalize_is_the_imagenet_formula(crops):
    images = normalize(crops)
    expected = (crops.numpy() / 255.0 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    np.testing.assert_allclose(images.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-6)


def test_half_are_flipped_and_half_have_a_square_erased(crops):
    plain = normalize(crops)
    images = augment(crops, erase_size=8, generator=torch.Generator().manual_seed(1))
    erased = (images == 0).all(dim=1)
    sizes = erased.flatten(1).sum(dim=1)
    assert set(sizes.tolist()) == {0, 64}
    assert 150 < (sizes > 0).sum() < 250
    flipped = 0
    for image, mask, original in zip(images, erased, plain, strict=True):
        rows, columns = torch.where(mask)
        if len(rows):
            assert rows.max() - rows.min() == 7 and columns.max() - columns.min() == 7
        is_flipped = torch.equal(image[:, ~mask], original.flip(2)[:, ~mask])
        assert is_flipped or torch.equal(image[:, ~mask], original[:, ~mask])
        flipped += is_flipped
    assert 150 < flipped < 250


def test_the_square_reaches_every_border(crops):
    erased = (augment(crops, 8, torch.Generator().manual_seed(2)) == 0).all(dim=1).any(dim=0)
    assert erased[0].any() and erased[-1].any() and erased[:, 0].any() and erased[:, -1].any()


def test_a_size_of_zero_erases_nothing(crops):
    images = augment(crops, 0, torch.Generator().manual_seed(2))
    assert not (images == 0).all(dim=1).any()
