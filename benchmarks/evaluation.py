"""Evaluation and decision thresholds at Market-1501's size, from embeddings to figures.

    python benchmarks/evaluation.py

`evaluate`, plain and re-ranked, and `find_thresholds` with intervals and curves run once each, in processes of their
own, so that the peak of memory is that of one. The embeddings are random but realistic: people scatter around a center,
values follow a ReLU, and a fifth of the gallery is distractors.
"""

from __future__ import annotations

import argparse
import multiprocessing
from time import perf_counter, process_time

import numpy as np
from machine import machine, peak_memory
from numpy.typing import NDArray

from pmm_edge.console import percent
from pmm_edge.retrieval import evaluate
from pmm_edge.retrieval.thresholds import find_thresholds

QUERIES, GALLERY, IDENTITIES, DISTRACTORS, CAMERAS, SIZE = 3368, 15913, 750, 2793, 6, 1536
FACTORS = 64  # what people differ in; the 1,536 values are mixtures of these
THRESHOLDS = "find_thresholds()"


def market_like(mixed: bool = True) -> tuple[list[NDArray[np.float32]], list[NDArray[np.int64]]]:
    """Embeddings of queries and gallery, float32, or their factors; identities of both, then cameras."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((IDENTITIES + 1, FACTORS), dtype=np.float32)
    mixture = rng.standard_normal((FACTORS, SIZE), dtype=np.float32)
    query_pids = rng.integers(1, IDENTITIES + 1, QUERIES)
    gallery_pids = np.concatenate([rng.integers(1, IDENTITIES + 1, GALLERY - DISTRACTORS), np.zeros(DISTRACTORS, int)])
    rng.shuffle(gallery_pids)

    def embed(pids: NDArray[np.int64]) -> NDArray[np.float32]:
        noise = np.where(pids == 0, 1.6, 1.1).astype(np.float32)[:, None]
        factors = centers[pids] * (pids > 0)[:, None]
        factors += noise * rng.standard_normal(factors.shape, dtype=np.float32)
        return np.maximum(factors @ mixture, 0) if mixed else factors

    cameras = [rng.integers(0, CAMERAS, QUERIES), rng.integers(0, CAMERAS, GALLERY)]
    return [embed(query_pids), embed(gallery_pids)], [query_pids, gallery_pids, *cameras]


def measure(work: str) -> str:
    """One row: seconds, CPU seconds, peak memory and figures of one evaluation."""
    features, labels = market_like()
    before, start, busy = peak_memory(), perf_counter(), process_time()
    if work == THRESHOLDS:
        found = find_thresholds(*features, *labels).calibration
        rates = ", ".join(f"{one.fmr:g}: {percent(one.tmr)} %" for one in found.cosine.thresholds)
        figures = f"true-match rate by false-match rate, cosine, {found.impostor_pairs:,} impostor pairs: {rates}"
    else:
        result = evaluate(*features, *labels, rerank="rerank" in work)
        figures = f"mAP {result.mAP:.4f}, mAP@50 {result.mAP_at_50:.4f}, Rank-1 {result.rank(1):.4f}"
    seconds, busy = perf_counter() - start, process_time() - busy
    return f"{work:<24}{seconds:>9.1f}{busy:>13.1f}{peak_memory():>12,.0f}{before:>12,.0f}  {figures}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print(f"{QUERIES:,} queries x {GALLERY:,} gallery, {SIZE:,} float32 values each, {IDENTITIES} identities")
    print(machine("numpy") + "\n")
    print(f"{'work':<24}{'seconds':>9}{'CPU seconds':>13}{'peak MiB':>12}{'before':>12}  figures")
    context = multiprocessing.get_context("spawn")
    for work in ("evaluate()", "evaluate(rerank=True)", THRESHOLDS):
        with context.Pool(1) as pool:
            print(pool.apply(measure, (work,)), flush=True)


if __name__ == "__main__":
    main()
