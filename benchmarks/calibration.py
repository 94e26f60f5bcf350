"""Decision thresholds at Market-1501's size: `find_thresholds` from embeddings to thresholds, intervals and curves.

    python benchmarks/calibration.py

It runs once, in a process of its own, so that the peak of memory is its own. The embeddings are those of
`benchmarks/evaluation.py`.
"""

from __future__ import annotations

import argparse
import multiprocessing
from time import perf_counter, process_time

from evaluation import GALLERY, MIB, QUERIES, SIZE, market_like, peak_memory
from machine import machine

from pmm_edge.retrieval.thresholds import find_thresholds


def measure() -> str:
    """One row: seconds, CPU seconds, peak memory and thresholds."""
    features, labels = market_like()
    before = peak_memory()
    start, busy = perf_counter(), process_time()
    found = find_thresholds(*features, *labels).calibration
    seconds, busy = perf_counter() - start, process_time() - busy
    memory = f"{peak_memory() / MIB:>12,.0f}{before / MIB:>12,.0f}"
    rates = ", ".join(f"{one.fmr:g}: {100 * one.tmr:.1f} %" for one in found.cosine.thresholds)
    return f"{seconds:>9.1f}{busy:>13.1f}{memory}{found.impostor_pairs:>16,}  {rates}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print(f"{QUERIES:,} queries x {GALLERY:,} gallery, {SIZE:,} float32 values each")
    print(machine("numpy") + "\n")
    head = f"{'seconds':>9}{'CPU seconds':>13}{'peak MiB':>12}{'before':>12}{'impostor pairs':>16}"
    print(f"{head}  true-match rate by false-match rate, cosine")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(measure))


if __name__ == "__main__":
    main()
