"""Crops in, network-size arrays out. The one resize that training and every runtime share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pmm_edge.errors import DataError

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
"""What a file may hold, whatever its name says: Pillow reads formats that run other programs, such as EPS."""
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})


def resize_crop(crop: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    """Resize to (height, width, 3) uint8 RGB with Pillow's antialiased bilinear filter."""
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
