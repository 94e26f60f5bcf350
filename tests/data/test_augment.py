import numpy as np
import pytest
import torch

from pmm_edge.data.augment import augment, augment_at_once, augment_one_by_one, normalize
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


def erased_slowly(crop, row, column, size):
    """CutOut from its definition: normalised, and 0 inside of a square."""
    height, width, _ = crop.shape
    image = np.empty((3, height, width))
    for channel, y, x in np.ndindex(image.shape):
        inside = row <= y < row + size and column <= x < column + size
        value = (crop[y, x, channel] / 255 - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
        image[channel, y, x] = 0 if inside else value
    return image


@pytest.mark.parametrize("way", [augment_one_by_one, augment_at_once])
def test_with_a_probability_of_one_every_image_loses_one_square_and_nothing_else(crops, monkeypatch, way):
    monkeypatch.setattr("pmm_edge.data.augment.augment_one_by_one", way)
    size, crops = 5, crops[:40]
    images = augment(crops, size, torch.Generator().manual_seed(1), erase_probability=1.0)
    for image, crop in zip(images.numpy(), crops.numpy(), strict=True):
        rows, columns = np.nonzero((image == 0).all(axis=0))
        assert len(rows) == size * size
        either = [erased_slowly(seen, rows.min(), columns.min(), size) for seen in (crop, crop[:, ::-1])]
        assert any(np.allclose(image, expected, atol=1e-6) for expected in either)


def test_the_square_reaches_every_border(crops):
    erased = (augment(crops, 8, torch.Generator().manual_seed(2)) == 0).all(dim=1).any(dim=0)
    assert erased[0].any() and erased[-1].any() and erased[:, 0].any() and erased[:, -1].any()


def test_a_size_of_zero_erases_nothing(crops):
    images = augment(crops, 0, torch.Generator().manual_seed(2))
    assert not (images == 0).all(dim=1).any()


@pytest.mark.parametrize(("height", "width", "size"), [(24, 12, 8), (33, 17, 5), (8, 8, 8), (24, 12, 0)])
def test_one_image_after_the_other_gives_the_bits_of_the_whole_batch_at_once(height, width, size):
    draw = torch.Generator().manual_seed(3)
    crops = torch.randint(0, 256, (64, height, width, 3), dtype=torch.uint8, generator=draw)
    flipped, erased = torch.rand(2, 64, generator=draw) < 0.5
    rows = torch.randint(0, height - size + 1, (64,), generator=draw)
    columns = torch.randint(0, width - size + 1, (64,), generator=draw)
    one_by_one, at_once = (
        way(crops, flipped, erased, rows, columns, size) for way in (augment_one_by_one, augment_at_once)
    )
    assert torch.equal(one_by_one, at_once) and one_by_one.stride() == at_once.stride()
    scale, shift = (1 / (255 * torch.tensor(IMAGENET_STD))), torch.tensor(IMAGENET_MEAN) / torch.tensor(IMAGENET_STD)
    assert torch.equal(normalize(crops), (crops.float() * scale - shift).permute(0, 3, 1, 2))
