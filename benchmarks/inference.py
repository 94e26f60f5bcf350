"""Inference of PMM: PyTorch eager against what `pmm export` makes of the same weights, timed in turns.

    python benchmarks/inference.py [--backbone resnet50] [--batch 1,8] [--json]

The weights are random: latency does not depend on them. From uint8 crops of 384×128 to embeddings, in one run;
the ratio is what carries over to another machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

from pmm_edge.bench import measure_latency
from pmm_edge.bench.environment import environment
from pmm_edge.export import export_onnx
from pmm_edge.model import Checkpoint, build_model, save_checkpoint
from pmm_edge.runtime import load
from pmm_edge.spec import InputSpec, ModelSpec

HEIGHT, WIDTH = 384, 128


def random_checkpoint(path: Path, backbone: str) -> Path:
    """Write a checkpoint that was never trained."""
    network = build_model("pmm", num_classes=751, backbone=backbone, height=HEIGHT, width=WIDTH)
    spec = ModelSpec(
        architecture="pmm",
        backbone=backbone,
        num_classes=751,
        input=InputSpec(HEIGHT, WIDTH),
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
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = random_checkpoint(Path(folder) / "random.pt", arguments.backbone)
        exported = export_onnx(checkpoint, Path(folder) / "model.onnx")
        embedders = [load(checkpoint, "cpu"), load(exported.path, "cpu")]
    crops = np.random.default_rng(0).integers(0, 256, (8, HEIGHT, WIDTH, 3), dtype=np.uint8)
    results = []
    for batch in map(int, arguments.batch.split(",")):
        eager, onnx = measure_latency(embedders, [crops, crops], batch)
        results.append({"eager": asdict(eager), "onnx": asdict(onnx), "ratio": onnx.median_ms / eager.median_ms})

    where = environment(embedders)
    if arguments.json:
        print(json.dumps({"environment": where, "backbone": arguments.backbone, "results": results}, indent=2))
        return
    print("; ".join(f"{name} {value}" for name, value in where.items()))
    print(f"PMM {arguments.backbone} {HEIGHT}x{WIDTH}, FP32, CPU, median of interleaved runs (p90)")
    print("batch   PyTorch eager ms     ONNX Runtime ms   ratio")
    for result in results:
        eager, onnx = result["eager"], result["onnx"]
        print(
            f"{eager['batch']:5d}   {eager['median_ms']:7.1f} ({eager['p90_ms']:7.1f})"
            f"   {onnx['median_ms']:7.1f} ({onnx['p90_ms']:7.1f})   {result['ratio']:5.2f}"
        )


if __name__ == "__main__":
    main()
