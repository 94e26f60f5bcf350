"""A training of a second: a network of 0.2 M parameters, 48x32 images. As a script, `pmm` that knows this network."""

import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import cloudpickle
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from pmm_edge.model import load_checkpoint
from pmm_edge.model.backbone import RESNETS
from pmm_edge.trainer.config import TrainConfig


class TinyResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1, self.fc = BasicBlock(8, 8), nn.Linear(64, 10)
        for number, channels in ((2, 8), (3, 16), (4, 32)):
            shortcut = nn.Sequential(nn.Conv2d(channels, 2 * channels, 1, 2, bias=False), nn.BatchNorm2d(2 * channels))
            setattr(self, f"layer{number}", BasicBlock(channels, 2 * channels, 2, shortcut))


RESNETS["tiny"] = TinyResNet
CONFIG = TrainConfig(
    preset="quick",
    backbone="tiny",
    backbone_weights="none",
    height=48,
    width=32,
    mix_blocks=1,
    mix_block_size="1x1",
    epochs=4,
    batch=8,
    erase_size=8,
    evaluate_every=2,
    device="cpu",
    precision="fp32",
    ema=0.9,
)
"""Two steps in an epoch; evaluations before training and after epochs 2 and 4, with last.pt before and after them."""
_CLEAN = multiprocessing.get_context("forkserver")
"""Forks from a process that has torch loaded and has never run a backward pass: autograd's threads do not survive a
fork of the process that runs the tests."""
_CLEAN.set_forkserver_preload(["tiny_training", "pmm_edge.cli", "pmm_edge.trainer.train"])


def start(work: Callable[[], object], output: Path, **environment: str) -> BaseProcess:
    """Start `work` in a process of its own, which ends after a minute at most. Its output goes to a file."""
    process = _CLEAN.Process(target=_run, args=(cloudpickle.dumps(work), output, {**os.environ, **environment}))
    process.start()
    return process


def _run(work: bytes, output: Path, environment: dict[str, str]) -> None:
    signal.alarm(60)
    file = output.open("w", buffering=1)  # stays open when `pmm` replaces the streams
    sys.stdout = sys.stderr = file
    os.environ.update(environment)
    torch.set_num_threads(1)
    code = 0
    try:
        cloudpickle.loads(work)()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        code = 1
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def wait(process: BaseProcess) -> int | None:
    """The exit code of a process; negative if a signal ended it."""
    process.join()
    return process.exitcode


def journal(folder: Path) -> list[tuple[str, int]]:
    """Kind and epoch of each line of metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["kind"], line["epoch"]) for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    """Assert that two runs have identical weights, optimizer, average and figures, bit by bit."""
    ours, theirs = (load_checkpoint(folder / "last.pt") for folder in (one, other))
    states = [(ours.weights, theirs.weights), (ours.training["average"], theirs.training["average"])]
    optimizers = [checkpoint.training["optimizer"]["state"] for checkpoint in (ours, theirs)]
    assert optimizers[0].keys() == optimizers[1].keys()
    states += [(optimizers[0][number], optimizers[1][number]) for number in optimizers[0]]
    for mine, others in states:
        assert mine.keys() == others.keys()
        assert all(torch.equal(mine[name], others[name]) for name in mine)
    assert ours.training["position"] == theirs.training["position"]
    assert journal(one) == journal(other)


if __name__ == "__main__":
    from pmm_edge.cli import main

    main()
