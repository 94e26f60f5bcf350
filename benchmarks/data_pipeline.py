"""Images a second that reach a training step, beside a plain PIL DataLoader, and the share of time a step waits.

The plain loader is what training scripts of the field have: worker processes that decode, resize, flip, normalise
and erase one image at a time, and collate. Ours decodes once, keeps uint8 crops, and augments the whole batch.
A step of the given length then shows how much of the time it has to wait for data.

    python benchmarks/data_pipeline.py                    # the synthetic set
    python benchmarks/data_pipeline.py DATA --height 384 --width 128 --step 0.05
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch
from machine import machine
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from pmm_edge.data.augment import augment
from pmm_edge.data.crops import Crops
from pmm_edge.data.dataset import scan
from pmm_edge.data.sampler import identity_batches
from pmm_edge.data.synthetic import cached_synthetic
from pmm_edge.spec import IMAGENET_MEAN, IMAGENET_STD

BATCH, IDENTITIES = 64, 16


class PlainImages(Dataset):
    """Decode and transform an image each time it is asked for."""

    def __init__(self, paths: list[Path], height: int, width: int) -> None:
        self.paths = paths
        self.transform = transforms.Compose(
            [
                transforms.Resize((height, width)),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
                transforms.RandomErasing(p=0.5, scale=(0.08, 0.08), ratio=(1, 1), value=0),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--height", type=int, default=384)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--step", type=float, default=0.5, help="seconds of a training step, slept, not computed")
    parser.add_argument("--epochs", type=int, default=3, help="the first fills the cache and is shown apart")
    options = parser.parse_args()

    split = scan(options.data or cached_synthetic()).train
    plain = DataLoader(
        PlainImages(split.paths, options.height, options.width),
        batch_sampler=_PlainSampler(split.pids),
        num_workers=os.cpu_count() or 1,
    )
    crops = Crops(split.paths, options.height, options.width)
    rows = {"first epoch": [], "pmm train": [], "plain DataLoader": []}
    for epoch in range(options.epochs):
        ours = _images_per_second(_augmented(crops, split.pids, epoch, options.height))
        rows["pmm train" if epoch else "first epoch"].append(ours)
        if epoch:
            rows["plain DataLoader"].append(_images_per_second(iter(plain)))

    console = Console()
    console.print(machine("torch", "pillow"), soft_wrap=True)
    title = f"{len(split):,} images at {options.height}x{options.width}, batches of {BATCH}"
    table = Table("", "images/s", "ratio to the plain loader", title=title, title_justify="left")
    for name, speeds in rows.items():
        ratio = median(speeds) / median(rows["plain DataLoader"])
        table.add_row(name, f"{median(speeds):,.0f}", f"{ratio:.1f}")
    console.print(table)
    share = _share_waiting(crops, split.pids, options.step)
    console.print(f"a step of {options.step:g} s that leaves the processor free waits {100 * share:.2f} % for data")


class _PlainSampler:
    """The same batches as ours."""

    def __init__(self, pids: np.ndarray) -> None:
        self.batches = [batch.tolist() for batch in _batches(pids, seed=99)]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _batches(pids: np.ndarray, seed: int) -> list[np.ndarray]:
    return identity_batches(pids, IDENTITIES, BATCH // IDENTITIES, np.random.default_rng(seed))


def _augmented(crops: Crops, pids: np.ndarray, seed: int, height: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for images in crops.prefetched(_batches(pids, seed)):
        yield augment(torch.from_numpy(images), height // 6, generator)


def _images_per_second(batches: Iterator[torch.Tensor]) -> float:
    start, images = time.perf_counter(), 0
    for batch in batches:
        images += len(batch)
    return images / (time.perf_counter() - start)


def _share_waiting(crops: Crops, pids: np.ndarray, step: float) -> float:
    waited, start = 0.0, time.perf_counter()
    ahead = crops.prefetched(_batches(pids, 0))
    while True:
        asked = time.perf_counter()
        if next(ahead, None) is None:
            break
        waited += time.perf_counter() - asked
        time.sleep(step)
    return waited / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
