import numpy as np
import pytest
from PIL import Image

from pmm_edge.data.crops import Crops
from pmm_edge.errors import DataError
from pmm_edge.images import read_crop


@pytest.fixture
def paths(tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{number}.jpg" for number in range(7)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (40, 20, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.mark.parametrize("kept", [0, 3, 7])
def test_batches_are_the_decoded_images_whatever_fits_in_memory(paths, kept):
    crops = Crops(paths, 24, 12, cache_bytes=kept * 24 * 12 * 3)
    expected = np.stack([read_crop(path, 24, 12) for path in paths])
    batches = [np.array([5, 0]), np.array([6, 6, 1]), np.array([2, 3, 4])]
    for _ in range(2):
        for indices, batch in zip(batches, crops.prefetched(batches), strict=True):
            np.testing.assert_array_equal(batch, expected[indices])


def test_kept_images_are_decoded_once(paths):
    crops = Crops(paths, 24, 12)
    first = crops.batch(np.arange(7))
    for path in paths:
        path.unlink()
    np.testing.assert_array_equal(crops.batch(np.arange(7)), first)


def test_a_truncated_image_is_named(paths):
    paths[3].write_bytes(paths[3].read_bytes()[:300])
    with pytest.raises(DataError, match=r"cannot read image .*3\.jpg"):
        Crops(paths, 24, 12).batch(np.arange(7))
