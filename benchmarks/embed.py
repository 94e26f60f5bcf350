"""`pmm embed` from JPEG files to embeddings and to Parquet shards, against the network alone on prepared arrays.

    python benchmarks/embed.py [--backbone resnet50] [--batch 16] [--rounds 7] [--json]

The ratio shows how well decoding overlaps with the network; on a CPU both compete for the same cores. The files are
synthetic pedestrians of Market-1501's size, 128×64; the network's weights are random: latency does not depend on them.
Both are timed in turns, on the same images, in one run. On a busy machine, use the ratio of CPU times: other processes
disturb the ratio of throughputs.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from inference import HEIGHT, WIDTH, random_checkpoint
from machine import machine

from pmm_edge.console import print_json
from pmm_edge.data.synthetic import SyntheticConfig, make_synthetic
from pmm_edge.export import export
from pmm_edge.images import read_crops
from pmm_edge.runtime import load
from pmm_edge.runtime.embed_files import embed_files
from pmm_edge.runtime.listing import find_images
from pmm_edge.runtime.shards import embed_shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--identities", type=int, default=6, help="8 images of each")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    with TemporaryDirectory() as name:
        folder = Path(name)
        half = arguments.identities // 2
        make_synthetic(folder / "crops", SyntheticConfig(half, half, cameras=2, images=4, height=128, width=64))
        checkpoint = random_checkpoint(folder / "random.pt", arguments.backbone)
        embedder = load(export(checkpoint, out=folder / "model.onnx").files[0].path, "cpu")
        paths = find_images(folder / "crops").paths
        prepared = read_crops(paths, HEIGHT, WIDTH)
        alone, whole, shards, processor = [], [], [], []
        for _ in range(arguments.rounds):
            start, busy = time.perf_counter(), time.process_time()
            for first in range(0, len(prepared), arguments.batch):
                embedder.embed_prepared(prepared[first : first + arguments.batch])
            alone.append(len(paths) / (time.perf_counter() - start))
            middle = time.process_time()
            whole.append(len(paths) / embed_files(embedder, paths, batch=arguments.batch).seconds)
            processor.append((middle - busy) / (time.process_time() - middle))
            written = embed_shards(embedder, folder / "crops", folder / "shards", batch=arguments.batch)
            shards.append(len(paths) / written.seconds)
            shutil.rmtree(folder / "shards")
    where = machine("onnxruntime-gpu", "onnxruntime", "pillow", "numpy")
    result = {
        "images": len(paths),
        "alone": median(alone),
        "end_to_end": median(whole),
        "ratio": median(there / here for there, here in zip(whole, alone, strict=True)),
        "processor_ratio": median(processor),
        "shards": median(shards),
        "shards_ratio": median(there / here for there, here in zip(shards, alone, strict=True)),
    }
    if arguments.json:
        print_json({"machine": where, **vars(arguments), **result})
        return
    print(where)
    print(f"PMM {arguments.backbone} {HEIGHT}×{WIDTH}, FP32, CPU, batch {arguments.batch}, {len(paths)} images")
    print(f"network alone, prepared arrays   {result['alone']:7.1f} images/s")
    print(f"pmm embed, from JPEG files       {result['end_to_end']:7.1f} images/s")
    print(f"ratio, median of {arguments.rounds} rounds        {result['ratio']:7.3f}")
    print(f"pmm embed, into Parquet shards   {result['shards']:7.1f} images/s")
    print(f"ratio                            {result['shards_ratio']:7.3f}")
    print(f"the same of processor time       {result['processor_ratio']:7.3f}")


if __name__ == "__main__":
    main()
