"""A run killed with SIGKILL at any moment goes on to the very weights of a run that was not.

The moments are ones of the run, not of a clock: it kills itself.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from pmm_edge.errors import ModelError
from pmm_edge.model import load_checkpoint
from pmm_edge.trainer.config import PRESETS
from pmm_edge.trainer.train import resume, train

CONFIG = replace(
    PRESETS["quick"],
    height=96,
    width=64,
    epochs=6,
    batch=8,
    erase_size=8,
    evaluate_every=2,
    device="cpu",
    precision="fp32",
    ema=0.9,
)
"""Two steps an epoch, and after every second one: last.pt, an evaluation, best.pt where it is better, last.pt."""
JOURNAL = [
    *(("evaluate", 0), ("train", 1), ("train", 2), ("evaluate", 2), ("train", 3), ("train", 4), ("evaluate", 4)),
    *(("train", 5), ("train", 6), ("evaluate", 6)),
]
"""Each epoch and each evaluation once."""
KILLED = """
import os, signal, sys
from pathlib import Path
from pmm_edge.trainer import loop, meter, start
from pmm_edge.trainer.config import read_config

moment, number, config, data, folder = sys.argv[1:]
left = int(number)

def passed(what):
    global left
    left -= what == moment
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def report(what, done, total, detail=""):
    passed(what)

def fsync(file, real=os.fsync):
    passed("written beside")
    real(file)

os.fsync = fsync
meter.REPORT_SECONDS = 0.0
loop._SAVE_SECONDS = float("inf")  # checkpoints come with evaluations alone, however slow the machine
start.train(read_config(Path(config)), Path(data), out=Path(folder), report=report)
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the process that is killed: their sums must be added in the same order
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uninterrupted(tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(CONFIG, tiny_dataset, out=folder)
    return load_checkpoint(folder / "last.pt")


@pytest.fixture
def killed(tiny_dataset, tmp_path):
    """The folder of a run killed when `moment` comes for the `number`th time."""

    def run(moment, number):
        (tmp_path / "run.toml").write_text(CONFIG.to_toml())
        command = [sys.executable, "-c", KILLED, moment, number, tmp_path / "run.toml", tiny_dataset, tmp_path / "run"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*map(str, command)], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        return tmp_path / "run"

    return run


@pytest.mark.parametrize(
    ("moment", "number", "epoch", "judged"),
    [
        ("train", 5, 2, 2),  # a step into epoch 3
        ("embed gallery", 3, 4, 2),  # the evaluation after epoch 4: the one before training is the first
        ("written beside", 4, 2, 0),  # config.toml, last.pt and best.pt are in place, the last.pt that says so is not
    ],
    ids=lambda value: str(value).replace(" ", "-"),
)
def test_resuming_after_sigkill_gives_the_same_bits(uninterrupted, killed, moment, number, epoch, judged):
    folder = killed(moment, number)
    stopped = load_checkpoint(folder / "last.pt").training
    assert (stopped["epoch"], stopped["step"], stopped["judged"]) == (epoch, 0, judged)

    assert resume(folder).finished
    resumed = load_checkpoint(folder / "last.pt")
    for one, other in ((uninterrupted.weights, resumed.weights), *_states(uninterrupted, resumed)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert uninterrupted.training["best"] == resumed.training["best"]
    assert _journal(folder) == JOURNAL
    assert not list(folder.glob(".*.tmp")), "what was being written as it was killed"


@pytest.mark.parametrize(("moment", "number"), [("embed query", 1), ("train", 1)])
def test_a_run_killed_before_its_first_checkpoint_begins_again(uninterrupted, killed, moment, number):
    folder = killed(moment, number)
    assert not list(folder.glob("*.pt"))
    assert resume(folder).finished
    weights = load_checkpoint(folder / "last.pt").weights
    assert all(torch.equal(weights[name], uninterrupted.weights[name]) for name in weights)
    assert _journal(folder) == JOURNAL


def test_a_run_killed_before_its_settings_were_written_can_be_begun_again(killed, tiny_dataset):
    folder = killed("written beside", 1)
    assert not (folder / "config.toml").exists()
    with pytest.raises(ModelError, match=f"never began.*pmm train --out {folder}"):
        resume(folder)
    assert train(replace(CONFIG, epochs=1), tiny_dataset, out=folder).finished
    assert not list(folder.glob(".*.tmp"))


def _journal(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["kind"], line["epoch"]) for line in lines]


def _states(one, other):
    yield one.training["average"], other.training["average"]
    ours, theirs = (run.training["optimizer"]["state"] for run in (one, other))
    assert ours.keys() == theirs.keys()
    yield from ((ours[number], theirs[number]) for number in ours)
