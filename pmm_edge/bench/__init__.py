"""Compare exported models with their reference, and measure how fast they are. Names load on first use."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from pmm_edge import CallableModule

if TYPE_CHECKING:
    from pmm_edge.bench.pipeline import BenchResult as BenchResult
    from pmm_edge.bench.pipeline import bench as bench
    from pmm_edge.bench.report import BenchReport as BenchReport
    from pmm_edge.bench.report import ModelReport as ModelReport
    from pmm_edge.bench.report import read_report as read_report

__all__ = ["BenchReport", "BenchResult", "ModelReport", "bench", "read_report"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'pmm_edge.bench' has no attribute '{name}'")
    module = "pipeline" if name in ("BenchResult", "bench") else "report"
    return getattr(import_module(f"pmm_edge.bench.{module}"), name)


sys.modules[__name__].__class__ = CallableModule
