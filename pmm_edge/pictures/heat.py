"""A map of attention over a photograph: colour says where, the photograph stays recognisable."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_STOPS = (0.0, 0.25, 0.5, 0.75, 1.0)
_COLOURS = np.array([(30, 10, 70), (120, 28, 109), (206, 66, 58), (250, 153, 20), (252, 246, 130)], dtype=np.float64)
"""Dark violet, red, orange, light yellow: lightness rises all the way, so it reads without colour as well."""
_STRONGEST = 0.72
"""Opacity of the colour where the map is highest."""


def overlay(photo: Image.Image, cam: NDArray[np.float32]) -> Image.Image:
    """Lay a map over a photograph turned grey. The map's own maximum is the brightest colour.

    Args:
        cam: (h, w), not negative; spread smoothly over the photograph. A map of nothing but 0 colours nothing.
    """
    peak = float(cam.max())
    small = Image.fromarray((cam / peak if peak > 0 else cam).astype(np.float32))  # mode F
    heat = np.asarray(small.resize(photo.size, Image.Resampling.BILINEAR), dtype=np.float64)
    colour = np.stack([np.interp(heat, _STOPS, channel) for channel in _COLOURS.T], axis=2)
    opacity = _STRONGEST * np.sqrt(heat)[..., None]
    grey = np.asarray(photo.convert("L"), dtype=np.float64)[..., None]
    mixed = (1 - opacity) * grey + opacity * colour
    return Image.fromarray(mixed.round().astype(np.uint8))
