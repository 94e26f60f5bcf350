"""A run killed with SIGKILL at any moment goes on to the very weights of a run that was not."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from pmm_edge.model import load_checkpoint

# fmt: off
FLAGS = [
    "--height", "96", "--width", "64", "--epochs", "8", "--batch", "8", "--erase-size", "8", "--evaluate-every", "2",
    "--device", "cpu", "--ema", "0.9",
]
# fmt: on
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def pmm_train(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pmm_edge.cli", "train", *map(str, arguments)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


@pytest.fixture(scope="module")
def uninterrupted(tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    finish(pmm_train(tiny_dataset, "--out", folder, *FLAGS))
    return load_checkpoint(folder / "last.pt")


@pytest.mark.parametrize("delay", [0.0, 0.11, 0.23])
def test_resuming_after_sigkill_gives_the_same_bits(uninterrupted, tiny_dataset, tmp_path, delay):
    folder = tmp_path / "run"
    process = pmm_train(tiny_dataset, "--out", folder, *FLAGS)
    while not (folder / "last.pt").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    time.sleep(delay)  # somewhere in an epoch, an evaluation, or the writing of a checkpoint
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped = load_checkpoint(folder / "last.pt")
    assert stopped.training["epoch"] < 8, "killed too late to prove anything"

    finish(pmm_train("--resume", folder))
    resumed = load_checkpoint(folder / "last.pt")
    for one, other in ((uninterrupted.weights, resumed.weights), *_states(uninterrupted, resumed)):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert uninterrupted.training["best"] == resumed.training["best"]


def test_a_run_killed_before_its_first_checkpoint_begins_again(uninterrupted, tiny_dataset, tmp_path):
    folder = tmp_path / "run"
    process = pmm_train(tiny_dataset, "--out", folder, *FLAGS)
    while not (folder / "config.toml").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finish(pmm_train("--resume", folder))
    weights = load_checkpoint(folder / "last.pt").weights
    assert all(torch.equal(weights[name], uninterrupted.weights[name]) for name in weights)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["kind"] == "train"] == list(range(1, 9)), "each epoch once"


def _states(one, other):
    yield one.training["average"], other.training["average"]
    ours, theirs = (run.training["optimizer"]["state"] for run in (one, other))
    assert ours.keys() == theirs.keys()
    yield from ((ours[number], theirs[number]) for number in ours)
