"""One tiny training that the tests of its results and of resuming share."""

import pytest
from tiny_training import CONFIG

from pmm_edge.trainer.train import train


@pytest.fixture(scope="session")
def whole(tiny_dataset, tmp_path_factory):
    """An uninterrupted run of `CONFIG`."""
    return train(tiny_dataset, config=CONFIG, out=tmp_path_factory.mktemp("runs") / "whole")
