"""Running means of an epoch, and the first step whose loss was not finite: read seldom, for reading waits."""

from __future__ import annotations

import time

import torch
from torch import Tensor

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
