"""From a checkpoint to what runs without torch. Names load on first use: building an engine needs no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

_HOME_OF = {
    "Exported": "pmm_edge.export.exporter",
    "export_forms": "pmm_edge.export.exporter",
    "export_onnx": "pmm_edge.export.exporter",
    "export_safetensors": "pmm_edge.export.exporter",
    "Fp16": "pmm_edge.export.options",
    "Graph": "pmm_edge.export.options",
    "Int8": "pmm_edge.export.options",
    "inference_network": "pmm_edge.export.graph",
}

if TYPE_CHECKING:
    from pmm_edge.export.exporter import Exported, export_forms, export_onnx, export_safetensors
    from pmm_edge.export.graph import inference_network
    from pmm_edge.export.options import Fp16 as Fp16
    from pmm_edge.export.options import Graph as Graph
    from pmm_edge.export.options import Int8 as Int8

__all__ = [
    "Exported",
    "Fp16",
    "Graph",
    "Int8",
    "export_forms",
    "export_onnx",
    "export_safetensors",
    "inference_network",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'pmm_edge.export' has no attribute '{name}'")
    return getattr(import_module(_HOME_OF[name]), name)
