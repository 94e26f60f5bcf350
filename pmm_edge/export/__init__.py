"""From a checkpoint to ONNX, TensorRT, DeepStream and Triton. Names load on first use: not all of it needs torch."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pmm_edge.export.exporter import ExportedFile as ExportedFile
    from pmm_edge.export.exporter import ExportResult as ExportResult
    from pmm_edge.export.exporter import export as export

__all__ = ["ExportResult", "ExportedFile", "export"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'pmm_edge.export' has no attribute '{name}'")
    return getattr(import_module("pmm_edge.export.exporter"), name)


class _CallableModule(ModuleType):
    """Lets `pmm_edge.export(...)` call the function although Python finds this package under the same name."""

    def __call__(self, *arguments: Any, **options: Any) -> ExportResult:
        from pmm_edge.export.exporter import export

        return export(*arguments, **options)


sys.modules[__name__].__class__ = _CallableModule
