"""What a run writes down as it goes: metrics.jsonl for programs, TensorBoard for people, log.txt for both."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter

from pmm_edge.files import written_whole

LOG, METRICS, TENSORBOARD = "log.txt", "metrics.jsonl", "tensorboard"


class Journal:
    """The journal of a run folder; a resumed run goes on in the same files.

    Args:
        epoch: the last whole epoch; what a killed run wrote beyond it is dropped, for it is trained again.
        judged: the last epoch that was evaluated, None where none was: evaluations beyond it are made again.
        active: False in the processes that only help; they write nothing.
    """

    def __init__(self, folder: Path, epoch: int = 0, judged: int | None = None, active: bool = True) -> None:
        self._folder, self._active, self._board = folder, active, None
        if active:
            last = {"train": epoch, "evaluate": -1 if judged is None else judged}
            _drop_beyond(folder / METRICS, last)
            self._board = SummaryWriter(str(folder / TENSORBOARD), purge_step=0 if judged is None else epoch + 1)

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
        if self._active:
            with (self._folder / name).open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def _drop_beyond(metrics: Path, last: dict[str, int]) -> None:
    """Keep the lines of each kind up to its last epoch."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):  # a line that a kill cut off
            values = json.loads(line)
            if values["epoch"] <= last[values["kind"]]:
                kept.append(line + "\n")
    with written_whole(metrics) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
