"""Which images and classes are drawn, and what is refused."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from pmm_edge.errors import DataError, PmmError
from pmm_edge.pictures import UnsuitableError
from pmm_edge.pictures.album import visualize


def test_cams_of_the_true_class_are_of_training_images(
    tiny_checkpoint: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    options = {"what": "cams", "device": "cpu", "out": tmp_path / "pictures", "images": 2}
    album = visualize([tiny_checkpoint] * 2, data=tiny_dataset, true_class=True, **options)
    assert [found.images for _, found in album.overlaps] == [12, 12]
    with Image.open(album.files["cams"]) as image:
        assert image.format == "PNG"
    other = shutil.copytree(tiny_dataset, tmp_path / "other")
    for path in (other / "bounding_box_train").glob("0001*"):
        path.unlink()
    for error, data in ((UnsuitableError, other), (DataError, tiny_dataset / "query")):
        with pytest.raises(error):
            visualize([tiny_checkpoint], data=data, true_class=True, **options)


def test_what_cannot_be_drawn(tiny_checkpoint: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    for what, models, data in (
        ("galleries", [tiny_checkpoint] * 2, tiny_dataset),
        ("galleries", [tiny_checkpoint], tiny_dataset / "query"),
        ("mixing", [tiny_checkpoint], tiny_dataset / "query"),
    ):
        with pytest.raises(UnsuitableError):
            visualize(models, what=what, data=data, out=tmp_path)
    with pytest.raises(PmmError):
        visualize([tiny_checkpoint], data=tiny_dataset, images=101)
    assert not list(tmp_path.iterdir())
