"""One function decodes every file: EXIF orientation, corrupt files, and what is skipped with a warning."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pmm_edge.data.loader import Crops
from pmm_edge.errors import DataError, PmmWarning
from pmm_edge.images import BadImage, read_crops, readable_crops, try_crop
from pmm_edge.runtime import embed_files, load

UPRIGHT = np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)
TURNED = [(0, 1, 1), (0, 1, -1), (0, -1, -1), (0, -1, 1), (1, 1, 1), (1, -1, 1), (1, -1, -1), (1, 1, -1)]
"""For EXIF orientations 1 to 8, whether the stored image has its axes swapped, and the order of rows and columns."""


def stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    swapped, rows, columns = TURNED[orientation - 1]
    return (upright.swapaxes(0, 1) if swapped else upright)[::rows, ::columns]


def encoded(array: np.ndarray, kind: str = "PNG", orientation: int = 1, **options: object) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(array)).save(file, kind, **{"exif": exif, **options})
    return file.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, tmp_path: Path) -> None:
    path, deep = tmp_path / "a.png", UPRIGHT[..., 0].astype(np.uint16) * 257
    for kind in ("PNG", "WEBP"):
        path.write_bytes(encoded(stored(UPRIGHT, orientation), kind, orientation, lossless=True))
        np.testing.assert_array_equal(try_crop(path, 96, 64), UPRIGHT)
    path.write_bytes(encoded(stored(deep, orientation), orientation=orientation))
    np.testing.assert_array_equal(try_crop(path, 96, 64)[..., 1], UPRIGHT[..., 0])


def test_every_reader_turns_a_photograph_upright(tmp_path: Path, tiny_onnx: Path) -> None:
    smooth, paths = np.asarray(Image.fromarray(UPRIGHT[:6, :4]).resize((128, 256))), []
    for orientation in (1, 6):
        paths.append(tmp_path / f"{orientation}.jpg")
        paths[-1].write_bytes(encoded(stored(smooth, orientation), "JPEG", orientation, quality=95))
    crops = Crops(paths, 96, 64).batch(np.arange(2))
    assert np.abs(crops[0].astype(int) - crops[1]).mean() < 2
    np.testing.assert_array_equal(read_crops(paths, 96, 64), crops)
    embedder = load(tiny_onnx, "cpu")
    np.testing.assert_array_equal(embed_files(embedder, paths).embeddings, embedder.embed_prepared(crops))


def test_corrupt_exif_does_not_matter(tmp_path: Path) -> None:
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02"):
        (tmp_path / "a.png").write_bytes(encoded(UPRIGHT, exif=exif))
        np.testing.assert_array_equal(try_crop(tmp_path / "a.png", 96, 64), UPRIGHT)


def test_corrupt_files_are_bad_images(tmp_path: Path) -> None:
    path, whole = tmp_path / "a.png", encoded(UPRIGHT)
    files = [encoded(UPRIGHT, kind)[:-2000] for kind in ("PNG", "JPEG", "WEBP", "BMP")] + [b"", b"text", whole[:40]]
    for kind, content in ((b"gAMA", b"\0"), (b"cHRM", b"\0"), (b"tRNS", b"\0"), (b"iCCP", b""), (b"iCCP", b"\0")):
        chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        files.append(whole[:-12] + chunk + whole[-12:])  # at which Pillow raises struct.error or IndexError
    for content in files:
        path.write_bytes(content)
        bad = try_crop(path, 96, 64)
        assert isinstance(bad, BadImage) and bad.path == path and bad.reason and str(path) not in bad.reason
        inside = try_crop(path, 96, 64, content)  # of a tar file
        assert isinstance(inside, BadImage) and inside.reason == bad.reason
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("pipe.png", "", "missing.png"):
        assert isinstance(try_crop(tmp_path / name, 96, 64), BadImage)


def test_unreadable_images_are_skipped_and_named(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path in (paths[0], paths[2]):
        path.write_bytes(encoded(UPRIGHT))
    with pytest.warns(PmmWarning, match=r"1\.png: it does not exist; calibration skips it"):
        crops, rows = readable_crops(paths, 24, 12, "calibration")
    assert (crops.shape, rows) == ((2, 24, 12, 3), [0, 2])
    with pytest.raises(DataError, match=r"1\.png"):
        readable_crops(paths[1:2], 24, 12, "calibration")
