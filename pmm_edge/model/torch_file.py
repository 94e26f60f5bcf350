"""Files of `torch.save` from anybody, read as data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pmm_edge.errors import ModelError

# Research code often saves its best figure as a numpy scalar: plain data, but not on torch's own list.
_SCALAR = np.float64(0).__reduce__()[0]
_NUMPY_SCALARS: list[Any] = [
    (_SCALAR, "numpy._core.multiarray.scalar"),
    (_SCALAR, "numpy.core.multiarray.scalar"),  # as numpy 1 wrote it
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float32", "float64", "int32", "int64")),
]


def read_torch_file(path: Path) -> Any:
    """Read a file of `torch.save` as data: tensors and plain values, no code is run.

    Raises:
        ModelError: the file is missing, truncated, or holds anything else.
    """
    if not path.is_file():
        raise ModelError(f"{path} does not exist", "Name a checkpoint; pmm train writes them to runs/*/best.pt")
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            return torch.load(path, map_location="cpu", weights_only=True)
    # What torch's reader raises on bytes that are no checkpoint has nothing in common but this.
    except Exception as error:
        raise ModelError(
            f"{path} cannot be read as a checkpoint: it is truncated, no file of torch, or holds more than data",
            "Train again, or fetch the file again",
        ) from error
