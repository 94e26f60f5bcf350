"""Decode, resize and normalize person crops. Training and every runtime share this code."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pmm_edge.errors import DataError
from pmm_edge.machine import threads
from pmm_edge.spec import InputSpec

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
"""Image formats to decode, whatever the file name says. Pillow also reads formats that start other programs (EPS)."""
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})

Pixels = NDArray[np.uint8]

_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I")  # modes of a 16-bit gray PNG in different versions of Pillow


def resize_crop(crop: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    """Resize to (height, width, 3) uint8 RGB with Pillow's antialiased bilinear filter; 16-bit images become 8-bit."""
    if crop.mode in _SIXTEEN_BITS:
        # Pillow's own conversion clips at 255, which would make nearly the whole image white.
        crop = Image.fromarray(np.rint(np.asarray(crop).clip(0, 65535) / 257).astype(np.uint8))
    if crop.mode != "RGB":
        crop = crop.convert("RGB")
    if crop.size != (width, height):
        crop = crop.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(crop)


def read_crop(path: Path, height: int, width: int) -> NDArray[np.uint8]:
    """Decode an image file to (height, width, 3) uint8 RGB; raise DataError if it is missing, truncated or no image."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return resize_crop(image, height, width)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "it does not exist" if isinstance(error, FileNotFoundError) else str(error)
        raise DataError(f"cannot read image {path}: {reason}", "Replace the file or remove it") from error


def read_crops(paths: Sequence[Path], height: int, width: int) -> NDArray[np.uint8]:
    """Read one or more crops on several threads: (N, height, width, 3). An error names the first wrong file."""
    with ThreadPoolExecutor(min(threads(), len(paths)), thread_name_prefix="decode") as pool:
        return np.stack(list(pool.map(lambda path: read_crop(path, height, width), paths)))


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
        return crops
    return np.stack([resize_crop(Image.fromarray(crop), height, width) for crop in crops])


def network_input(images: Pixels, spec: InputSpec) -> NDArray[np.uint8] | NDArray[np.float32]:
    """Convert (N, height, width, 3) uint8 RGB of network size to the input form of the network; see `InputSpec`."""
    if spec.form == "uint8":
        return images
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
