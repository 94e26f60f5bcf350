"""From a checkpoint to ONNX, TensorRT, DeepStream and Triton. Names load on first use: not all of it needs torch."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from pmm_edge import CallableModule

if TYPE_CHECKING:
    from pmm_edge.export.exporter import ExportedFile, ExportResult, export

__all__ = ["ExportResult", "ExportedFile", "export"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'pmm_edge.export' has no attribute '{name}'")
    return getattr(import_module("pmm_edge.export.exporter"), name)


sys.modules[__name__].__class__ = CallableModule
