"""What a run writes down as it goes: metrics.jsonl for programs, TensorBoard for people, log.txt for both."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter


class Journal:
    """The journal of a run folder; a resumed run goes on in the same files."""

    def __init__(self, folder: Path) -> None:
        self._log = (folder / "log.txt").open("a", encoding="utf-8", buffering=1)
        self._metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"))

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.say(f"stopped by {type(error).__name__}: {error}")
        self._board.close()
        self._metrics.close()
        self._log.close()

    def say(self, text: str) -> None:
        """Add a line to log.txt."""
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def record(self, kind: str, epoch: int, values: dict[str, float]) -> None:
        """Add figures of an epoch, `kind` being `train` or `evaluate`, to every file."""
        self._metrics.write(json.dumps({"kind": kind, "epoch": epoch, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, epoch)
        self.say(f"epoch {epoch} {kind}: " + ", ".join(f"{name} {value:.5g}" for name, value in values.items()))
