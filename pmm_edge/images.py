"""Crops in, network-size arrays out. The one resize that training and every runtime share."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pmm_edge.errors import DataError
from pmm_edge.machine import threads

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
"""What a file may hold, whatever its name says: Pillow reads formats that run other programs, such as EPS."""
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})


_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I")
"""How Pillow opens a grey PNG of 16 bits; which of them is a matter of its version."""


def resize_crop(crop: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    """Resize to (height, width, 3) uint8 RGB with Pillow's antialiased bilinear filter. 16 bits become 8."""
    if crop.mode in _SIXTEEN_BITS:
        # Pillow's own conversion cuts at 255: nearly all of such an image would be white.
        crop = Image.fromarray(np.rint(np.asarray(crop).clip(0, 65535) / 257).astype(np.uint8))
    if crop.mode != "RGB":
        crop = crop.convert("RGB")
    if crop.size != (width, height):
        crop = crop.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(crop)


def read_crop(path: Path, height: int, width: int) -> NDArray[np.uint8]:
    """Decode an image file to (height, width, 3) uint8 RGB.

    Raises:
        DataError: the file is missing, truncated or no image.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return resize_crop(image, height, width)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "it does not exist" if isinstance(error, FileNotFoundError) else str(error)
        raise DataError(f"cannot read image {path}: {reason}", "Replace the file or remove it") from error


def read_crops(paths: Sequence[Path], height: int, width: int) -> NDArray[np.uint8]:
    """Decode image files, at least one, to (N, height, width, 3) uint8 RGB, on threads.

    Raises:
        DataError: a file is missing, truncated or no image; of several such the first.
    """
    with ThreadPoolExecutor(min(threads(), len(paths)), thread_name_prefix="decode") as pool:
        return np.stack(list(pool.map(lambda path: read_crop(path, height, width), paths)))


def evenly(count: int, most: int) -> list[int]:
    """At most so many of 0..count - 1, ascending and at even distances, so that they show different people."""
    kept = min(count, most)
    return [number * count // kept for number in range(kept)]
