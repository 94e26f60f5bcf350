"""Two processes of one training, of which one or both meet an error or a signal: what is said, and how they end."""

import os
import shutil
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from pmm_edge.errors import PmmError
from pmm_edge.trainer.distributed import first_to_say, joined
from pmm_edge.trainer.state import alone_in

# fmt: off
FLAGS = [
    "--height", "96", "--width", "64", "--epochs", "1", "--batch", "16", "--erase-size", "8", "--device", "cpu",
    "--precision", "fp32",
]
# fmt: on
TOLD = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
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
from pmm_edge.trainer.train import Run
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
    def run(script, *flags, data=tiny_dataset):
        command = [sys.executable, "-c", script, "train", data, "--out", tmp_path / "run", *FLAGS, *flags]
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


@pytest.fixture
def unreadable(tiny_dataset, tmp_path):
    """A data set with one unreadable image of each of its four identities, of which each process reads two; those."""
    data = shutil.copytree(tiny_dataset, tmp_path / "data")
    bad = [path for path in (data / "bounding_box_train").iterdir() if "_c1" in path.name]
    for path in bad:
        path.write_bytes(b"")
    return data, bad


def test_unreadable_images_are_counted_over_both(both, unreadable, tmp_path):
    codes, said = both(AS_IS, "--max-bad-images", 3, data=unreadable[0])
    assert codes == [2, 2]
    assert "".join(said).count("error: 4 training images cannot be read") == 1
    assert "4 training images cannot be read" in (tmp_path / "run" / "log.txt").read_text()


def test_unreadable_images_of_both_are_named_once_in_the_log(both, unreadable, tmp_path):
    codes, said = both(AS_IS, "--max-bad-images", 4, data=unreadable[0])
    assert codes == [0, 0], said
    named = (tmp_path / "run" / "log.txt").read_text()
    assert [named.count(f"warning: cannot read image {path}") for path in unreadable[1]] == [1] * 4


def test_a_second_training_in_a_folder_is_refused_by_the_first_process_alone(both, tmp_path):
    (tmp_path / "run").mkdir()
    with alone_in(tmp_path / "run"):
        codes, said = both(AS_IS)
    assert codes == [2, 2] and "Traceback" not in "".join(said)
    assert f"error: another process is training in {tmp_path / 'run'}" in said[0]


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is two"),
    ],
)
def test_half_of_what_torchrun_sets_is_one_line(monkeypatch, environment, named):
    for name in TOLD:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PmmError, match=rf"{named}.*unset WORLD_SIZE"), joined("cpu"):
        pass


def test_a_port_that_others_listen_on_is_one_line(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        for name, value in zip(TOLD, ("2", "0", "0", "127.0.0.1", port), strict=True):
            monkeypatch.setenv(name, value)
        said = rf"cannot join 2 processes at 127.0.0.1:{port}: .*address already in use.*torchrun"
        with pytest.raises(PmmError, match=said), joined("cpu"):
            pass


def test_each_line_is_said_once_and_always_where_nobody_can_be_asked(store, monkeypatch):
    assert first_to_say("one") and not first_to_say("one") and first_to_say("other")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert first_to_say("one"), "started again, it is said again"
    monkeypatch.delenv("MASTER_PORT")
    assert first_to_say("one") and first_to_say("one")
