"""Train, export and prove person re-identification networks. Names load on first use: no torch until needed."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME_OF = {
    "ModelSpec": "pmm_edge.spec",
    "PmmError": "pmm_edge.errors",
    "build_model": "pmm_edge.model",
    "load_released_checkpoint": "pmm_edge.model",
    "pmm_loss": "pmm_edge.trainer.losses",
    "train": "pmm_edge.trainer.train",
    "evaluate": "pmm_edge.retrieval",
    "load": "pmm_edge.runtime",
}

if TYPE_CHECKING:
    from pmm_edge.errors import PmmError as PmmError
    from pmm_edge.model import build_model as build_model
    from pmm_edge.model import load_released_checkpoint as load_released_checkpoint
    from pmm_edge.retrieval import evaluate as evaluate
    from pmm_edge.runtime import load as load
    from pmm_edge.spec import ModelSpec as ModelSpec
    from pmm_edge.trainer.losses import pmm_loss as pmm_loss
    from pmm_edge.trainer.train import train as train

__all__ = ["ModelSpec", "PmmError", "build_model", "evaluate", "load", "load_released_checkpoint", "pmm_loss", "train"]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'pmm_edge' has no attribute '{name}'")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
