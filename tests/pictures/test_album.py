"""Which images are drawn, and what is refused."""

import json
from pathlib import Path

import pytest
from PIL import Image

from pmm_edge.errors import PmmError
from pmm_edge.pictures import UnsuitableError
from pmm_edge.pictures.album import visualize


def test_cams_of_the_queries_or_of_all_images(tiny_checkpoint: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    for number, (data, count) in enumerate(((tiny_dataset, 12), (tiny_dataset / "bounding_box_test", 12))):
        out = tmp_path / str(number)
        album = visualize(tiny_checkpoint, what="cams", data=data, images=2, device="cpu", out=out)
        assert album.overlap
        assert album.overlap.images == count
        assert json.loads((out / "overlap.json").read_text())["pairs"] == album.overlap.pairs
        with Image.open(album.files["cams"]) as image:
            assert image.format == "PNG"


def test_what_cannot_be_drawn(tiny_checkpoint: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    for what in ("galleries", "mixing"):
        with pytest.raises(UnsuitableError):
            visualize(tiny_checkpoint, what=what, data=tiny_dataset / "query", out=tmp_path)
    with pytest.raises(PmmError):
        visualize(tiny_checkpoint, data=tiny_dataset, images=101)
    assert not list(tmp_path.iterdir())
