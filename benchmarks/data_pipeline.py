"""Images per second that reach a training step, compared with a plain PIL DataLoader, and how long a step waits.

The plain loader is that of common training scripts: worker processes that decode, resize, flip, normalize and erase
one image at a time, and collate. Ours decodes once, keeps uint8 crops, and augments the whole batch on the training
device. Its two parts are shown separately: a GPU needs only the assembly of batches in host memory from the CPU; with
the augmentation, they are what the plain loader yields.

The second table shows how much of its time a step waits for data: a step of `pmm train` on this machine, by the
trainer's own meter, and one that sleeps as long as a fast GPU would compute and leaves the CPU free.

    python benchmarks/data_pipeline.py                    # the synthetic set
    python benchmarks/data_pipeline.py DATA --height 384 --width 128 --step 0.05
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
from machine import machine
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from pmm_edge.console import print_line, print_table
from pmm_edge.data.augment import augment
from pmm_edge.data.dataset import Split, scan
from pmm_edge.data.loader import Crops, identity_batches
from pmm_edge.data.synthetic import cached_synthetic
from pmm_edge.spec import IMAGENET_MEAN, IMAGENET_STD
from pmm_edge.trainer.config import TrainConfig, choose_config
from pmm_edge.trainer.device import World, choose_machine
from pmm_edge.trainer.logging import Meter
from pmm_edge.trainer.step import Feed, prepare, train_step
from pmm_edge.trainer.train import new_network

BATCH, IDENTITIES = 64, 16
MIN_BATCHES = 30
PLAIN = "plain PIL DataLoader"


class PlainImages(Dataset):
    """Decode and transform an image at each access."""

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
    parser.add_argument("--device", default="cpu", help="where the augmentation and the real step run")
    parser.add_argument("--step", type=float, default=0.03, help="seconds of the sleeping step")
    parser.add_argument("--rounds", type=int, default=3, help="the table shows their medians")
    parser.add_argument("--preset", default="quick", help="of the real step; default: %(default)s")
    parser.add_argument("--batch", type=int, help="of the real step, other than the preset's")
    parser.add_argument("--steps", type=int, default=20, help="real steps")
    options = parser.parse_args()

    split = scan(options.data or cached_synthetic()).train
    values = {"batch": options.batch} if options.batch else {}
    config = choose_config(options.preset, settings={"device": options.device, **values})
    print_line(machine("torch", "pillow"))

    crops, size = Crops(split.paths, options.height, options.width), f"{options.height}x{options.width}"
    speeds = {name: median(found) for name, found in _speeds(crops, split, options).items()}
    rows = [(name, f"{speed:,.0f}", f"{speed / speeds[PLAIN]:.2f}") for name, speed in speeds.items()]
    title = f"{len(split):,} images at {size}, batches of {BATCH}"
    print_table(title, ("", "images/s", "ratio to the plain loader"), rows)

    work = f"{config.backbone} {config.height}x{config.width}, batch {config.batch}, {options.device}"
    steps = {
        f"a step that sleeps, {size}, batch {BATCH}": _sleeping_step(crops, split.pids, options.step),
        f"a step of pmm train, {work}": _real_step(split, config, options.steps),
    }
    rows = [(name, f"{seconds:.3f}", f"{100 * share:.2f} %") for name, (seconds, share) in steps.items()]
    print_table("share of a step's time", ("", "seconds", "waits for data"), rows)


def _speeds(crops: Crops, split: Split, options: argparse.Namespace) -> dict[str, list[float]]:
    """Images per second of each part, measured in turns, so that drift of the machine affects all alike."""
    plain = DataLoader(
        PlainImages(split.paths, options.height, options.width),
        batch_sampler=[batch.tolist() for batch in _batches(split.pids, seed=99)],
        num_workers=os.cpu_count() or 1,
        persistent_workers=True,
    )
    generator = torch.Generator(options.device)

    def augmented(batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        return (augment(batch.to(options.device), options.height // 6, generator) for batch in batches)

    every = np.array_split(np.arange(len(split)), -(-len(split) // BATCH))
    rows = {"decoded, each image once": [_images_per_second(_assembled(crops, every), options.device)]}
    next(iter(plain))  # its workers have started
    for number in range(options.rounds):
        batches = _batches(split.pids, number)
        one = torch.from_numpy(crops.batch(batches[0]))
        parts: dict[str, Iterable[torch.Tensor]] = {
            "assembled in host memory": _assembled(crops, batches),
            f"augmented on {options.device}": augmented(one for _ in batches),
            "both together": augmented(_assembled(crops, batches)),
            PLAIN: plain,
        }
        for name, part in parts.items():
            rows.setdefault(name, []).append(_images_per_second(part, options.device))
    return rows


def _batches(pids: np.ndarray, seed: int) -> list[np.ndarray]:
    """Batches of several epochs, so many that start and end hardly matter."""
    generator = np.random.default_rng(seed)
    batches: list[np.ndarray] = []
    while len(batches) < MIN_BATCHES:
        batches += identity_batches(pids, IDENTITIES, BATCH // IDENTITIES, generator)
    return batches


def _assembled(crops: Crops, batches: list[np.ndarray]) -> Iterator[torch.Tensor]:
    return map(torch.from_numpy, crops.prefetched(batches))


def _images_per_second(batches: Iterable[torch.Tensor], device: str) -> float:
    start, images = time.perf_counter(), 0
    for batch in batches:
        images += len(batch)
    if device != "cpu":
        torch.cuda.synchronize(device)
    return images / (time.perf_counter() - start)


def _sleeping_step(crops: Crops, pids: np.ndarray, step: float) -> tuple[float, float]:
    """Seconds per step including the wait, and the fraction spent waiting, with decoded images."""
    batches = _batches(pids, 0)
    waited, start, ahead = 0.0, time.perf_counter(), crops.prefetched(batches)
    for _ in batches:
        before = time.perf_counter()
        next(ahead)
        waited += time.perf_counter() - before
        time.sleep(step)
    total = time.perf_counter() - start
    return total / len(batches), waited / total


def _real_step(train: Split, config: TrainConfig, steps: int) -> tuple[float, float]:
    """The same for `pmm train` itself: its feed, its step and its meter."""
    world = World()
    device, dtype = choose_machine(config, world)
    trainee = prepare(new_network(config, train.identities), config, device, dtype, world)
    feed = Feed(train, config, world, device)
    batches = [batch for epoch in range(1, 1 + steps) for batch in feed.batches(epoch)][: steps + 1]
    for batch in batches:
        feed.crops.batch(batch)
    for shards in islice(feed.shards(batches, 1, 0, Meter()), 1):
        train_step(trainee, shards, config)  # the first one plans its convolutions
    meter, start = Meter(), time.perf_counter()
    for step, shards in enumerate(feed.shards(batches, 1, 1, meter)):
        loss, parts = train_step(trainee, shards, config)
        meter.add(loss, parts, step, config.batch)
    wait = meter.means()["data_wait"]  # waits for the device
    return (time.perf_counter() - start) / (len(batches) - 1), wait


if __name__ == "__main__":
    main()
