"""What a run records: running means of an epoch, and the log, metrics and TensorBoard files of its folder."""

import json
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from pmm_edge.console import printable
from pmm_edge.files import utf8_path, written_whole

LOG, METRICS, TENSORBOARD = "log.txt", "metrics.jsonl", "tensorboard"
REPORT_SECONDS = 0.25


class Meter:
    """Running means of an epoch. They are summed on the device, because reading a result waits for it."""

    def __init__(self) -> None:
        self._sums, self._bad_step = torch.zeros(0), torch.tensor(-1)
        self._names: list[str] = []
        self._steps = self._images = 0
        self.waited = 0.0  # seconds that steps waited for their data
        self._start = self._read = time.perf_counter()

    def add(self, loss: Tensor, parts: dict[str, Tensor], step: int, images: int) -> None:
        """Add the losses of a step without waiting for the device."""
        self._names = ["loss", *parts]
        values = torch.stack([loss, *parts.values()])
        if not self._steps:
            self._sums, self._bad_step = torch.zeros_like(values), torch.full_like(loss, -1, dtype=torch.int64)
        self._sums = self._sums + values
        # Once a loss is not finite, all later sums are not either.
        finite = torch.isfinite(self._sums).all()
        self._bad_step = torch.where(finite | (self._bad_step >= 0), self._bad_step, step)
        self._steps += 1
        self._images += images

    def due(self) -> bool:
        """Whether the means were last read more than `REPORT_SECONDS` ago."""
        return time.perf_counter() - self._read > REPORT_SECONDS

    def bad_step(self) -> int | None:
        """The first step whose loss was not finite."""
        return None if self._bad_step < 0 else int(self._bad_step)

    def means(self) -> dict[str, float]:
        """Mean loss and parts, images per second, and the fraction of the time that steps waited for their data."""
        losses = dict(zip(self._names, (self._sums / self._steps).tolist(), strict=True))
        self._read = time.perf_counter()
        seconds = self._read - self._start
        return {**losses, "images_per_second": self._images / seconds, "data_wait": self.waited / seconds}


class Journal:
    """The log, metrics and TensorBoard files of a run folder; a resumed run appends to them.

    `epoch` is the last complete epoch, `evaluated` the last evaluated one (None before the first evaluation). What a
    killed run recorded after them is removed, because it is done again. `active` is False in processes that do not
    write files.
    """

    def __init__(self, folder: Path, epoch: int, evaluated: int | None, active: bool) -> None:
        self._folder, self._active = folder, active
        if not active:
            return
        path, last, kept = folder / METRICS, {"train": epoch, "evaluate": -1 if evaluated is None else evaluated}, ""
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
            with suppress(ValueError, KeyError, TypeError, RecursionError):  # an incomplete or damaged line
                values = json.loads(line)
                kept += line + "\n" if values["epoch"] <= last[values["kind"]] else ""
        with written_whole(path) as temporary:
            temporary.write_text(kept, encoding="utf-8")
        self._stack = ExitStack()
        board = self._stack.enter_context(utf8_path(folder / TENSORBOARD))
        self._board = SummaryWriter(str(board), purge_step=0 if evaluated is None else epoch + 1)
        self._stack.callback(self._board.close)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.write(f"stopped by {type(error).__name__}: {error}")
        if self._active:
            self._stack.close()

    def write(self, text: str) -> None:
        """Add a line to log.txt."""
        self._append(LOG, printable(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"))

    def record(self, kind: str, epoch: int, values: dict[str, float]) -> None:
        """Record the figures of an epoch in all files; `kind` is `train` or `evaluate`."""
        self._append(METRICS, json.dumps({"kind": kind, "epoch": epoch, **values}))
        for name, value in values.items() if self._active else ():
            self._board.add_scalar(f"{kind}/{name}", value, epoch)
        self.write(f"epoch {epoch} {kind}: " + ", ".join(f"{name} {value:.5g}" for name, value in values.items()))

    def _append(self, name: str, line: str) -> None:
        if self._active:
            with (self._folder / name).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
