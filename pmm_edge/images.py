"""Decode, resize and normalize person crops. Training and every runtime share this code."""

import os
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, UnidentifiedImageError

from pmm_edge.errors import DataError, PmmWarning
from pmm_edge.machine import threads
from pmm_edge.spec import InputSpec

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
"""Image formats to decode, whatever the file name says. Pillow also reads formats that start other programs (EPS)."""
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})

Pixels = NDArray[np.uint8]
Crop = Pixels | Image.Image | str | os.PathLike[str]
"""One crop: an (H, W, 3) uint8 array, an image that Pillow has opened or made, or the path of an image file."""
ColorOrder = Literal["rgb", "bgr"]

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


def try_crop(path: Path, height: int, width: int, content: bytes | None = None) -> Pixels | BadImage:
    """Decode an image file to (height, width, 3) uint8 RGB, turned upright as its EXIF orientation says.

    `content` is that of the file, if it is already in memory. Returns a BadImage if the file is missing, truncated or
    not an image. All files are decoded here.
    """
    try:
        if content is None and path.exists() and not path.is_file():
            return BadImage(path, "it is not a regular file")  # opening a pipe would wait for a writer
        with Image.open(path if content is None else BytesIO(content), formats=IMAGE_FORMATS) as image:
            return resize_crop(_upright(image), height, width)
    except FileNotFoundError:
        return BadImage(path, "it does not exist")
    except UnidentifiedImageError:  # its text repeats the path, or shows an address in memory
        return BadImage(path, f"it is not an image in one of the formats {', '.join(IMAGE_FORMATS)}")
    except Exception as error:  # Pillow's decoders also raise struct.error, IndexError and others on corrupt files
        return BadImage(path, getattr(error, "strerror", None) or str(error) or type(error).__name__)


def _upright(image: Image.Image) -> Image.Image:
    """Convert to RGB and turn upright as the EXIF orientation says."""
    image.load()  # before its EXIF is read, which ignores errors
    try:
        orientation = int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # corrupt metadata does not make the pixels unreadable
        orientation = 1
    upright = _rgb(image)
    return upright.transpose(Image.Transpose(_TURNS[orientation - 2])) if 2 <= orientation <= 8 else upright


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


def prepare_crops(
    crops: Sequence[Crop] | Pixels, height: int, width: int, first: int = 0, order: ColorOrder = "rgb"
) -> Pixels:
    """Check crops and resize them to the input size, on several threads: (N, height, width, 3) uint8 RGB.

    `order` is that of the channels of arrays; other crops have their own. `first` is the index of the first crop, for
    messages. Raises DataError if a crop is empty or cannot be read, or an array is gray, not uint8 or has an alpha
    channel.
    """

    def prepare(crop: Crop, number: int) -> Pixels:
        if isinstance(crop, str | os.PathLike):
            return read_crop(Path(crop), height, width)
        if isinstance(crop, Image.Image):
            try:
                if 0 in crop.size:
                    raise ValueError("it has no pixels")
                return resize_crop(_upright(crop), height, width)
            except Exception as error:  # a file that Pillow has opened is decoded here; see `try_crop`
                name = f"crop {number} {getattr(crop, 'filename', '')}".rstrip()
                raise DataError(f"{name} cannot be read: {error}", "Leave it out") from error
        check_pixels(crop, f"crop {number}")
        # Pillow reverses the channels while it copies them, which costs nothing.
        image = Image.frombytes("RGB", crop.shape[1::-1], crop.tobytes(), "raw", order.upper())
        return resize_crop(image, height, width)

    if isinstance(crops, np.ndarray) and crops.shape[1:3] == (height, width):
        check_pixels(crops[0], f"crop {first}")
        return crops if order == "rgb" else crops[..., ::-1]  # in any memory layout; see `network_input`
    numbers = range(first, first + len(crops))
    if len(crops) == 1:
        return prepare(crops[0], first)[None]
    with ThreadPoolExecutor(min(threads(), len(crops)), thread_name_prefix="resize") as pool:
        return np.stack(list(pool.map(prepare, crops, numbers)))


def cut_boxes(frame: Pixels, boxes: ArrayLike) -> list[Pixels]:
    """Cut boxes, (N, 4) x1 y1 x2 y2 in pixels, out of an (H, W, 3) uint8 frame, without copying: N crops.

    Corners are rounded to whole pixels and clipped to the frame; x2 and y2 are exclusive. Raises DataError with the
    indices of all boxes that are not finite or have no pixel in the frame.
    """
    check_pixels(frame, "frame")
    try:
        corners = np.asarray(boxes, np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"the boxes are not an array of numbers ({error})", "Pass an (N, 4) array") from error
    if not corners.size:
        return []
    if corners.ndim != 2 or corners.shape[1] != 4:
        raise DataError(f"the boxes have shape {corners.shape}, expected (N, 4)", "Pass x1, y1, x2, y2 of each box")
    height, width = frame.shape[:2]
    finite = np.asarray(np.isfinite(corners).all(axis=1))
    x1, y1, x2, y2 = np.rint(np.where(finite[:, None], corners, 0)).clip(0, [width, height] * 2).astype(int).T
    if len(bad := np.flatnonzero(~finite | (x2 <= x1) | (y2 <= y1))):
        which = f"box{'es' * (len(bad) > 1)} {', '.join(map(str, bad))} of {len(corners)}"
        raise DataError(
            f"{which}: no pixels in the frame of {width}x{height}; box {bad[0]} is {corners[bad[0]].tolist()}",
            "Leave them out; a box is x1, y1, x2, y2 in pixels of the frame",
        )
    return [frame[top:bottom, left:right] for left, top, right, bottom in zip(x1, y1, x2, y2, strict=True)]


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


def check_pixels(array: object, name: str) -> None:
    """Raise DataError, which names the array, unless it is (H, W, 3) uint8 with at least one pixel."""
    if not isinstance(array, np.ndarray):
        problem = f"{name} is a {type(array).__name__}, not an array, a PIL image or a path"
        raise DataError(problem, "Pass (height, width, 3) uint8 arrays")
    channels = array.shape[2:]
    for wrong, problem, remedy in (
        (array.ndim == 2 or channels == (1,), "is gray", "Repeat its channel three times"),
        (channels == (4,), "has an alpha channel", f"Pass {name.split()[0]}[:, :, :3]"),
        (channels != (3,), "is not an RGB image", "Pass (height, width, 3) arrays"),
        (0 in array.shape, "has no pixels", "Leave it out"),
        (array.dtype != np.uint8, "is not uint8", "Pass uint8 values of 0 to 255; pmm-edge normalizes"),
    ):
        if wrong:
            raise DataError(f"{name} of shape {array.shape} and type {array.dtype} {problem}", remedy)
