"""The whole evaluation at Market-1501's size, from embeddings to figures: `evaluate`, plain and re-ranked.

    python benchmarks/evaluation.py

Each runs once, in a process of its own, so that the peak of memory is its own. The embeddings are random but
realistic: people scatter around a center, values follow a ReLU, and a fifth of the gallery is distractors.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
from time import perf_counter

import numpy as np
from machine import machine
from numpy.typing import NDArray

from pmm_edge.retrieval import evaluate

QUERIES, GALLERY, IDENTITIES, DISTRACTORS, CAMERAS, SIZE = 3368, 15913, 750, 2793, 6, 1536
FACTORS = 64  # what people differ in; the 1,536 values are mixtures of these
MIB = 1 << 20
RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def market_like(seed: int = 0) -> tuple[list[NDArray[np.float32]], list[NDArray[np.int64]]]:
    """Embeddings of queries and gallery, float32; their identities, then their cameras."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((IDENTITIES + 1, FACTORS), dtype=np.float32)
    mixture = rng.standard_normal((FACTORS, SIZE), dtype=np.float32)
    query_pids = rng.integers(1, IDENTITIES + 1, QUERIES)
    gallery_pids = np.concatenate([rng.integers(1, IDENTITIES + 1, GALLERY - DISTRACTORS), np.zeros(DISTRACTORS, int)])
    rng.shuffle(gallery_pids)

    def embed(pids: NDArray[np.int64]) -> NDArray[np.float32]:
        noise = np.where(pids == 0, 1.6, 1.1).astype(np.float32)[:, None]
        factors = centers[pids] * (pids > 0)[:, None]
        factors += noise * rng.standard_normal(factors.shape, dtype=np.float32)
        return np.maximum(factors @ mixture, 0)

    cameras = [rng.integers(0, CAMERAS, QUERIES), rng.integers(0, CAMERAS, GALLERY)]
    return [embed(query_pids), embed(gallery_pids)], [query_pids, gallery_pids, *cameras]


def peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT


def measure(rerank: bool) -> str:
    """One row: seconds, peak memory and figures of one evaluation."""
    features, labels = market_like()
    before = peak_memory()
    start = perf_counter()
    result = evaluate(*features, *labels, rerank=rerank)
    seconds = perf_counter() - start
    work = "evaluate(rerank=True)" if rerank else "evaluate()"
    memory = f"{peak_memory() / MIB:>12,.0f}{before / MIB:>12,.0f}"
    figures = f"mAP {result.mAP:.4f}, mAP@50 {result.mAP_at_50:.4f}, Rank-1 {result.rank(1):.4f}"
    return f"{work:<24}{seconds:>9.1f}{memory}  {figures}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print(f"{QUERIES:,} queries x {GALLERY:,} gallery, {SIZE:,} float32 values each, {IDENTITIES} identities")
    print(machine("numpy") + "\n")
    print(f"{'work':<24}{'seconds':>9}{'peak MiB':>12}{'before':>12}  figures")
    context = multiprocessing.get_context("spawn")
    for rerank in (False, True):
        with context.Pool(1) as pool:
            print(pool.apply(measure, (rerank,)), flush=True)


if __name__ == "__main__":
    main()
