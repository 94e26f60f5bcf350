"""Prove that an export retrieves the same people as its checkpoint, and measure how fast."""

from pmm_edge.bench.comparison import bench
from pmm_edge.bench.figures import Latency
from pmm_edge.bench.latency import measure_latency
from pmm_edge.bench.parity import Gates, Parity, compare
from pmm_edge.bench.report import BenchReport, ModelReport
from pmm_edge.bench.retrieval import evaluate_embeddings, evaluate_model

__all__ = [
    "BenchReport",
    "Gates",
    "Latency",
    "ModelReport",
    "Parity",
    "bench",
    "compare",
    "evaluate_embeddings",
    "evaluate_model",
    "measure_latency",
]
