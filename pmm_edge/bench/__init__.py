"""Prove that an export retrieves the same people as its checkpoint, and measure how fast."""

from pmm_edge.bench.parity import compare, evaluate_embeddings
from pmm_edge.bench.pipeline import Options, bench
from pmm_edge.bench.report import AskedGates, BenchReport, Gates, Latency, ModelReport, Parity
from pmm_edge.bench.timing import measure_latency

__all__ = [
    "AskedGates",
    "BenchReport",
    "Gates",
    "Latency",
    "ModelReport",
    "Options",
    "Parity",
    "bench",
    "compare",
    "evaluate_embeddings",
    "measure_latency",
]
