"""Latency, cosine, mAP and size of FP32, FP16 and INT8 exports next to PyTorch eager, in one run on CPU.

    python benchmarks/precision.py                                    PMM ResNet-50 384×128 with random weights
    python benchmarks/precision.py --run runs/20261122-174200-quick   a trained network, on its run's data set

Latency does not depend on the weights; cosines and mAP mean something only for a trained network. Calibration reads
the training split; cosines are measured on query and gallery. Most of the time goes into calibrating ResNet-50 with all
three methods: for latency alone, use --method minmax.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from inference import random_checkpoint
from machine import machine

from pmm_edge.bench.timing import measure_latency
from pmm_edge.data.dataset import ReidDataset, Split, scan
from pmm_edge.data.synthetic import SyntheticConfig, cached_synthetic
from pmm_edge.export import export
from pmm_edge.images import evenly, read_crops
from pmm_edge.retrieval.distances import cosines
from pmm_edge.runs import BEST, about_run
from pmm_edge.runtime import load
from pmm_edge.runtime.embed_files import embed_files, evaluate_dataset
from pmm_edge.spec import describe_precision

SMALL_SET = SyntheticConfig(train_identities=16, test_identities=8)


def progress(what: str, done: int, total: int, detail: str = "") -> None:
    """Print progress on standard error, a line for each tenth."""
    if total and (done in (0, total) or 10 * done // total > 10 * (done - 1) // total):
        print(f"  {what}: {done} of {total} {detail}", file=sys.stderr, flush=True)


def subset(dataset: ReidDataset, images: int | None) -> ReidDataset:
    """At most `images` images of query and gallery, evenly spaced."""

    def part(split: Split) -> Split:
        share = len(split) * (images or 0) // (len(dataset.query) + len(dataset.gallery))
        return split.select(evenly(len(split), max(share, 1)))

    return replace(dataset, query=part(dataset.query), gallery=part(dataset.gallery)) if images else dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a training run")
    parser.add_argument("--backbone", default="resnet50", help="of the random network")
    parser.add_argument("--batch", default="1,8", help="batch sizes")
    parser.add_argument("--images", type=int, help="use this many images of query and gallery and omit mAP")
    parser.add_argument("--method", choices=("minmax", "percentile", "entropy"), help="calibration method of INT8")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.run:
            about = about_run(arguments.run)
            assert about, f"{arguments.run} is not a run folder"
            checkpoint, data = arguments.run / BEST, Path(about.data)
        else:
            checkpoint, data = random_checkpoint(folder / "random.pt", arguments.backbone), cached_synthetic(SMALL_SET)
        int8: dict[str, Any] = {"precision": "int8", "calibration": data, "calibration_method": arguments.method}
        choices: dict[str, dict[str, Any]] = {
            "FP32": {},
            "FP16": {"precision": "fp16", "calibration": data if arguments.run else None},
            "INT8 cpu": int8 | {"target": "cpu"},
            "INT8 tensorrt": int8 | {"target": "tensorrt"},
        }
        exported = {
            name: export(checkpoint, out=folder / f"{number}.onnx", report=progress, **choice).files[0]
            for number, (name, choice) in enumerate(choices.items())
        }
        embedders = {"PyTorch eager": load(checkpoint, "cpu")}
        embedders |= {name: load(item.path, "cpu") for name, item in exported.items()}

        spec = embedders["FP32"].spec
        title = f"{spec.architecture} {spec.backbone} {spec.input.height}x{spec.input.width}"
        print(machine("onnxruntime-gpu", "onnxruntime", "torch"))
        print(f"{title}, {'trained' if arguments.run else 'random weights'}, {spec.gflops:.2f} GFLOPs an image, CPU")
        for name, item in exported.items():
            print(f"{name:13}  {item.size / 1e6:6.1f} MB  {describe_precision(item.spec)}")

        dataset = subset(scan(data), arguments.images)
        paths = [*dataset.query.paths, *dataset.gallery.paths]
        embedded = {name: embed_files(model, paths, report=progress).embeddings for name, model in embedders.items()}
        base = embedded["PyTorch eager"]
        base_map = None if arguments.images else evaluate_dataset(dataset, base).mAP
        print(f"\ncloseness to PyTorch on {len(base)} images of query and gallery", end="")
        print("" if base_map is None else f"; mAP of PyTorch is {100 * base_map:.2f}")
        print("                 cosine mean    cosine min" + ("" if base_map is None else "    mAP drop, points"))
        for name in exported:
            cosine = cosines(base, embedded[name])
            line = f"{name:13}  {cosine.mean():12.7f}  {cosine.min():12.7f}"
            if base_map is not None:
                line += f"  {100 * (base_map - evaluate_dataset(dataset, embedded[name]).mAP):10.3f}"
            print(line)

        crops = read_crops(dataset.query.paths[:8], spec.input.height, spec.input.width)
        for batch in map(int, arguments.batch.split(",")):
            found = measure_latency(list(embedders.values()), [crops] * len(embedders), batch, report=progress)
            latencies = dict(zip(embedders, found, strict=True))
            eager, fp32 = latencies["PyTorch eager"].median_ms, latencies["FP32"].median_ms
            print(f"\nbatch {batch}: median ms (p90)     of eager   of FP32")
            for name, own in latencies.items():
                share = f"{own.median_ms / eager:8.2f}  {own.median_ms / fp32:8.2f}"
                print(f"{name:13}  {own.median_ms:8.1f} ({own.p90_ms:7.1f})  {share}")


if __name__ == "__main__":
    main()
