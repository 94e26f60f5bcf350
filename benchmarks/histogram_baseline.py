"""How far color alone goes: Rank-1 and mAP of three histogram matchers on a data set.

    python benchmarks/histogram_baseline.py DATA [--json]

A data set on which a histogram does well does not need a network. `joint` is one 8 × 8 × 8 RGB histogram of the
whole image; `striped` is a 16 × 4 × 4 HSV histogram of each of six horizontal stripes, the classical hand-made
reID descriptor (Gray and Tao, ECCV 2008, without the texture); `corrected` is `striped` of the middle half of
the image, where the person is, after each color channel was equalized against the camera's cast and exposure.
Features are square roots, so that the Euclidean distance is Hellinger's. Market-1501 protocol: same identity and
camera excluded, junk dropped, distractors kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from machine import end_with
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pmm_edge.console import percent, print_json
from pmm_edge.data.dataset import scan
from pmm_edge.images import Pixels
from pmm_edge.runtime.embed_files import evaluate_dataset

STRIPES = 6


def joint(image: Image.Image) -> NDArray[np.float32]:
    """(512,) histogram of 8 levels of red × green × blue."""
    return _histogram(np.asarray(image), (8, 8, 8))


def striped(image: Image.Image) -> NDArray[np.float32]:
    """(1536,) histograms of 16 hues × 4 saturations × 4 values in six stripes."""
    hsv = np.asarray(image.convert("HSV"))
    return np.concatenate([_histogram(stripe, (16, 4, 4)) for stripe in np.array_split(hsv, STRIPES)])


def corrected(image: Image.Image) -> NDArray[np.float32]:
    """(1536,) like `striped`, of the equalized middle of the image."""
    width, height = image.size
    return striped(ImageOps.equalize(image).crop((width // 4, 0, width - width // 4, height)))


def _histogram(pixels: Pixels, bins: tuple[int, int, int]) -> NDArray[np.float32]:
    levels = [pixels[..., k].astype(np.int64) * n // 256 for k, n in enumerate(bins)]
    counts = np.bincount(np.ravel_multi_index(levels, bins).ravel(), minlength=int(np.prod(bins)))
    return np.sqrt(counts / counts.sum()).astype(np.float32)


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of a data set")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    dataset = scan(options.data, training=False).without_junk()
    paths, figures = [*dataset.query.paths, *dataset.gallery.paths], {}
    for describe in (joint, striped, corrected):
        features = np.stack([describe(Image.open(path).convert("RGB")) for path in paths])
        figures[describe.__name__] = evaluate_dataset(dataset, features)
    if options.json:
        print_json({name: {"rank1": result.rank(1), "mAP": result.mAP} for name, result in figures.items()})
    else:
        for name, result in figures.items():
            print(f"{name:10s} Rank-1 {percent(result.rank(1)):>5} %   mAP {percent(result.mAP):>5} %")
    return 0


if __name__ == "__main__":
    end_with(run)
