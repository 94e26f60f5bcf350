"""A data set to calibrate on."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_people(root: Path, train: int, train_pid: int = 1) -> Path:
    """A data set of striped people: `train` training images of 4, 4 queries, 8 gallery images."""
    random = np.random.default_rng(0)
    for folder, first, images in (
        ("bounding_box_train", train_pid, train // 4),
        ("query", 101, 1),
        ("bounding_box_test", 101, 2),
    ):
        (root / folder).mkdir(parents=True)
        for pid in range(first, first + 4):
            stripes = np.random.default_rng(pid).integers(0, 256, (8, 1, 3)).repeat(12, axis=0)
            for number in range(images):
                noisy = (stripes + random.normal(0, 25, (96, 64, 3))).clip(0, 255).astype(np.uint8)
                camera = 1 + (folder != "query") * (1 + number % 2)
                Image.fromarray(noisy).save(root / folder / f"{pid:04d}_c{camera}s1_{number:06d}_00.png")
    return root
