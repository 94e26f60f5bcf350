"""Compare the latency that `pmm bench` reports with a direct loop over ONNX Runtime, and with itself.

    python benchmarks/bench_latency.py [--backbone resnet50] [--batch 1,8] [--rounds 5] [--json]

The direct loop is that of onnxruntime_perf_test: the same file, the same input, run after run. In each round the bench
measures, then the loop, then the bench again, each with its own session, so that drift of the machine affects both
alike. The exit code is 1 if, in the median of the rounds, the bench differs from the loop by more than 3 % or from
itself by more than 5 %.

The weights are random: latency does not depend on them.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime
from inference import HEIGHT, WIDTH, random_checkpoint
from machine import machine

from pmm_edge.bench.timing import measure_latency
from pmm_edge.console import print_json
from pmm_edge.export import export
from pmm_edge.runtime import load
from pmm_edge.runtime.embedder import INPUT, OUTPUT

MAX_FROM_LOOP, MAX_FROM_SELF = 0.03, 0.05
RUNS, SECONDS = 50, 2.0


@dataclass(frozen=True)
class Agreement:
    """Median milliseconds over the rounds, and their differences."""

    batch: int
    loop_ms: float
    bench_ms: float
    from_loop: float
    """Median relative difference from the loop; negative if the bench is faster."""
    from_self: float
    """Median relative difference between two measurements of the bench."""
    from_self_worst: float

    @property
    def passed(self) -> bool:
        return abs(self.from_loop) <= MAX_FROM_LOOP and self.from_self <= MAX_FROM_SELF


def agreement(onnx: Path, crops: np.ndarray, batch: int, rounds: int) -> Agreement:
    fed = np.resize(crops, (batch, *crops.shape[1:]))
    first, loop, second = [], [], []
    for _ in range(rounds):
        first.append(bench(onnx, fed))
        loop.append(direct_loop(onnx, fed))
        second.append(bench(onnx, fed))
    apart = [max(a, b) / min(a, b) - 1 for a, b in zip(first, second, strict=True)]
    ratios = [(a + b) / 2 / direct for a, direct, b in zip(first, loop, second, strict=True)]
    return Agreement(batch, median(loop), median(first + second), median(ratios) - 1, median(apart), max(apart))


def bench(onnx: Path, fed: np.ndarray) -> float:
    (found,) = measure_latency([load(onnx, "cpu")], [fed], len(fed), RUNS, SECONDS)
    return found.median_ms


def direct_loop(onnx: Path, fed: np.ndarray) -> float:
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    for _ in range(10):
        session.run([OUTPUT], {INPUT: fed})
    taken: list[float] = []
    while len(taken) < RUNS or sum(taken) < SECONDS:
        start = time.perf_counter()
        session.run([OUTPUT], {INPUT: fed})
        taken.append(time.perf_counter() - start)
    return 1000 * median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--batch", default="1,8", help="batch sizes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    where = machine("onnxruntime-gpu", "onnxruntime", "numpy")  # before the load is this script's own
    crops = np.random.default_rng(0).integers(0, 256, (8, HEIGHT, WIDTH, 3), dtype=np.uint8)
    with TemporaryDirectory() as folder:
        checkpoint = random_checkpoint(Path(folder) / "random.pt", arguments.backbone)
        onnx = export(checkpoint, out=Path(folder) / "model.onnx").files[0].path
        found = [agreement(onnx, crops, int(batch), arguments.rounds) for batch in arguments.batch.split(",")]

    if arguments.json:
        print_json({"machine": where, **vars(arguments), "results": found})
    else:
        print(where)
        print(f"PMM {arguments.backbone} {HEIGHT}×{WIDTH}, FP32, CPU, medians of {arguments.rounds} rounds")
        print("batch   direct loop ms   pmm bench ms   difference   of two benches (worst)")
        for one in found:
            print(
                f"{one.batch:5d}   {one.loop_ms:14.2f}   {one.bench_ms:12.2f}   {one.from_loop:+9.1%}"
                f"   {one.from_self:14.1%} ({one.from_self_worst:.1%})"
            )
        print(f"limits  {' ' * 33} ±{MAX_FROM_LOOP:.1%}   {MAX_FROM_SELF:14.1%}")
    if not all(one.passed for one in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
