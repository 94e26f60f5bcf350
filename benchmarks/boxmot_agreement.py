"""BoxMOT's ReID ONNX back end on an export of ours, against `pmm_edge` on the same crops: cosine of each pair.

    pmm export --input-form normalized --out reid.onnx
    python benchmarks/boxmot_agreement.py reid.onnx DATA [--images 200] [--json]

Needs boxmot and opencv-python, which the project does not install: docs/boxmot.md says how. BoxMOT cuts boxes out of a
BGR frame, resizes with OpenCV's bilinear filter, which does not average where it shrinks, normalizes, and scales each
embedding to length 1. So every crop is embedded twice: as it is, and resized by `pmm_edge` before, which leaves BoxMOT
nothing to resize: the difference between the two rows is that filter's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from machine import machine
from PIL import Image

from pmm_edge.console import print_json
from pmm_edge.images import Pixels, resize_crop
from pmm_edge.retrieval.distances import cosines
from pmm_edge.runtime import load
from pmm_edge.runtime.listing import find_images


def frame_of(crops: list[Pixels]) -> tuple[np.ndarray, np.ndarray]:
    """One BGR frame with all crops side by side, as OpenCV would read it, and their boxes (N, 4) xyxy."""
    widths = [crop.shape[1] for crop in crops]
    frame = np.zeros((max(crop.shape[0] for crop in crops), sum(widths), 3), np.uint8)
    boxes, left = [], 0
    for crop, width in zip(crops, widths, strict=True):
        frame[: crop.shape[0], left : left + width] = crop[:, :, ::-1]
        boxes.append((left, 0, left + width, crop.shape[0]))
        left += width
    return frame, np.array(boxes, np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an export with --input-form normalized")
    parser.add_argument("images", type=Path, help="a folder or data set")
    parser.add_argument("--images", dest="count", type=int, default=200, help="number of images; default: %(default)s")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    from boxmot.reid.backends.onnx_backend import ONNXBackend  # not installed with this project

    embedder = load(arguments.model, "cpu")
    if embedder.spec.input.form != "normalized":
        parser.error(f"{arguments.model} takes {embedder.spec.input.form}; export it with --input-form normalized")
    boxmot = ONNXBackend(arguments.model, torch.device("cpu"), half=False)
    paths = find_images(arguments.images).paths
    paths = paths[:: max(1, len(paths) // arguments.count)][: arguments.count]
    crops = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    size = embedder.spec.input
    resized = [resize_crop(Image.fromarray(crop), size.height, size.width) for crop in crops]
    ours = embedder.embed(crops)
    found = {}
    for name, fed in (("resized by pmm_edge", resized), ("resized by BoxMOT", crops)):
        frame, boxes = frame_of(fed)
        values = cosines(ours, boxmot.get_features(boxes, frame))
        found[name] = {"min": float(values.min()), "mean": float(values.mean())}

    where = machine("boxmot", "onnxruntime", "onnxruntime-gpu", "opencv-python", "opencv-python-headless", "pillow")
    sizes = sorted({crop.shape[:2] for crop in crops})
    if arguments.json:
        print_json({"machine": where, "crops": len(crops), "sizes": sizes, "cosine": found})
        return
    print(where)
    shown = ", ".join(f"{height}x{width}" for height, width in sizes[:4]) + (" ..." if len(sizes) > 4 else "")
    print(f"{len(crops)} crops of {shown}; the network takes {size.height}x{size.width}")
    print("crops                   cosine min     mean")
    for name, cosine in found.items():
        print(f"{name:22s}   {cosine['min']:9.6f} {cosine['mean']:8.6f}")


if __name__ == "__main__":
    main()
