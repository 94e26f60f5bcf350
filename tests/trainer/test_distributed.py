"""Two processes on the CPU, as torchrun starts them, beside one that takes the same batch in two parts."""

import os
import subprocess
import sys

import pytest

from pmm_edge.model import load_checkpoint

# fmt: off
FLAGS = [
    "--height", "96", "--width", "64", "--epochs", "3", "--batch", "16", "--erase-size", "8", "--device", "cpu",
    "--precision", "fp32",
]
# fmt: on


LISTS_THREADS_AT_ITS_END = """
import atexit, os, pathlib

from pmm_edge.cli import main


def list_threads():
    threads = [(task / "comm").read_text() for task in pathlib.Path("/proc/self/task").iterdir()]
    pathlib.Path(os.environ["LISTS"], os.environ["RANK"]).write_text("".join(threads))


atexit.register(list_threads)
main()
"""


def run(command: list[object], **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def together(tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "two"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "pmm_edge.cli"]
    done = run([*launch, "train", tiny_dataset, "--out", folder, *FLAGS])
    assert done.returncode == 0, done.stderr
    return folder, done


def test_two_processes_take_the_step_of_one_that_accumulates_over_the_same_parts(together, tiny_dataset, tmp_path):
    done = run(["-m", "pmm_edge.cli", "train", tiny_dataset, "--out", tmp_path / "one", *FLAGS, "--accumulate", 2])
    assert done.returncode == 0, done.stderr
    alone, both = (load_checkpoint(folder / "last.pt") for folder in (tmp_path / "one", together[0]))
    ours, theirs = (checkpoint.training["optimizer"]["state"] for checkpoint in (both, alone))
    for number, state in theirs.items():  # the gradients' mean and spread: what all three steps saw
        for moment in ("exp_avg", "exp_avg_sq"):
            scale = state[moment].abs().max()
            assert (ours[number][moment] - state[moment]).abs().max() <= 2e-2 * scale + 1e-12, (number, moment)


def test_only_the_first_process_writes_and_reports(together):
    folder, done = together
    assert {"best.pt", "last.pt", "config.toml", "metrics.jsonl"} <= {path.name for path in folder.iterdir()}
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 5
    assert done.stdout.count("best epoch") == 1


def test_no_thread_of_gloo_is_left_to_meet_the_end_of_the_interpreter(together, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(LISTS_THREADS_AT_ITS_END)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, script]
    done = run([*launch, "train", "--resume", together[0]], LISTS=str(tmp_path))
    assert done.returncode == 0, done.stderr
    for rank in "01":
        assert "gloo" not in (tmp_path / rank).read_text()
