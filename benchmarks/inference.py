"""Inference of PMM: PyTorch eager, FP32 and INT8 (target cpu) of `pmm export` from the same weights, timed in turns.

    python benchmarks/inference.py [--backbone resnet50] [--batch 1,8] [--json]

The weights are random, and INT8 is calibrated on a few synthetic pedestrians: latency depends on neither. From uint8
crops of 384×128 to embeddings, in one run; the ratios are what carries over to another machine.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

from pmm_edge.bench.environment import environment
from pmm_edge.bench.tables import environment_rows
from pmm_edge.bench.timing import measure_latency
from pmm_edge.data.synthetic import SyntheticConfig, cached_synthetic
from pmm_edge.export import Int8, export_onnx
from pmm_edge.files import encode_json
from pmm_edge.model import Checkpoint, build_model, save_checkpoint
from pmm_edge.runtime import load
from pmm_edge.spec import InputSpec, ModelSpec

HEIGHT, WIDTH = 384, 128
FEW = SyntheticConfig(train_identities=8, test_identities=2, cameras=2, images=4)
"""Enough to calibrate on."""


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
        int8 = Int8(cached_synthetic(FEW), "cpu", "minmax")
        files = [
            export_onnx(checkpoint, Path(folder) / f"{name}.onnx", precision=precision).path
            for name, precision in (("fp32", None), ("int8", int8))
        ]
        embedders = [load(path, "cpu") for path in (checkpoint, *files)]
    crops = np.random.default_rng(0).integers(0, 256, (8, HEIGHT, WIDTH, 3), dtype=np.uint8)
    results = []
    for batch in map(int, arguments.batch.split(",")):
        eager, fp32, quantised = measure_latency(embedders, [crops] * len(embedders), batch)
        results.append(
            {
                **{name: asdict(found) for name, found in (("eager", eager), ("fp32", fp32), ("int8", quantised))},
                "fp32_of_eager": fp32.median_ms / eager.median_ms,
                "int8_of_fp32": quantised.median_ms / fp32.median_ms,
            }
        )

    where = environment(embedders)
    if arguments.json:
        print(encode_json({"environment": where, "backbone": arguments.backbone, "results": results}), end="")
        return
    print("; ".join(f"{name} {value}" for name, value in environment_rows(where)))
    print(f"PMM {arguments.backbone} {HEIGHT}x{WIDTH}, CPU, median ms of interleaved runs (p90)")
    print("batch       PyTorch eager           ONNX FP32       ONNX INT8 cpu   FP32/eager   INT8/FP32")
    for result in results:
        own = [result[name] for name in ("eager", "fp32", "int8")]
        timed = [f"{latency['median_ms']:8.1f} ({latency['p90_ms']:7.1f})" for latency in own]
        ratios = f"{result['fp32_of_eager']:10.2f}  {result['int8_of_fp32']:10.2f}"
        print(f"{result['eager']['batch']:5d}  {'  '.join(timed)}   {ratios}")


if __name__ == "__main__":
    main()
