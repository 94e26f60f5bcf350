"""Running means of an epoch, and the first step whose loss was not finite: read seldom, for reading waits."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from pmm_edge.files import written_whole

REPORT_SECONDS = 0.25


class Meter:
    """Sums on the device."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._bad_step: Tensor | None = None
        self._names: list[str] = []
        self._steps = self._images = 0
        self._waited = 0.0
        self._start = self._reported = time.perf_counter()

    def add(self, loss: Tensor, parts: dict[str, Tensor], step: int, images: int) -> None:
        """Add the results of the epoch's step number `step`; nothing waits for the device."""
        self._names = ["loss", *parts]
        values = torch.stack([loss, *parts.values()])
        now_bad = torch.where(torch.isfinite(values).all(), -1, step)
        if self._sums is None or self._bad_step is None:
            self._sums, self._bad_step = values, now_bad
        else:
            self._sums = self._sums + values
            self._bad_step = torch.where(self._bad_step < 0, now_bad, self._bad_step)
        self._steps += 1
        self._images += images

    def waited(self, seconds: float) -> None:
        """Add time in which the step had no data to work on."""
        self._waited += seconds

    def due(self) -> bool:
        """Whether it is time to show something again."""
        return time.perf_counter() - self._reported > REPORT_SECONDS

    def bad_step(self) -> int | None:
        """The first step whose loss was not finite."""
        step = -1 if self._bad_step is None else int(self._bad_step)
        return None if step < 0 else step

    def means(self) -> dict[str, float]:
        self._reported = time.perf_counter()
        if self._sums is None:
            return {}
        return dict(zip(self._names, (self._sums / self._steps).tolist(), strict=True))

    def images_per_second(self) -> float:
        return self._images / (time.perf_counter() - self._start)

    def data_wait(self) -> float:
        """The share of the time in which the step had no data to work on."""
        return self._waited / (time.perf_counter() - self._start)

    def text(self) -> str:
        """One line for a progress bar."""
        means = self.means()
        stages = range(1, len(means) // 2 + 1)
        triplets = "/".join(f"{means[f'triplet_{stage}']:.2f}" for stage in stages)
        identities = "/".join(f"{means[f'identity_{stage}']:.2f}" for stage in stages)
        speed = f"{self.images_per_second():.0f} images/s"
        return f"loss {means['loss']:.2f} (triplet {triplets}, id {identities}) · {speed}"


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
