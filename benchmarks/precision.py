"""FP32, FP16 and INT8 of one network beside PyTorch eager: latency in turns, cosine, mAP and size, in one run.

    python benchmarks/precision.py                                  PMM ResNet-50 384×128 with random weights
    python benchmarks/precision.py --run runs/20261122-1742-quick   a trained network, on its run's data set

Latency does not depend on the weights; closeness and mAP mean something only for a trained network. Calibration
reads the training split. The cosines are over query and gallery, which nothing was tuned on.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from inference import random_checkpoint
from machine import machine

from pmm_edge.bench import compare, evaluate_embeddings, measure_latency
from pmm_edge.data.dataset import scan
from pmm_edge.data.synthetic import SyntheticConfig, cached_synthetic
from pmm_edge.export import Fp16, Int8, export_onnx
from pmm_edge.images import read_crop
from pmm_edge.runs import BEST, about_run
from pmm_edge.runtime import embed_files, load

SMALL_SET = SyntheticConfig(train_identities=16, test_identities=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a training run")
    parser.add_argument("--backbone", default="resnet50", help="of the random network")
    parser.add_argument("--batch", default="1,8", help="batch sizes")
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
            name: export_onnx(checkpoint, folder / f"{number}.onnx", precision=choice)
            for number, (name, choice) in enumerate(choices.items())
        }
        embedders = {"PyTorch eager": load(checkpoint, "cpu")}
        embedders |= {name: load(item.path, "cpu") for name, item in exported.items()}

        spec = embedders["FP32"].spec
        title = f"{spec.architecture} {spec.backbone} {spec.input.height}x{spec.input.width}"
        print(machine("onnxruntime-gpu", "onnxruntime", "torch"))
        print(f"{title}, {'trained' if arguments.run else 'random weights'}, CPU")
        for name, item in exported.items():
            print(f"{name:13}  {item.size / 1e6:6.1f} MB  {item.spec.precision_method}")

        dataset = scan(data)
        paths = [*dataset.query.paths, *dataset.gallery.paths]
        embeddings = {name: embed_files(embedder, paths) for name, embedder in embedders.items()}
        base = embeddings["PyTorch eager"]
        base_map = evaluate_embeddings(base, dataset).mAP
        print(f"\ncloseness to PyTorch on {len(paths)} images of query and gallery; its mAP is {100 * base_map:.2f}")
        print("                 cosine mean    cosine min    mAP drop, points")
        for name in exported:
            parity = compare(base, embeddings[name], paths)
            drop = 100 * (base_map - evaluate_embeddings(embeddings[name], dataset).mAP)
            print(f"{name:13}  {parity.whole.cosine_mean:12.7f}  {parity.whole.cosine_min:12.7f}  {drop:10.3f}")

        crops = np.stack([read_crop(path, spec.input.height, spec.input.width) for path in paths[:8]])
        for batch in map(int, arguments.batch.split(",")):
            found = measure_latency(list(embedders.values()), [crops] * len(embedders), batch)
            latencies = dict(zip(embedders, found, strict=True))
            eager, fp32 = latencies["PyTorch eager"].median_ms, latencies["FP32"].median_ms
            print(f"\nbatch {batch}: median ms (p90)     of eager   of FP32")
            for name, own in latencies.items():
                share = f"{own.median_ms / eager:8.2f}  {own.median_ms / fp32:8.2f}"
                print(f"{name:13}  {own.median_ms:8.1f} ({own.p90_ms:7.1f})  {share}")


if __name__ == "__main__":
    main()
