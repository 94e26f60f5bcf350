"""Two processes of one training, of which one or both meet an error or a signal: what is said, and how they end."""

import os
import subprocess
import sys
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from pmm_edge.trainer.distributed import first_to_say

# fmt: off
FLAGS = [
    "--height", "96", "--width", "64", "--epochs", "1", "--batch", "16", "--erase-size", "8", "--device", "cpu",
    "--precision", "fp32",
]
# fmt: on
AS_IS = "from pmm_edge.cli import main; main()"
ONE_CANNOT_READ = """
import os
from pmm_edge.cli import main
from pmm_edge.errors import DataError
from pmm_edge.trainer.feed import Feed
def shards(*arguments):
    raise DataError("an image of the second process cannot be read")
    yield
if os.environ["RANK"] == "1":
    Feed.shards = shards
main()
"""
INTERRUPTED_IN_THE_LAST_EVALUATION = """
import os, signal
from pmm_edge.cli import main
from pmm_edge.trainer.loop import Run
judge = Run._judge
def judged(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    return judge(*arguments)
Run._judge = judged
main()
"""


@pytest.fixture
def store(monkeypatch):
    """The store that torchrun hosts for its processes."""
    hosted = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(hosted.port))
    return hosted


@pytest.fixture
def both(store, tiny_dataset, tmp_path):
    def run(script, *flags):
        command = [sys.executable, "-c", script, "train", tiny_dataset, "--out", tmp_path / "run", *FLAGS, *flags]
        started = []
        for rank in ("0", "1"):
            as_torchrun = {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_USE_AGENT_STORE": "True"}
            environment = {**os.environ, **as_torchrun, "OMP_NUM_THREADS": "1"}
            started.append(subprocess.Popen([*map(str, command)], env=environment, stderr=subprocess.PIPE, text=True))
        said = [process.communicate(timeout=120)[1] for process in started]
        return [process.returncode for process in started], said

    return run


def test_an_error_that_all_have_is_said_once(both):
    codes, said = both(AS_IS, "--sync-batch-norm")
    assert codes == [2, 2]
    assert "".join(said).count("error: batch norm cannot be synchronised") == 1


def test_an_error_that_only_another_process_has_is_not_lost_and_leaves_no_traceback(both):
    codes, said = both(ONE_CANNOT_READ)
    assert codes == [2, 2]
    assert "error: an image of the second process cannot be read" in said[1]
    assert "error: another process of this training has stopped" in said[0]
    assert "Traceback" not in "".join(said)


def test_an_interruption_in_an_evaluation_ends_both(both, tmp_path):
    codes, said = both(INTERRUPTED_IN_THE_LAST_EVALUATION)
    assert codes == [130, 130], said
    assert "go on with: pmm train --resume" in said[0].replace("\n", " ")
    assert (tmp_path / "run" / "last.pt").is_file() and not (tmp_path / "run" / "best.pt").exists()
    assert "interrupted in the evaluation of epoch 1" in (tmp_path / "run" / "log.txt").read_text()


def test_each_line_is_said_once_and_always_where_nobody_can_be_asked(store, monkeypatch):
    assert first_to_say("one") and not first_to_say("one") and first_to_say("other")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert first_to_say("one"), "started again, it is said again"
    monkeypatch.delenv("MASTER_PORT")
    assert first_to_say("one") and first_to_say("one")
