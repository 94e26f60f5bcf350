"""`pmm embed --ray` with two workers on this machine, against two independent processes with half of the images each.

    python benchmarks/ray_embed.py MODEL.onnx IMAGES [--images 4000] [--rounds 3] [--json]

Both use one thread per process and are timed in turns in one run, from the start of the processes (Ray itself is
running already) to the last shard. Each pair of rounds gives a ratio, so that other work on the machine matters less.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from machine import machine

from pmm_edge.console import print_json
from pmm_edge.data.dataset import walk_files
from pmm_edge.images import IMAGE_SUFFIXES
from pmm_edge.runtime.shards import embed_shards

SHARD_ROWS = 256


def processes(model: Path, lists: list[Path], folder: Path) -> None:
    environment = {**os.environ, "PMM_THREADS": "1"}
    command = [sys.executable, "-m", "pmm_edge", "embed", model, "--device", "cpu", "--json"]
    command += ["--shard-rows", str(SHARD_ROWS)]
    started = [
        subprocess.Popen(
            [*command, images, "-o", folder / images.stem],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for images in lists
    ]
    if any(process.wait() for process in started):
        raise SystemExit("pmm embed failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("source", type=Path)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()

    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    environment = {"env_vars": {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}}
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        object_store_memory=200_000_000, runtime_env=environment,
    )  # fmt: skip
    paths = [*islice(walk_files(given.source.absolute(), True, {}, IMAGE_SUFFIXES), given.images)]  # type: ignore[arg-type]
    rounds = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        lists = [folder / "first.txt", folder / "second.txt", folder / "all.txt"]
        for file, part in zip(lists, (paths[::2], paths[1::2], paths), strict=True):
            file.write_text("\n".join(map(str, part)))
        for _ in range(given.rounds):
            start = time.perf_counter()
            processes(given.model, lists[:2], folder)
            middle = time.perf_counter()
            embed_shards(
                given.model, lists[2], folder / "ray", device="cpu", shard_rows=SHARD_ROWS, ray="auto", workers=2
            )
            rounds.append((len(paths) / (middle - start), len(paths) / (time.perf_counter() - middle)))
            for output in ("first", "second", "ray"):
                shutil.rmtree(folder / output)
    ray.shutdown()
    result = {"images": len(paths), "processes": median(one for one, _ in rounds)}
    result |= {"ray": median(two for _, two in rounds), "ratio": median(two / one for one, two in rounds)}
    where = machine("onnxruntime-gpu", "onnxruntime", "ray", "numpy")
    if given.json:
        print_json({"machine": where, "rounds": rounds, **result})
        return
    print(where)
    print(f"{given.model.name}, {len(paths):,} images, shards of {SHARD_ROWS}")
    print(f"two processes          {result['processes']:8.1f} images/s")
    print(f"Ray, two workers       {result['ray']:8.1f} images/s")
    print(f"ratio, median of {given.rounds}     {result['ratio']:8.3f}")


if __name__ == "__main__":
    main()
