"""Cameras and what they see around a person: backgrounds, occluders, colors, noise and compression."""

import functools
import io
import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from pmm_edge.data.synthetic.person import CLOTH, VIVID, one_of, palette

# Mean walking direction in front of each camera, in degrees; 0 walks towards it.
HEADINGS = (0.0, 180.0, 90.0, 270.0, 35.0, 215.0, 140.0, 320.0, 65.0)
HEIGHT, WIDTH = 512, 2048  # of a panorama
PLACES = {  # two colors of the ground and two of the wall
    "street": palette("68686c 84807a aa7860 c4baa8"),
    "park": palette("607e3e a8946c 3c5c30 56703a"),
    "plaza": palette("bab0a0 aa826c d6d0c4 788c9e"),
    "hall": palette("ceccc6 7c746e e2ded0 96acb4"),
    "market": palette("96928c 76706c cec4b4 6e6058"),
    "car park": palette("4e4e52 606268 92989c 606858"),
}


class Camera(NamedTuple):
    """Viewpoint and sensor, the same for all images of a camera."""

    heading: float
    pitch: float  # degrees that it looks down
    horizon: float  # where the ground meets the wall, as a fraction of the height
    light: float
    cast: list[float]  # factors on red, green and blue
    exposure: float
    sensor: list[float]  # contrast, saturation, haze, blur in pixels at an image height of 128, noise
    quality: int


@functools.lru_cache(maxsize=64)
def make_camera(seed: int, number: int) -> Camera:
    """Create camera `number` (from 1) of the data set `seed`. Neighboring numbers differ in cast and exposure."""
    rng = np.random.default_rng((seed, 4, number))
    hue = 2 * math.pi * (0.1 * rng.random() + 0.382 * number)
    strength, pitch, horizon = rng.uniform((0.06, 3, 0.28), (0.17, 24, 0.5)).tolist()
    light = float(rng.choice((-1.0, 1.0)))
    cast = [1 + strength * math.cos(hue - k * 2 * math.pi / 3) for k in range(3)]
    exposure = (0.72, 1.15, 0.88, 1.02, 0.8, 1.25)[(number * 5 + seed) % 6]
    sensor = rng.uniform((0.8, 0.65, 0, 0, 1.5), (1.15, 1.15, 0.12, 0.8, 5)).tolist()
    return Camera(HEADINGS[number - 1], pitch, horizon, light, cast, exposure, sensor, int(rng.integers(60, 92)))


def photograph(camera: Camera, scene: Image.Image, rng: np.random.Generator, noise_rng: np.random.Generator) -> bytes:
    """Apply blur, cast, exposure, contrast, haze and noise, and compress to JPEG. Exposure and cast drift a little."""
    contrast, saturation, haze, blur, noise = camera.sensor
    radius = blur * float(rng.uniform(0.6, 1.4)) * scene.height / 128
    if radius > 0.15:
        scene = scene.filter(ImageFilter.GaussianBlur(radius))
    drift, brighter, sideways = rng.normal(0, 0.05, 3), rng.normal(0, 0.14), rng.normal(0, 0.12)
    gain = np.asarray(camera.cast) * np.exp(drift) * camera.exposure * math.exp(brighter)
    pixels = np.array(scene, np.float32) / np.float32(255)
    pixels += (saturation - 1) * (pixels - pixels.mean(axis=2, keepdims=True))
    pixels *= gain.astype(np.float32)
    pixels += (contrast - 1) * (pixels - 0.5)
    pixels += haze * (1 - pixels)
    pixels *= np.linspace(1 - sideways, 1 + sideways, scene.width, dtype=np.float32)[None, :, None]
    pixels += noise_rng.normal(0, noise / 255, (*pixels.shape[:2], 1)).astype(np.float32)
    buffer = io.BytesIO()
    Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8)).save(buffer, "JPEG", quality=camera.quality)
    return buffer.getvalue()


def background(
    seed: int, camera: int, horizon: float, size: tuple[int, int], rng: np.random.Generator, moved: float = 0.0
) -> Image.Image:
    """Cut a random part of the camera's panorama, `moved` by a fraction of its width, resized to `size` (w, h)."""
    height = HEIGHT * float(rng.uniform(0.72, 1.0))
    width = min(height * size[0] / size[1], WIDTH)
    x, y = float(rng.uniform(0, WIDTH - width)), float(rng.uniform(0, HEIGHT - height))
    x = min(max(x - moved * width, 0.0), WIDTH - width)
    # The nearest pixel is good enough: the panorama is blurred, and the scene is averaged down later.
    box = x, y, x + width, y + height
    return _panorama(seed, camera, horizon).resize(size, Image.Resampling.NEAREST, box=box)


@functools.lru_cache(maxsize=16)
def _panorama(seed: int, camera: int, horizon: float) -> Image.Image:
    """Paint the background of a camera."""
    rng = np.random.default_rng((seed, 3, camera))
    kind = list(PLACES)[(camera - 1 + seed) % len(PLACES)]
    ground, wall = PLACES[kind][int(rng.integers(2))], PLACES[kind][2 + int(rng.integers(2))]
    image = Image.new("RGB", (WIDTH, HEIGHT), ground)
    draw = ImageDraw.Draw(image, "RGBA")
    line = round(horizon * HEIGHT)
    draw.rectangle((0, 0, WIDTH, line), fill=wall)
    _ground(draw, rng, kind, line)
    x = 0.0
    while x < WIDTH:
        width = float(rng.uniform(60, 200))
        _fixture(draw, rng, kind, x, width, line)
        x += width + float(rng.uniform(10, 70))
    # Uneven light and dirt; otherwise each flat area would fall into one bin of a histogram.
    strength = 8.0 if kind == "park" else 5.0
    total = np.zeros((HEIGHT, WIDTH), np.float32)
    for scale, cell in ((strength, 4), (2.0 * strength, 64)):
        grain = rng.normal(0, scale, (HEIGHT // cell, WIDTH // cell)).astype(np.float32)
        total += np.asarray(Image.fromarray(grain).resize((WIDTH, HEIGHT)))
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(2.0))) + total[..., None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _ground(draw: ImageDraw.ImageDraw, rng: np.random.Generator, kind: str, line: int) -> None:
    """Tiles, a road with a curb, or grass."""
    if kind in ("plaza", "hall", "market"):
        for k in range(1, 9):  # rows of tiles get closer towards the horizon
            row = line + (HEIGHT - line) * (k / 9) ** 1.6
            draw.line((0, row, WIDTH, row), fill=(0, 0, 0, 60), width=2 + k // 3)
        for joint in range(0, WIDTH, 110):
            draw.line((joint, line, joint + (joint % 220) - 55, HEIGHT), fill=(0, 0, 0, 50), width=3)
    elif kind in ("street", "car park"):
        curb = line + (HEIGHT - line) * float(rng.uniform(0.1, 0.4))
        draw.rectangle((0, line, WIDTH, curb), fill=(170, 168, 160, 255))
        draw.line((0, curb, WIDTH, curb), fill=(60, 60, 60, 255), width=6)
        top, bottom = HEIGHT - 70, HEIGHT - 40
        for dash in range(0, WIDTH, 260):
            mark = [(dash, top), (dash + 120, top), (dash + 90, bottom), (dash - 30, bottom)]
            draw.polygon(mark, fill=(232, 228, 200, 220))
    else:
        for _ in range(60):
            x, y, r = rng.uniform((0, line, 20), (WIDTH, HEIGHT, 120)).tolist()
            draw.ellipse((x - r, y - r / 5, x + r, y + r / 5), fill=(50, 80, 30, 60))


def _fixture(draw: ImageDraw.ImageDraw, rng: np.random.Generator, kind: str, x: float, width: float, line: int) -> None:
    """One object along the wall: a tree, a stall, a parked car, a window, or a door or poster."""
    tint = one_of(CLOTH, rng)
    end, top = x + width, line * float(rng.uniform(0.05, 0.35))
    choice = float(rng.random())
    if kind == "park":
        trunk = x + width / 2
        draw.rectangle((trunk - 10, 0, trunk + 10, line + 20), fill=(84, 62, 44))
        for _ in range(5):
            cx, cy, r = trunk + rng.normal(0, 45), line * rng.uniform(0, 0.8), rng.uniform(30, 70)
            green = int(rng.integers(60, 130))
            draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=(green // 2, green, green // 3))
    elif kind in ("market", "plaza") and choice < 0.6:
        draw.rectangle((x, top, end, line), fill=(58, 62, 70))
        draw.rectangle((x - 8, top, end + 8, top + line * 0.2), fill=tint)
        for _ in range(8):
            bx, by = rng.uniform(x, end - 20), rng.uniform(top + line * 0.3, line - 12)
            draw.rectangle((bx, by, bx + rng.uniform(12, 40), by + 24), fill=one_of(VIVID, rng))
    elif kind in ("car park", "street") and choice < 0.45:
        base = line + 36
        draw.rounded_rectangle((x, base - 60, x + 230, base), radius=20, fill=tint)
        draw.rounded_rectangle((x + 45, base - 104, x + 180, base - 50), radius=24, fill=(50, 58, 66))
        for wheel in (x + 50, x + 180):
            draw.ellipse((wheel - 24, base - 24, wheel + 24, base + 24), fill=(22, 22, 24))
    elif choice < 0.75:
        draw.rectangle((x, top, end, line * 0.75), fill=(70, 88, 108), outline=(230, 226, 216), width=7)
        draw.polygon([(x, line * 0.7), (x + width * 0.5, top), (end, top)], fill=(200, 220, 236, 70))
    else:
        draw.rectangle((x, top, x + width * 0.7, line), fill=tint)


def occlude(draw: ImageDraw.ImageDraw, width: int, height: int, rng: np.random.Generator) -> None:
    """Paint a post, a railing or a box in front of the person; at least a third of the body stays visible."""
    color, kind = one_of(CLOTH, rng), int(rng.integers(3))
    if kind == 0:
        x, half = rng.uniform(0.1, 0.9) * width, rng.uniform(0.03, 0.08) * width
        draw.rectangle((x - half, 0, x + half, height), fill=color)
        draw.rectangle((x, 0, x + half, height), fill=(0, 0, 0, 60))
    elif kind == 1:
        for y in (rng.uniform(0.5, 0.62) * height, rng.uniform(0.7, 0.85) * height):
            draw.rectangle((0, y, width, y + 0.028 * height), fill=color)
    else:
        x, top = rng.uniform(-0.3, 0.6) * width, rng.uniform(0.66, 0.82) * height
        draw.rectangle((x, top, x + rng.uniform(0.4, 0.8) * width, height), fill=color)
        draw.rectangle((x, top, x + 0.8 * width, top + 0.02 * height), fill=(255, 255, 255, 50))
