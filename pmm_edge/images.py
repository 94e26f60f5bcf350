"""Decode, resize and normalize person crops. Training and every runtime share this code."""

import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pmm_edge.errors import DataError, PmmWarning
from pmm_edge.machine import threads
from pmm_edge.spec import InputSpec

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
"""Image formats to decode, whatever the file name says. Pillow also reads formats that start other programs (EPS)."""
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})

Pixels = NDArray[np.uint8]

_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I")  # modes of a 16-bit gray PNG in different versions of Pillow
_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = (0, 3, 1, 5, 4, 6, 2)  # the Image.Transpose that turns an image of orientation 2 to 8 upright


@dataclass(frozen=True)
class BadImage:
    """An image file that cannot be decoded."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"cannot read image {self.path}: {self.reason}"

    def error(self, remedy: str = "Replace the file or remove it") -> DataError:
        """The error to raise where the image cannot be skipped."""
        return DataError(str(self), remedy)


IN_FIGURES = "Replace it: without a query or a gallery image, the retrieval figures would be those of another data set"
"""Why an evaluation does not skip an unreadable image; it never opens junk."""


def resize_crop(crop: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    """Resize to (height, width, 3) uint8 RGB with Pillow's antialiased bilinear filter; 16-bit images become 8-bit."""
    crop = _rgb(crop)
    return np.asarray(crop if crop.size == (width, height) else crop.resize((width, height), Image.Resampling.BILINEAR))


def _rgb(crop: Image.Image) -> Image.Image:
    if crop.mode in _SIXTEEN_BITS:
        # Pillow's own conversion clips at 255, which would make nearly the whole image white.
        crop = Image.fromarray(np.rint(np.asarray(crop).clip(0, 65535) / 257).astype(np.uint8))
    return crop if crop.mode == "RGB" else crop.convert("RGB")


def try_crop(path: Path, height: int, width: int) -> Pixels | BadImage:
    """Decode an image file to (height, width, 3) uint8 RGB, turned upright as its EXIF orientation says.

    Returns a BadImage if the file is missing, truncated or no image. All files are decoded here.
    """
    try:
        if path.exists() and not path.is_file():
            return BadImage(path, "it is not a regular file")  # opening a pipe would wait for a writer
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            image.load()  # before its EXIF is read, which ignores errors
            upright = _rgb(image)
            if 2 <= (orientation := _orientation(image)) <= 8:
                upright = upright.transpose(Image.Transpose(_TURNS[orientation - 2]))
            return resize_crop(upright, height, width)
    except Exception as error:  # Pillow's decoders also raise struct.error, IndexError and others on corrupt files
        reason = "it does not exist" if isinstance(error, FileNotFoundError) else str(error) or type(error).__name__
        return BadImage(path, reason)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # corrupt metadata does not make the pixels unreadable
        return 1


def read_crop(path: Path, height: int, width: int) -> Pixels:
    """Decode an image file as `try_crop` does; raise DataError if it cannot be read."""
    crop = try_crop(path, height, width)
    if isinstance(crop, BadImage):
        raise crop.error()
    return crop


def read_crops(paths: Sequence[Path], height: int, width: int) -> Pixels:
    """Read one or more crops on several threads: (N, height, width, 3). An error names the first wrong file."""
    with ThreadPoolExecutor(min(threads(), len(paths)), thread_name_prefix="decode") as pool:
        return np.stack(list(pool.map(lambda path: read_crop(path, height, width), paths)))


def readable_crops(paths: Sequence[Path], height: int, width: int, use: str) -> tuple[Pixels, list[int]]:
    """Read crops as `read_crops` does, but skip unreadable ones, each with a warning that `use` skips it.

    Returns (N, height, width, 3) uint8 RGB and the N indices of their paths; raises DataError if none can be read.
    """
    with ThreadPoolExecutor(threads(), thread_name_prefix="decode") as pool:
        found = list(pool.map(lambda path: try_crop(path, height, width), paths))
    bad = [crop for crop in found if isinstance(crop, BadImage)]
    if len(bad) == len(found):
        raise bad[0].error(f"Replace the files: {use} has no readable image")
    warn_skipped(bad, use)
    crops = {row: crop for row, crop in enumerate(found) if not isinstance(crop, BadImage)}
    return np.stack(list(crops.values())), list(crops)


def warn_skipped(bad: Iterable[BadImage], use: str) -> None:
    """Warn of each image that `use`, such as calibration, skips."""
    for image in bad:
        warnings.warn(f"{image}; {use} skips it", PmmWarning, stacklevel=3)


def evenly(count: int, most: int) -> list[int]:
    """At most `most` evenly spaced indices of range(count), ascending."""
    kept = min(count, most)
    return [number * count // kept for number in range(kept)]


def prepare_crops(crops: Sequence[Pixels] | Pixels, height: int, width: int, first: int = 0) -> Pixels:
    """Check crops, (H, W, 3) uint8 RGB arrays of any size or one (N, H, W, 3) array, and resize them to the input size.

    `first` is the index of the first crop, for messages. Returns (N, height, width, 3) uint8 RGB. Raises DataError if a
    crop is empty, gray, not uint8, or has an alpha channel.
    """
    for number, crop in enumerate(crops, start=first):
        _check_crop(crop, number)
    if isinstance(crops, np.ndarray) and crops.shape[1:3] == (height, width):
        return crops  # in any memory layout; see `network_input`
    return np.stack([resize_crop(Image.fromarray(crop), height, width) for crop in crops])


def network_input(images: Pixels, spec: InputSpec) -> NDArray[np.uint8] | NDArray[np.float32]:
    """Convert (N, height, width, 3) uint8 RGB of network size to the input form of the network; see `InputSpec`."""
    if spec.form == "uint8":
        return np.ascontiguousarray(images)  # engines do not take negative strides
    planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)
    return planes if spec.form == "raw" else normalize(planes, spec)


def normalize(planes: NDArray[np.float32], spec: InputSpec) -> NDArray[np.float32]:
    """(N, 3, H, W) float32 in 0..255, scaled to 0..1, minus `spec.mean`, divided by `spec.std`."""
    mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (spec.mean, spec.std))
    return (planes / np.float32(255) - mean) / std


def _check_crop(crop: object, number: int) -> None:
    if not isinstance(crop, np.ndarray):
        remedy = "Pass (height, width, 3) uint8 RGB arrays; use pmm_edge.embed_files for files"
        raise DataError(f"crop {number} is a {type(crop).__name__}, not an array", remedy)
    channels = crop.shape[2:]
    for wrong, problem, remedy in (
        (crop.ndim == 2 or channels == (1,), "is gray", "Repeat its channel three times"),
        (channels == (4,), "has an alpha channel", "Pass crop[:, :, :3]"),
        (channels != (3,), "is no RGB image", "Pass a list of (height, width, 3) arrays"),
        (0 in crop.shape, "has no pixels", "Leave out boxes outside the frame"),
        (crop.dtype != np.uint8, "is not uint8", "Pass uint8 RGB values of 0 to 255; pmm-edge normalizes"),
    ):
        if wrong:
            raise DataError(f"crop {number} of shape {crop.shape} and type {crop.dtype} {problem}", remedy)
