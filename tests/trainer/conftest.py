"""One tiny training that the tests of its results and of resuming share."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_training import CONFIG

from pmm_edge.model import load_checkpoint
from pmm_edge.trainer.train import TrainResult, train


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Identical bits need sums in identical order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def whole(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """An uninterrupted run of `CONFIG`."""
    return train(tiny_dataset, config=CONFIG, out=tmp_path_factory.mktemp("runs") / "whole")


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
