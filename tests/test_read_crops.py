"""Image files become arrays in their order, and a few of many are spread over all."""

from pathlib import Path

import numpy as np
import pytest

from pmm_edge.errors import DataError
from pmm_edge.images import evenly, read_crop, read_crops


def test_a_few_are_spread_over_all() -> None:
    assert evenly(80, 8) == [0, 10, 20, 30, 40, 50, 60, 70]
    assert evenly(5, 3) == [0, 1, 3]
    assert evenly(3, 8) == [0, 1, 2]
    assert evenly(0, 8) == []


def test_crops_come_in_the_order_of_their_files(tiny_dataset: Path, tmp_path: Path) -> None:
    paths = sorted((tiny_dataset / "query").iterdir())[::-1]
    crops = read_crops(paths, 24, 12)
    assert (crops.shape, crops.dtype) == ((12, 24, 12, 3), np.uint8)
    for path, crop in zip(paths, crops, strict=True):
        np.testing.assert_array_equal(crop, read_crop(path, 24, 12))
    with pytest.raises(DataError, match=r"cannot read image .*a\.jpg"):
        read_crops([*paths, tmp_path / "a.jpg", tmp_path / "b.jpg"], 24, 12)
