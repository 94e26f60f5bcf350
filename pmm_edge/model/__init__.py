"""PMM and the networks it is compared with. `network.py` and `mixing.py` contain the whole method."""

from pmm_edge.model.checkpoint import (
    Checkpoint,
    build_model,
    load_checkpoint,
    load_released_checkpoint,
    save_checkpoint,
)
from pmm_edge.model.network import PMM, ReidNetwork, StageOutput

__all__ = [
    "PMM",
    "Checkpoint",
    "ReidNetwork",
    "StageOutput",
    "build_model",
    "load_checkpoint",
    "load_released_checkpoint",
    "save_checkpoint",
]
