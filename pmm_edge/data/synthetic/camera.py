"""Who looks: what a camera does to a picture, and how its pictures come out of a detector."""

from __future__ import annotations

import functools
import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

HEADINGS = (0.0, 180.0, 90.0, 270.0, 35.0, 215.0, 140.0, 320.0, 65.0)
"""Mean walking direction in front of each camera, in degrees; 0 comes towards it."""


@dataclass(frozen=True)
class Camera:
    """A viewpoint and a sensor; the same for every image that it takes."""

    number: int
    heading: float
    pitch: float
    """How far it looks down, in degrees."""
    horizon: float
    light: float
    cast: tuple[float, float, float]
    """Factors on red, green and blue."""
    exposure: float
    contrast: float
    saturation: float
    haze: float
    blur: float
    """Radius at an image height of 128, in pixels."""
    noise: float
    quality: int


@functools.lru_cache(maxsize=64)
def make_camera(seed: int, number: int) -> Camera:
    """Camera `number` (from 1) of the data set `seed`. Neighbouring numbers differ in cast and exposure."""
    rng = np.random.default_rng((seed, 4, number))
    hue = 2 * math.pi * (0.1 * rng.random() + 0.382 * number)
    strength = float(rng.uniform(0.06, 0.17))
    red, green, blue = (1 + strength * math.cos(hue - k * 2 * math.pi / 3) for k in range(3))
    return Camera(
        number=number,
        heading=HEADINGS[number - 1],
        pitch=float(rng.uniform(3, 24)),
        horizon=float(rng.uniform(0.28, 0.5)),
        light=float(rng.choice((-1.0, 1.0))),
        cast=(red, green, blue),
        exposure=(0.72, 1.15, 0.88, 1.02, 0.8, 1.25)[(number * 5 + seed) % 6],
        contrast=float(rng.uniform(0.8, 1.15)),
        saturation=float(rng.uniform(0.65, 1.15)),
        haze=float(rng.uniform(0, 0.12)),
        blur=float(rng.uniform(0.0, 0.8)),
        noise=float(rng.uniform(1.5, 5)),
        quality=int(rng.integers(60, 92)),
    )


def expose(camera: Camera, scene: Image.Image, rng: np.random.Generator) -> Image.Image:
    """What the sensor makes of a scene: blur, colour cast, exposure, contrast, haze and noise.

    Exposure and cast drift from image to image, as daylight and automatic white balance do.
    """
    radius = camera.blur * float(rng.uniform(0.6, 1.4)) * scene.height / 128
    if radius > 0.15:
        scene = scene.filter(ImageFilter.GaussianBlur(radius))
    drift, brighter, sideways = rng.normal(0, 0.05, 3), rng.normal(0, 0.14), rng.normal(0, 0.12)
    gain = np.asarray(camera.cast) * np.exp(drift) * camera.exposure * math.exp(brighter)
    pixels = np.array(scene, np.float32)
    pixels /= 255
    grey = pixels.mean(axis=2, keepdims=True)
    pixels += (camera.saturation - 1) * (pixels - grey)
    pixels *= gain.astype(np.float32)
    pixels += (camera.contrast - 1) * (pixels - 0.5)
    pixels += camera.haze * (1 - pixels)
    pixels *= np.linspace(1 - sideways, 1 + sideways, scene.width, dtype=np.float32)[None, :, None]
    pixels += rng.normal(0, camera.noise / 255, (*pixels.shape[:2], 1)).astype(np.float32)
    return Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8))


def encode(camera: Camera, image: Image.Image) -> bytes:
    """Compress to JPEG at the camera's quality."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=camera.quality)
    return buffer.getvalue()
