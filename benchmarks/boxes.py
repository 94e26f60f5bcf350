"""`embed_boxes` on a 1080p frame with 20 boxes, against what trackers do with OpenCV: in turns, in one run.

    python benchmarks/boxes.py [--model model.onnx | --backbone resnet18] [--rounds 15] [--json]

Needs opencv-python-headless, which the project does not install. All three embed the same boxes with the same network:
- `embed_boxes`: cuts, resizes with antialiasing as training does, embeds one batch;
- `cv2, one batch`: cuts, `cv2.resize` (bilinear, without antialiasing) and `cv2.cvtColor` for each box, one batch;
- `cv2, loop`: the same, but one run of the network for each box.
A second table leaves out the network; its last row converts the whole frame to RGB first, as the first step of many
trackers does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2  # not installed with this project
import numpy as np
from inference import random_checkpoint
from machine import machine

from pmm_edge.bench.timing import Workload, ratio_interval, time_interleaved
from pmm_edge.console import print_json
from pmm_edge.export import export
from pmm_edge.images import cut_boxes, prepare_crops
from pmm_edge.machine import threads
from pmm_edge.runtime import load


def compared(ways: dict[str, Callable[[], object]], runs: int) -> dict[str, dict[str, float]]:
    """Time the functions in turns: median milliseconds, and their ratio to those of the first."""
    workloads = [Workload(way) for way in ways.values()]
    time_interleaved(workloads, runs, 0.0)
    turns = {name: workload.turns for name, workload in zip(ways, workloads, strict=True)}
    first = workloads[0].turns
    return {
        name: {"ms": 1000 * float(np.median(own)), "ratio": ratio_interval(own, first)[0]}
        for name, own in turns.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model of pmm export; by default random weights are exported")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--boxes", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    with TemporaryDirectory() as name:
        model = arguments.model
        if model is None:
            checkpoint = random_checkpoint(Path(name) / "random.pt", arguments.backbone)
            model = export(checkpoint, out=Path(name) / "model.onnx").files[0].path
        embedder = load(model, "cpu")
    height, width = embedder.spec.input.height, embedder.spec.input.width
    cv2.setNumThreads(threads())
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (1080, 1920, 3), dtype=np.uint8)  # BGR
    heights = rng.uniform(120, 480, arguments.boxes)
    x1, y1 = rng.uniform(0, 1920 - 0.4 * heights), rng.uniform(0, 1080 - heights)
    boxes = np.stack([x1, y1, x1 + 0.4 * heights, y1 + heights], axis=1)

    def resized() -> list[np.ndarray]:
        corners = np.rint(boxes).astype(int)
        return [
            cv2.cvtColor(cv2.resize(frame[y1:y2, x1:x2], (width, height)), cv2.COLOR_BGR2RGB)
            for x1, y1, x2, y2 in corners
        ]

    def ours(image: np.ndarray, order: str) -> np.ndarray:
        return prepare_crops(cut_boxes(image, boxes), height, width, order=order)

    whole = compared(
        {
            "embed_boxes": lambda: embedder.embed_boxes(frame, boxes, order="bgr"),
            "cv2, one batch": lambda: embedder.embed_prepared(np.stack(resized())),
            "cv2, loop": lambda: [embedder.embed_prepared(crop[None]) for crop in resized()],
        },
        arguments.rounds,
    )
    before = compared(
        {
            "embed_boxes": lambda: ours(frame, "bgr"),
            "cv2": lambda: np.stack(resized()),
            "embed_boxes of a converted frame": lambda: ours(np.ascontiguousarray(frame[..., ::-1]), "rgb"),
        },
        10 * arguments.rounds,
    )
    where = machine("opencv-python-headless", "onnxruntime-gpu", "onnxruntime", "pillow", "numpy")
    if arguments.json:
        print_json({"machine": where, "whole": whole, "without_network": before})
        return
    print(where)
    print(f"PMM {embedder.spec.backbone} {height}×{width}, CPU, 1920×1080, {arguments.boxes} boxes")
    for title, table in (("from frame to embeddings", whole), ("without the network", before)):
        print(f"{title:34s}       ms   ratio")
        for name, found in table.items():
            print(f"  {name:32s} {found['ms']:8.1f}  {found['ratio']:6.2f}")


if __name__ == "__main__":
    main()
