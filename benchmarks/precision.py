"""FP32, FP16 and INT8 of one network beside PyTorch eager: latency in turns, cosine, mAP and size, in one run.

    python benchmarks/precision.py                                  PMM ResNet-50 384×128 with random weights
    python benchmarks/precision.py --run runs/20261122-174200-quick   a trained network, on its run's data set

Latency does not depend on the weights; closeness and mAP mean something only for a trained network. Calibration
reads the training split. The cosines are over query and gallery, which nothing was tuned on. Calibrating a ResNet-50
by all three methods is most of the time: for latency alone, --method minmax.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from inference import random_checkpoint
from machine import machine

from pmm_edge.bench.parity import compare
from pmm_edge.bench.timing import measure_latency
from pmm_edge.data.dataset import scan
from pmm_edge.data.synthetic import SyntheticConfig, cached_synthetic
from pmm_edge.export import Fp16, Int8, export_onnx
from pmm_edge.images import evenly, read_crops
from pmm_edge.runs import BEST, about_run
from pmm_edge.runtime import embed_files, load
from pmm_edge.runtime.embed_files import EmbeddedDataset
from pmm_edge.spec import describe_precision

SMALL_SET = SyntheticConfig(train_identities=16, test_identities=8)


def told(what: str, done: int, total: int, detail: str = "") -> None:
    """Say on standard error what is being done, a line for each tenth of it."""
    if total and (done in (0, total) or 10 * done // total > 10 * (done - 1) // total):
        print(f"  {what}: {done} of {total} {detail}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a training run")
    parser.add_argument("--backbone", default="resnet50", help="of the random network")
    parser.add_argument("--batch", default="1,8", help="batch sizes")
    parser.add_argument("--images", type=int, help="at most so many of query and gallery; mAP is then left out")
    parser.add_argument("--method", choices=("minmax", "percentile", "entropy"), help="of INT8's calibration")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.run:
            about = about_run(arguments.run)
            assert about, f"{arguments.run} is no run"
            checkpoint, data = arguments.run / BEST, Path(about.data)
        else:
            checkpoint, data = random_checkpoint(folder / "random.pt", arguments.backbone), cached_synthetic(SMALL_SET)
        choices = {
            "FP32": None,
            "FP16": Fp16(data if arguments.run else None),
            "INT8 cpu": Int8(data, "cpu", arguments.method),
            "INT8 tensorrt": Int8(data, "tensorrt", arguments.method),
        }
        exported = {
            name: export_onnx(checkpoint, folder / f"{number}.onnx", precision=choice, report=told)
            for number, (name, choice) in enumerate(choices.items())
        }
        embedders = {"PyTorch eager": load(checkpoint, "cpu")}
        embedders |= {name: load(item.path, "cpu") for name, item in exported.items()}

        spec = embedders["FP32"].spec
        title = f"{spec.architecture} {spec.backbone} {spec.input.height}x{spec.input.width}"
        print(machine("onnxruntime-gpu", "onnxruntime", "torch"))
        print(f"{title}, {'trained' if arguments.run else 'random weights'}, CPU")
        for name, item in exported.items():
            print(f"{name:13}  {item.size / 1e6:6.1f} MB  {describe_precision(item.spec)}")

        dataset = scan(data)
        paths = [*dataset.query.paths, *dataset.gallery.paths]
        whole = arguments.images is None or arguments.images >= len(paths)
        if not whole:  # spread over both splits and their people
            paths = [paths[row] for row in evenly(len(paths), arguments.images)]
        embeddings = {
            name: embed_files(embedder, paths, report=told).embeddings for name, embedder in embedders.items()
        }
        base = embeddings["PyTorch eager"]
        base_map = EmbeddedDataset(dataset, base).evaluate().mAP if whole else float("nan")
        its_map = f"; its mAP is {100 * base_map:.2f}" if whole else ""
        print(f"\ncloseness to PyTorch on {len(paths)} images of query and gallery{its_map}")
        print("                 cosine mean    cosine min" + ("    mAP drop, points" if whole else ""))
        for name in exported:
            parity = compare(base, embeddings[name], paths)
            line = f"{name:13}  {parity.whole.cosine_mean:12.7f}  {parity.whole.cosine_min:12.7f}"
            if whole:
                line += f"  {100 * (base_map - EmbeddedDataset(dataset, embeddings[name]).evaluate().mAP):10.3f}"
            print(line)

        crops = read_crops(paths[:8], spec.input.height, spec.input.width)
        for batch in map(int, arguments.batch.split(",")):
            found = measure_latency(list(embedders.values()), [crops] * len(embedders), batch, report=told)
            latencies = dict(zip(embedders, found, strict=True))
            eager, fp32 = latencies["PyTorch eager"].median_ms, latencies["FP32"].median_ms
            print(f"\nbatch {batch}: median ms (p90)     of eager   of FP32")
            for name, own in latencies.items():
                share = f"{own.median_ms / eager:8.2f}  {own.median_ms / fp32:8.2f}"
                print(f"{name:13}  {own.median_ms:8.1f} ({own.p90_ms:7.1f})  {share}")


if __name__ == "__main__":
    main()
