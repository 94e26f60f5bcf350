"""How far color alone goes: Rank-1 and mAP of three histogram matchers on a Market-1501-style folder.

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
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pmm_edge.retrieval import evaluate

Pixels = NDArray[np.uint8]
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


def read(
    folder: Path, describe: Callable[[Image.Image], NDArray[np.float32]]
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Features, pids and camids of the images in `folder`, without junk (-1)."""
    paths = sorted(path for path in folder.glob("*.jpg") if not path.name.startswith("-1"))
    if not paths:
        raise SystemExit(f"no .jpg images in {folder}: name a folder in Market-1501's layout")
    features = np.stack([describe(Image.open(path).convert("RGB")) for path in paths])
    pids = np.array([int(path.name.split("_")[0]) for path in paths])
    camids = np.array([int(path.name.split("_c")[1][0]) for path in paths])
    return features, pids, camids


def main() -> None:
    parser = argparse.ArgumentParser(description="Rank-1 and mAP of color histograms.")
    parser.add_argument("data", type=Path, help="folder that holds query/ and bounding_box_test/")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    figures = {}
    for name, describe in (("joint", joint), ("striped", striped), ("corrected", corrected)):
        query, query_pids, query_camids = read(options.data / "query", describe)
        gallery, pids, camids = read(options.data / "bounding_box_test", describe)
        result = evaluate(query, gallery, query_pids, pids, query_camids, camids)
        figures[name] = {"rank1": float(result.rank(1)), "mAP": float(result.mAP)}
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        for name, figure in figures.items():
            print(f"{name:10s} Rank-1 {100 * figure['rank1']:5.1f} %   mAP {100 * figure['mAP']:5.1f} %")


if __name__ == "__main__":
    main()
