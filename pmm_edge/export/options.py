"""What can be asked of an export, checked before any work; importing this imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pmm_edge.errors import PmmError
from pmm_edge.spec import CalibrationMethod, QuantizationTarget

OPSET = 18
"""What torch's exporter writes by itself: for any other, its graph goes through a converter."""
OPSETS = range(17, 21)

Target = QuantizationTarget
Method = CalibrationMethod


@dataclass(frozen=True)
class Graph:
    """How the graph is written."""

    opset: int = OPSET
    """17 to 20."""
    normalize_output: bool = False
    """Embeddings of length 1 (L2), so that Euclidean distance ranks as cosine does."""
    static_batch: int | None = None
    """The only batch size that the graph takes; None for any."""

    def __post_init__(self) -> None:
        if self.opset not in OPSETS:
            raise PmmError(f"opset {self.opset} cannot be written", f"Choose {OPSETS[0]} to {OPSETS[-1]}")
        if self.static_batch is not None and self.static_batch < 1:
            raise PmmError(f"a batch of {self.static_batch} images cannot be embedded", "Choose 1 or more")


@dataclass(frozen=True)
class Fp16:
    """Cast to float16."""

    calibration: Path | None = None
    """A data set whose crops show how large the network's values get; None leaves that unchecked."""
    layout: str | None = None
    """The data set's, where it is not recognised."""


@dataclass(frozen=True)
class Int8:
    """Quantise to 8 bits."""

    calibration: Path
    """A data set whose training split calibrates."""
    target: Target = "tensorrt"
    """The engine that will run it: the two want different graphs."""
    method: Method | None = None
    """How ranges are told from values; None tries all three and takes the one that loses least."""
    max_map_drop: float | None = None
    """Points of mAP that may be lost on the data set's query and gallery; layers stay in float32 until that holds."""
    layout: str | None = None
    """The data set's, where it is not recognised."""

    def __post_init__(self) -> None:
        if self.max_map_drop is not None and not 0 <= self.max_map_drop <= 100:
            raise PmmError(f"a mAP drop of {self.max_map_drop} points cannot be asked for", "Choose such as 0.5")


Precision = Fp16 | Int8
