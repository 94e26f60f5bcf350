"""Running means of an epoch: what the progress bar and the journal show."""

from __future__ import annotations

import time

import torch
from torch import Tensor

REPORT_SECONDS = 0.25


class Meter:
    """Means of an epoch's loss parts, kept on the device: reading them is what waits for it."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._names: list[str] = []
        self._steps = self._images = 0
        self._start = self._reported = time.perf_counter()

    def add(self, loss: Tensor, parts: dict[str, Tensor], count: int) -> None:
        self._names = ["loss", *parts]
        values = torch.stack([loss, *parts.values()])
        self._sums = values if self._sums is None else self._sums + values
        self._steps += 1
        self._images += count

    def due(self) -> bool:
        """Whether it is time to show something again."""
        return time.perf_counter() - self._reported > REPORT_SECONDS

    def means(self) -> dict[str, float]:
        self._reported = time.perf_counter()
        if self._sums is None:
            return {}
        return dict(zip(self._names, (self._sums / self._steps).tolist(), strict=True))

    def images_per_second(self) -> float:
        return self._images / (time.perf_counter() - self._start)

    def text(self) -> str:
        means = self.means()
        stages = range(1, len(means) // 2 + 1)
        triplets = "/".join(f"{means[f'triplet_{stage}']:.2f}" for stage in stages)
        identities = "/".join(f"{means[f'identity_{stage}']:.2f}" for stage in stages)
        speed = f"{self.images_per_second():.0f} images/s"
        return f"loss {means['loss']:.2f} (triplet {triplets}, id {identities}) · {speed}"
