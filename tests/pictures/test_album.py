"""Which images are drawn, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from pmm_edge.errors import DataError, PmmError, PmmWarning
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


def test_unreadable_images_are_skipped_and_named(tiny_checkpoint: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(tiny_dataset, tmp_path / "data"))
    bad = [sorted((root / folder).iterdir())[2] for folder in ("query", "bounding_box_test", "bounding_box_train")]
    for path in bad:
        path.write_bytes(b"")
    with pytest.warns(PmmWarning) as warned:
        album = visualize(tiny_checkpoint, data=root, images=12, device="cpu", out=tmp_path / "out")
    assert len(album.files) == 3 and album.overlap and album.overlap.images == 11
    for path in bad:
        assert any(str(path) in str(warning.message) for warning in warned)
    for path in (root / "query").iterdir():
        path.write_bytes(b"")
    for what in ("cams", "galleries"):
        with pytest.raises(DataError):
            visualize(tiny_checkpoint, what=what, data=root, device="cpu", out=tmp_path / "out")


def test_what_cannot_be_drawn(tiny_checkpoint: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    for what in ("galleries", "mixing"):
        with pytest.raises(UnsuitableError):
            visualize(tiny_checkpoint, what=what, data=tiny_dataset / "query", out=tmp_path)
    with pytest.raises(PmmError):
        visualize(tiny_checkpoint, data=tiny_dataset, images=101)
    assert not list(tmp_path.iterdir())
