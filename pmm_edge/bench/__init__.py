"""Prove that an export retrieves the same people as its checkpoint, and measure how fast."""

from pmm_edge.bench.figures import BenchReport, Gates, Latency, ModelReport, Parity
from pmm_edge.bench.gates import AskedGates
from pmm_edge.bench.latency import measure_latency
from pmm_edge.bench.parity import compare
from pmm_edge.bench.retrieval import evaluate_embeddings
from pmm_edge.bench.run import bench
from pmm_edge.bench.subjects import Options

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
