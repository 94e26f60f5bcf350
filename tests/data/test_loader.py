"""Decoded crops and their cache, replacements of unreadable images, and the P x K sampler."""

import numpy as np
import pytest
from PIL import Image

from pmm_edge.data.loader import Crops, identity_batches
from pmm_edge.errors import DataError
from pmm_edge.images import read_crop


@pytest.fixture
def paths(tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{number}.jpg" for number in range(7)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (40, 20, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.mark.parametrize("cached", [0, 3, 7])
def test_batches_are_the_decoded_images_whatever_the_cache_holds(paths, cached):
    crops = Crops(paths, 24, 12, cache_bytes=cached * 24 * 12 * 3, workers=3)
    expected = np.stack([read_crop(path, 24, 12) for path in paths])
    batches = [np.array([5, 0]), np.array([6, 6, 1]), np.array([2, 3, 4])]
    for _ in range(2):
        for indices, batch in zip(batches, crops.prefetched(batches), strict=True):
            np.testing.assert_array_equal(batch, expected[indices])
    assert (crops.cached_bytes, crops.all_bytes) == (cached * 24 * 12 * 3, 7 * 24 * 12 * 3)


def test_cached_images_are_decoded_once(paths):
    crops = Crops(paths, 24, 12)
    first = crops.batch(np.arange(7))
    for path in paths:
        path.unlink()
    np.testing.assert_array_equal(crops.batch(np.arange(7)), first)
    with pytest.raises(DataError, match=r"3\.jpg"):
        Crops(paths, 24, 12).batch(np.arange(3, 7))


def test_an_unreadable_image_is_replaced_by_the_next_of_its_identity(paths):
    pids = np.array([1, 1, 1, 2, 2, 2, 3])
    for index in (2, 3, 4, 6):
        paths[index].write_bytes(b"")
    crops = Crops(paths, 24, 12, workers=1, pids=pids)
    np.testing.assert_array_equal(crops.batch(np.array([2, 3])), crops.batch(np.array([0, 5])))
    found = crops.take_unreadable()
    assert [index for index, _ in found] == [2, 3, 4] and crops.take_unreadable() == []
    messages = crops.count_unreadable([*found, found[0]], limit=3)  # two processes may find the same
    assert ["2.jpg" in messages[0], "3.jpg" in messages[1], len(messages)] == [True, True, 3]
    assert crops.count_unreadable(found, limit=3) == []
    with pytest.raises(DataError, match=r"identity 3 .*6\.jpg"):
        crops.batch(np.array([6]))
    with pytest.raises(DataError, match=r"6\.jpg") as error:
        crops.count_unreadable(crops.take_unreadable(), limit=3)
    assert "--max-bad-images" in error.value.remedy


def test_an_epoch_draws_every_identity_once_with_its_own_images():
    pids = np.repeat(np.arange(10), [4, 9, 2, 6, 4, 4, 7, 1, 5, 8])
    batches = identity_batches(pids, identities=4, images=4, generator=np.random.default_rng(0))
    assert [len(batch) for batch in batches] == [16, 16, 8]
    groups = np.concatenate(batches).reshape(-1, 4)
    assert sorted(pids[groups[:, 0]]) == list(range(10))
    assert (pids[groups] == pids[groups[:, :1]]).all()
    for group in groups:
        assert len(np.unique(group)) == min(4, (pids == pids[group[0]]).sum())
    assert [len(batch) for batch in identity_batches(pids, 3, 4, np.random.default_rng(0))] == [12] * 3  # one is left


def test_the_generator_decides_the_epoch():
    pids = np.repeat(np.arange(8), 6)
    one, same, other = (np.concatenate(identity_batches(pids, 4, 4, np.random.default_rng(seed))) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    # Runs are reproduced from their seed, so its draws must not change between versions.
    few = np.concatenate(identity_batches(np.repeat(np.arange(8), 3), 4, 4, np.random.default_rng(1)))
    assert few[:12].tolist() == [17, 16, 15, 15, 1, 0, 2, 1, 4, 3, 5, 3]
