"""What a user chooses for a TensorRT engine, and the command that makes the same engine again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pmm_edge.errors import PmmError

OPTIMIZATION_LEVELS = range(6)
MOST_GIB = 1 << 20
"""More memory than any machine has; infinity and what no number of bytes can say lie above."""


@dataclass(frozen=True)
class BatchProfile:
    """The batch sizes that an engine takes, and the one that it is tuned for.

    Raises:
        PmmError: not 1 <= minimum <= optimal <= maximum.
    """

    minimum: int = 1
    optimal: int = 16
    maximum: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimal <= self.maximum:
            raise PmmError(
                f"batch profile {self} is out of order",
                "Give minimum,optimal,maximum with 1 <= minimum <= optimal <= maximum, like 1,16,64",
            )

    @staticmethod
    def parse(text: str) -> BatchProfile:
        """Read `1,16,64`.

        Raises:
            PmmError: not three whole numbers in order.
        """
        parts = text.split(",")
        if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
            raise PmmError(
                f"batch profile '{text}' is not three whole numbers", "Give minimum,optimal,maximum, like 1,16,64"
            )
        return BatchProfile(*map(int, parts))

    @staticmethod
    def chosen(text: str | None, static_batch: int | None) -> BatchProfile:
        """The profile that was asked for; of a graph with one batch size that size alone.

        Args:
            text: such as `1,16,64`; None where none was given.
            static_batch: the only batch size that the graph takes; None for any.

        Raises:
            PmmError: `text` is not three whole numbers in order, or contradicts the batch of the graph.
        """
        asked = BatchProfile() if text is None else BatchProfile.parse(text)
        if static_batch is None:
            return asked
        only = BatchProfile(static_batch, static_batch, static_batch)
        if text is not None and asked != only:
            raise PmmError(
                f"--batch {asked} contradicts the graph's static batch of {static_batch}",
                f"Leave it out, or give --batch {only}",
            )
        return only

    def __str__(self) -> str:
        return f"{self.minimum},{self.optimal},{self.maximum}"


@dataclass(frozen=True)
class BuildSettings:
    """How an engine is built from an ONNX file.

    Raises:
        PmmError: a value outside of its range.
    """

    batch: BatchProfile = BatchProfile()
    workspace_gib: float | None = None
    """Limit of the scratch memory that a layer may use; None leaves it to TensorRT: all that the GPU has."""
    optimization_level: int = 3
    """0 builds fastest, 5 searches longest; 3 is TensorRT's default."""
    hardware_compatible: bool = False
    """Runs on every GPU from Ampere on, at some loss of speed. Not for Jetson boards."""
    version_compatible: bool = False
    """Runs with later versions of TensorRT as well, at some loss of speed."""
    timing_cache: bool = True
    """Keep the timings of layers for the next build on the same GPU and TensorRT."""

    def __post_init__(self) -> None:
        if self.workspace_gib is not None and not 0 < self.workspace_gib <= MOST_GIB:  # NaN is neither
            raise PmmError(
                f"a workspace of {self.workspace_gib:g} GiB cannot be had",
                "Give more than 0 and no more than the GPU has, or leave it out",
            )
        if self.optimization_level not in OPTIMIZATION_LEVELS:
            raise PmmError(f"optimization level {self.optimization_level} does not exist", "Give 0 to 5")

    def command(self, onnx: Path, engine: Path | None = None, also: Sequence[str] = ()) -> str:
        """The `pmm` command that builds `onnx` with these settings.

        Args:
            onnx: the file.
            engine: what it writes; None for the default place, beside `onnx`.
            also: further words, such as `--triton models`.
        """
        words = ["pmm", "export", str(onnx), "--trt", "--batch", str(self.batch)]
        if engine and engine != onnx.with_suffix(".engine"):
            words += ["--out", str(engine)]
        if self.workspace_gib is not None:
            words += ["--workspace", f"{self.workspace_gib:g}"]
        if self.optimization_level != BuildSettings.optimization_level:
            words += ["--optimization-level", str(self.optimization_level)]
        if self.hardware_compatible:
            words.append("--hardware-compatible")
        if self.version_compatible:
            words.append("--version-compatible")
        if not self.timing_cache:
            words.append("--no-timing-cache")
        return shlex.join([*words, *also])
