"""Compare exported models with their reference, and measure how fast they are."""

from pmm_edge.bench.parity import GateOverrides
from pmm_edge.bench.pipeline import BenchResult, bench
from pmm_edge.bench.report import BenchReport, ModelReport, read_report

__all__ = ["BenchReport", "BenchResult", "GateOverrides", "ModelReport", "bench", "read_report"]
