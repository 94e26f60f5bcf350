"""A gallery in a folder: rows added per second, time of a search, recall against an exact search, and memory.

Embeddings are drawn like those of a trained network: identity, camera and image each contribute a Gaussian, with the
shares of variance that the network of the quickstart has on its test people (62, 15 and 23 %), and a ReLU follows.
Their variance spreads over more directions than that network's (participation ratio 44; 23 there), which is harder.
Queries are new images of the same people. Adding includes the index and waits until the rows are on disk.

    python benchmarks/gallery.py --rows 1000000 --folder /data/gallery      # 6.3 GB of disk
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
from machine import machine, peak_memory
from numpy.typing import NDArray

from pmm_edge.gallery import EmbeddingModel, open_gallery
from pmm_edge.spec import InputSpec, ModelSpec

SIZE, LATENT, IMAGES, CAMERAS, OWN = 1536, 384, 25, 32, 997
BLOCK = 50_000
SHARES = {"identity": (0.62, 1.8), "camera": (0.15, 1.3), "image": (0.23, 1.2)}  # of the variance, and its decay


class People:
    """Draws embeddings in blocks, the same ones for the same seed."""

    def __init__(self, identities: int, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.seed, self.scale = seed, {}
        for name, (share, decay) in SHARES.items():
            variance = (np.arange(1, LATENT + 1) + 4.0) ** -decay
            self.scale[name] = np.sqrt(share * variance / variance.sum()).astype(np.float32)
        self.mixture = generator.standard_normal((LATENT, SIZE), np.float32)
        self.centers = generator.standard_normal((identities, LATENT), np.float32) * self.scale["identity"]
        self.views = generator.standard_normal((OWN, LATENT), np.float32) * self.scale["camera"]

    def draw(self, count: int, block: int) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
        generator = np.random.default_rng((self.seed, block))
        pids, cameras = generator.integers(0, len(self.centers), count), generator.integers(0, CAMERAS, count)
        latent = self.centers[pids] + 0.5 * self.views[cameras] + 0.87 * self.views[(31 * pids + 7919 * cameras) % OWN]
        latent += generator.standard_normal((count, LATENT), np.float32) * self.scale["image"]
        return np.maximum(latent @ self.mixture, 0), pids, cameras


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--folder", type=Path, help="where to write; default: TMPDIR")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=options.folder))
    people = People(options.rows // IMAGES)
    spec = ModelSpec("pmm", "resnet50", 751, InputSpec(384, 128), SIZE, {})
    try:
        gallery = open_gallery(work / "people", EmbeddingModel("0" * 64, spec), dtype=options.dtype)
        print(machine("faiss-cpu", "numpy"))
        print(f"memory before the first row: {peak_memory():,.0f} MiB")
        adding = working = 0.0
        for start in range(0, options.rows, BLOCK):
            embeddings, pids, cameras = people.draw(min(BLOCK, options.rows - start), start)
            names = [
                f"/crops/{pid:06d}_c{camera}_{start + row:08d}.jpg"
                for row, (pid, camera) in enumerate(zip(pids.tolist(), cameras.tolist(), strict=True))
            ]
            began, worked = perf_counter(), process_time()
            gallery.add(embeddings, sources=names, pids=pids, cameras=cameras, times=start + np.arange(len(pids)))
            adding += (last := perf_counter() - began)
            working += process_time() - worked
            print(
                f"{start + len(pids):>10,} rows, the last {len(pids):,} in {last:.1f} s, peak {peak_memory():,.0f} MiB",
                flush=True,
            )
        info = gallery.info()
        rate = options.rows / adding
        print(f"added {options.rows:,} rows of {SIZE} {options.dtype}: {rate:,.0f} rows/s")
        print(f"that took {adding:.1f} s, {working:.0f} s of CPU time")
        print(f"{info.size / 1e9:.2f} GB on disk; {info.index}")
        queries = people.draw(options.queries, -1 % 2**32)[0]
        for name, filters in (("search", {}), ("with a filter on 1 of 32 cameras", {"cameras": ["3"]})):
            times, found = [], []
            for query in queries if not filters else queries[:20]:
                began = perf_counter()
                found.append({hit.id for hit in gallery.search(query[None], **filters)[0].hits})
                times.append(perf_counter() - began)
            p50, p95, worst = np.percentile(1000 * np.array(times[5:]), (50, 95, 100))
            exact = [
                {hit.id for hit in one.hits}
                for one in gallery.search(queries[: min(200, len(found))], exact=True, **filters)
            ]
            recall = np.mean([len(a & b) / len(a) for a, b in zip(exact, found, strict=False)])
            print(f"{name}: median {p50:.1f} ms, p95 {p95:.1f} ms, worst {worst:.1f} ms; recall@10 {recall:.4f}")
        print(f"peak memory {peak_memory():,.0f} MiB, with mapped pages of the gallery and 600 MiB of the generator")
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
