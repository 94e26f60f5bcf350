import numpy as np
import pytest
import torch

from pmm_edge.data.augment import augment, augment_batch, augment_each, normalize
from pmm_edge.spec import IMAGENET_MEAN, IMAGENET_STD


@pytest.fixture
def crops():
    return torch.randint(0, 256, (400, 24, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_normalize_is_the_imagenet_formula(crops):
    expected = (crops.numpy() / 255.0 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    np.testing.assert_allclose(normalize(crops).numpy(), expected.transpose(0, 3, 1, 2), atol=1e-6)
    planes, floats = crops.permute(0, 3, 1, 2).contiguous(), crops.float()
    assert torch.equal(normalize(planes.permute(0, 2, 3, 1)), normalize(crops))  # of any strides
    assert torch.equal(normalize(floats), normalize(crops)) and torch.equal(floats, crops.float())
    assert normalize(crops[:0]).shape == (0, 3, 24, 12)


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
    reached = erased.any(dim=0)  # the square reaches every border
    assert reached[0].any() and reached[-1].any() and reached[:, 0].any() and reached[:, -1].any()


def slow_augment(crop, flip, erase, row, column, size):
    """The definition, pixel by pixel."""
    height, width, _ = crop.shape
    image = np.empty((3, height, width))
    for channel, y, x in np.ndindex(image.shape):
        inside = row <= y < row + size and column <= x < column + size
        value = (crop[y, width - 1 - x if flip else x, channel] / 255 - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
        image[channel, y, x] = 0 if inside and erase else value
    return image


@pytest.mark.parametrize(("height", "width", "size"), [(24, 12, 8), (33, 17, 5), (8, 8, 8), (24, 12, 0)])
def test_each_image_and_the_whole_batch_give_the_same_bits(height, width, size):
    draw = torch.Generator().manual_seed(3)
    crops = torch.randint(0, 256, (64, height, width, 3), dtype=torch.uint8, generator=draw)
    flipped, erased = torch.rand(2, 64, generator=draw) < 0.5
    rows = torch.randint(0, height - size + 1, (64,), generator=draw)
    columns = torch.randint(0, width - size + 1, (64,), generator=draw)
    draws = (flipped, erased, rows, columns)
    each, batch = (way(crops, *draws, size) for way in (augment_each, augment_batch))
    assert torch.equal(each, batch) and each.stride() == batch.stride()
    for number in range(4):
        expected = slow_augment(crops[number].numpy(), *(values[number].item() for values in draws), size)
        np.testing.assert_allclose(each[number].numpy(), expected, atol=1e-6)
    std = torch.tensor(IMAGENET_STD)
    table = (crops.float() * (1 / (255 * std)) - torch.tensor(IMAGENET_MEAN) / std).permute(0, 3, 1, 2)
    assert torch.equal(normalize(crops), table)
