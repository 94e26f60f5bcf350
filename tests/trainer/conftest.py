"""One tiny training that the tests of its results and of resuming share."""

import pytest
import torch
from tiny_training import CONFIG

from pmm_edge.trainer.train import train


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Identical bits need sums in identical order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def whole(tiny_dataset, tmp_path_factory):
    """An uninterrupted run of `CONFIG`."""
    return train(tiny_dataset, config=CONFIG, out=tmp_path_factory.mktemp("runs") / "whole")
