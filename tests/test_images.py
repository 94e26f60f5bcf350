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

STORED = {  # how a camera that was turned stores an upright image, by EXIF orientation
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}
UPRIGHT = np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)


def encoded(array: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(file, kind, **options)
    return file.getvalue()


def with_orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied(orientation: int, tmp_path: Path) -> None:
    stored, exif = STORED[orientation](UPRIGHT), with_orientation(orientation)
    for kind in ("PNG", "WEBP"):
        (tmp_path / "a.png").write_bytes(encoded(stored, kind, exif=exif, lossless=True))
        np.testing.assert_array_equal(try_crop(tmp_path / "a.png", 96, 64), UPRIGHT)
    deep = UPRIGHT[..., 0].astype(np.uint16) * 257
    (tmp_path / "deep.png").write_bytes(encoded(STORED[orientation](deep[..., None])[..., 0], exif=exif))
    np.testing.assert_array_equal(try_crop(tmp_path / "deep.png", 96, 64)[..., 1], UPRIGHT[..., 0])


def test_every_reader_turns_a_photograph_upright(tmp_path: Path, tiny_onnx: Path) -> None:
    smooth = np.asarray(Image.fromarray(UPRIGHT[:6, :4]).resize((128, 256)))
    paths = [tmp_path / "upright.jpg", tmp_path / "turned.jpg"]
    paths[0].write_bytes(encoded(smooth, "JPEG", quality=95))
    paths[1].write_bytes(encoded(STORED[6](smooth), "JPEG", quality=95, exif=with_orientation(6)))
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
    """Pillow 10.3 raises struct.error and IndexError at such chunks behind the pixels."""
    path, whole = tmp_path / "a.png", encoded(UPRIGHT)
    files = [encoded(UPRIGHT, kind)[:-2000] for kind in ("PNG", "JPEG", "WEBP", "BMP")] + [b"", b"text", whole[:40]]
    for kind, content in ((b"gAMA", b"\0"), (b"cHRM", b"\0"), (b"tRNS", b"\0"), (b"iCCP", b""), (b"iCCP", b"\0")):
        chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        path.write_bytes(whole[:-12] + chunk + whole[-12:])
        assert isinstance(try_crop(path, 96, 64), BadImage | np.ndarray)
    assert isinstance(try_crop(path, 96, 64), BadImage)  # iCCP: with every Pillow
    for content in files:
        path.write_bytes(content)
        bad = try_crop(path, 96, 64)
        assert isinstance(bad, BadImage) and bad.path == path and bad.reason
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
