"""Latency of PyTorch eager and of FP32 and INT8 exports of the same weights, on CPU, from interleaved runs.

    python benchmarks/inference.py [--backbone resnet50] [--batch 1,8]

From uint8 crops of 384×128 to embeddings. Weights are random and INT8 is calibrated on a few synthetic images, since
latency depends on neither. Ratios carry over to other machines better than milliseconds.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from machine import machine

from pmm_edge.bench.timing import measure_latency
from pmm_edge.data.synthetic import SyntheticConfig, cached_synthetic
from pmm_edge.export import export
from pmm_edge.model import Checkpoint, build_model, save_checkpoint
from pmm_edge.runtime import load
from pmm_edge.spec import InputSpec, ModelSpec

HEIGHT, WIDTH = 384, 128
FEW = SyntheticConfig(train_identities=8, test_identities=2, cameras=2, images=4)


def random_checkpoint(path: Path, backbone: str, height: int = HEIGHT, width: int = WIDTH) -> Path:
    """Write a checkpoint with random weights."""
    network = build_model("pmm", num_classes=751, backbone=backbone, height=height, width=width)
    spec = ModelSpec(
        architecture="pmm",
        backbone=backbone,
        num_classes=751,
        input=InputSpec(height, width),
        embedding_size=1536,
        stages=network.stages,
        mix_blocks=network.mix_blocks,
    )
    save_checkpoint(path, Checkpoint(spec, network.state_dict()))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--batch", default="1,8", help="batch sizes")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = random_checkpoint(Path(folder) / "random.pt", arguments.backbone)
        fp32 = export(checkpoint, out=Path(folder) / "fp32.onnx").files[0]
        int8 = export(
            checkpoint,
            out=Path(folder) / "int8.onnx",
            precision="int8",
            calibration=cached_synthetic(FEW),
            target="cpu",
            calibration_method="minmax",
        ).files[0]
        embedders = [load(path, "cpu") for path in (checkpoint, fp32.path, int8.path)]
    crops = np.random.default_rng(0).integers(0, 256, (8, HEIGHT, WIDTH, 3), dtype=np.uint8)

    print(machine("onnxruntime-gpu", "onnxruntime", "torch"))
    print(f"PMM {arguments.backbone} {HEIGHT}x{WIDTH}, CPU, median ms (p90)")
    print("batch       PyTorch eager           ONNX FP32       ONNX INT8 cpu   FP32/eager   INT8/FP32")
    for batch in map(int, arguments.batch.split(",")):
        found = measure_latency(embedders, [crops] * len(embedders), batch)
        eager, full, quantized = (latency.median_ms for latency in found)
        timed = "  ".join(f"{latency.median_ms:8.1f} ({latency.p90_ms:7.1f})" for latency in found)
        print(f"{batch:5d}  {timed}   {full / eager:10.2f}  {quantized / full:10.2f}", flush=True)


if __name__ == "__main__":
    main()
