"""What a run writes down as it goes: metrics.jsonl for programs, TensorBoard for people, log.txt for both."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter

LOG, METRICS, TENSORBOARD = "log.txt", "metrics.jsonl", "tensorboard"


class Journal:
    """The journal of a run folder; a resumed run goes on in the same files.

    Args:
        active: False in the processes that only help; they write nothing.
    """

    def __init__(self, folder: Path, active: bool = True) -> None:
        self._folder, self._board = folder, SummaryWriter(str(folder / TENSORBOARD)) if active else None

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as closing:
            if self._board:
                closing.callback(self._board.close)
            if error is not None:
                self.say(f"stopped by {type(error).__name__}: {error}")

    def say(self, text: str) -> None:
        """Add a line to log.txt."""
        self._append(LOG, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def record(self, kind: str, epoch: int, values: dict[str, float]) -> None:
        """Add figures of an epoch, `kind` being `train` or `evaluate`, to every file."""
        self._append(METRICS, json.dumps({"kind": kind, "epoch": epoch, **values}))
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, epoch)
        self.say(f"epoch {epoch} {kind}: " + ", ".join(f"{name} {value:.5g}" for name, value in values.items()))

    def _append(self, name: str, line: str) -> None:
        if self._board:
            with (self._folder / name).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
