"""Pictures inside the page: thumbnails of the data set's images, and PNG pictures that others made."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

from PIL import Image

from pmm_edge.images import IMAGE_FORMATS

_HEIGHT = 144
_WIDTH = 216
_LARGEST = 50_000_000
_PNG = b"\x89PNG\r\n\x1a\n"


def thumbnail(path: str, folder: Path) -> tuple[str, int, int] | None:
    """A small JPEG of an image as a data URI, its width and height; None where there is none to show.

    A report may come from somebody else: only images inside of the data set's folder are opened, whatever it names.
    """
    inside = Path(os.path.abspath(folder))  # noqa: PTH100  resolve() would follow links, which data sets are made of
    file = Path(os.path.abspath(path))  # noqa: PTH100
    if not file.is_relative_to(inside) or not file.is_file():
        return None
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > _LARGEST:
                return None
            image.draft("RGB", (2 * _WIDTH, 2 * _HEIGHT))
            small = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    small.thumbnail((_WIDTH, _HEIGHT))
    bytes_ = io.BytesIO()
    small.save(bytes_, "JPEG", quality=80, optimize=True)
    return _data_uri("jpeg", bytes_.getvalue()), small.width, small.height


def png(picture: Image.Image | bytes) -> str:
    """A picture, or the bytes of a PNG file, as a data URI.

    Raises:
        ValueError: the bytes are those of no PNG file.
    """
    if isinstance(picture, bytes):
        if not picture.startswith(_PNG):
            raise ValueError("a picture's bytes are those of no PNG file")
        return _data_uri("png", picture)
    bytes_ = io.BytesIO()
    picture.save(bytes_, "PNG", optimize=True)
    return _data_uri("png", bytes_.getvalue())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
