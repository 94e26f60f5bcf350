"""CMC and mAP at Market-1501's size: `evaluate_distances` against a plain numpy implementation of the protocol.

The plain one sorts the whole gallery for each query (argsort) and walks down the ranking, as Python evaluations
of the field do. Both get the same distances in one run; the figures must agree before a time is printed.

    python benchmarks/retrieval.py           # the plain one on every 16th query, extrapolated
    python benchmarks/retrieval.py --full    # the plain one on all queries
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter

import numpy as np
from evaluation import IDENTITIES, market_like
from machine import machine
from numpy.typing import NDArray

from pmm_edge.retrieval import evaluate_distances, pairwise_distances

REPEATS = 7
SUBSET_STEP = 16


def plain_evaluate(
    distances: NDArray[np.float32],
    query_pids: NDArray[np.int64],
    gallery_pids: NDArray[np.int64],
    query_camids: NDArray[np.int64],
    gallery_camids: NDArray[np.int64],
    max_rank: int = 50,
) -> tuple[float, float]:
    """Return mAP and Rank-1 by the protocol's definition: for each query, argsort, drop, walk."""
    order = np.argsort(distances, axis=1, kind="stable")
    matches = gallery_pids[order] == query_pids[:, None]
    precisions, curves = [], []
    for query in range(len(distances)):
        own = (gallery_pids[order[query]] == query_pids[query]) & (gallery_camids[order[query]] == query_camids[query])
        hits = matches[query][~own].astype(int)
        if not hits.any():
            continue
        found = hits.cumsum()
        curves.append(np.minimum(found, 1)[:max_rank])
        precision = [count / rank for rank, count in enumerate(found, 1)]
        precisions.append((np.asarray(precision) * hits).sum() / hits.sum())
    return float(np.mean(precisions)), float(np.mean(curves, axis=0)[0])


def seconds(work: Callable[[], object]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="run the plain implementation on all queries")
    step = 1 if parser.parse_args().full else SUBSET_STEP

    features, labels = market_like(mixed=False)
    distances = pairwise_distances(*features)
    some = distances[::step], labels[0][::step], labels[1], labels[2][::step], labels[3]
    result, ours = evaluate_distances(distances, *labels), evaluate_distances(*some)
    np.testing.assert_allclose((ours.mAP, ours.rank(1)), plain_evaluate(*some), rtol=1e-9)

    untrained = np.random.default_rng(1).random(distances.shape, np.float32)
    fast = [seconds(lambda: evaluate_distances(distances, *labels)) for _ in range(REPEATS)]
    worst = [seconds(lambda: evaluate_distances(untrained, *labels)) for _ in range(REPEATS)]
    plain_once = seconds(lambda: plain_evaluate(*some))
    plain = plain_once * len(distances) / len(some[0])
    floor = median(seconds(lambda: distances.max()) for _ in range(REPEATS))

    note = "measured once on all queries"
    if step > 1:
        note = f"EXTRAPOLATED from {len(some[0])} queries that took {plain_once:.2f} s"
    print(
        f"{len(distances):,} queries x {distances.shape[1]:,} gallery, float32 distances given, {IDENTITIES} identities"
    )
    print(f"mAP {result.mAP:.4f}, Rank-1 {result.rank(1):.4f}, mINP {result.mINP:.4f}; both implementations agree")
    print(machine("numpy") + "\n")
    rows = [
        ("evaluate_distances", median(fast), f"median of {REPEATS}, {min(fast):.3f} to {max(fast):.3f}"),
        ("the same, random distances", median(worst), f"median of {REPEATS}, {min(worst):.3f} to {max(worst):.3f}"),
        ("plain numpy, argsort per query", plain, note),
        ("floor: reading the distances", floor, f"one max() of {distances.nbytes / 1e9:.2f} GB, median of {REPEATS}"),
    ]
    print(f"{'work':<32}{'seconds':>9}{'ratio':>8}  note")
    for work, time, remark in rows:
        print(f"{work:<32}{time:>9.3f}{time / median(fast):>8.2f}  {remark}")


if __name__ == "__main__":
    main()
