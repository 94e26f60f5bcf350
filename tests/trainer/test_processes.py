"""Two processes that train together: the same step as one with two micro-batches, one voice, and how they end."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from tiny_training import CONFIG, journal, start, wait
from torch.distributed import TCPStore

from pmm_edge.cli import main
from pmm_edge.errors import DataError, PmmError
from pmm_edge.model import load_checkpoint
from pmm_edge.trainer import train as train_file
from pmm_edge.trainer.device import first_to_report, joined
from pmm_edge.trainer.state import run_lock
from pmm_edge.trainer.step import Feed
from pmm_edge.trainer.train import train

SHORT = replace(CONFIG, epochs=2, batch=16, evaluate_every=2, ema=0.0)
"""Each of two processes takes two of the four identities."""
NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def test_torchrun_takes_the_steps_of_one_process_with_two_micro_batches(tiny_dataset, tmp_path):
    settings, folder = tmp_path / "settings.toml", tmp_path / "two"
    settings.write_text(SHORT.to_toml())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    script = Path(__file__).with_name("tiny_training.py")
    command = [*torchrun, script, "train", tiny_dataset, "--config", settings, "--out", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, command), "--json"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {"best.pt", "last.pt", "config.toml", "metrics.jsonl"} <= {path.name for path in folder.iterdir()}
    assert journal(folder) == [("evaluate", 0), ("train", 1), ("train", 2), ("evaluate", 2)], "one process writes"
    assert done.stdout.count("epochs_done") == 1, "one process prints"

    alone = train(tiny_dataset, config=replace(SHORT, accumulate=2), out=tmp_path / "one").folder
    ours, theirs = (load_checkpoint(path / "last.pt").training["optimizer"]["state"] for path in (folder, alone))
    for number, state in theirs.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            scale = state[moment].abs().max()
            assert (ours[number][moment] - state[moment]).abs().max() <= 2e-2 * scale + 1e-12, (number, moment)


@pytest.fixture
def store(monkeypatch):
    """The store that torchrun hosts for its processes."""
    hosted = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(hosted.port))
    return hosted


@pytest.fixture
def both(store, tiny_dataset, tmp_path):
    """Run `pmm train` in two processes; return their exit codes and outputs. `before` changes the second one."""

    def run(*flags, data=tiny_dataset, before=lambda rank: None):
        (tmp_path / "settings.toml").write_text(replace(SHORT, epochs=1, evaluate_every=1).to_toml())
        command = ["pmm", "train", data, "--config", tmp_path / "settings.toml", "--out", tmp_path / "run", *flags]

        def work(rank):
            before(rank)
            sys.argv = [*map(str, command)]
            main()

        outputs = [tmp_path / f"output-{rank}.txt" for rank in "01"]
        processes = [
            start(
                lambda rank=rank: work(rank),
                output,
                WORLD_SIZE="2",
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                TORCHELASTIC_USE_AGENT_STORE="True",
            )
            for rank, output in enumerate(outputs)
        ]
        return [wait(process) for process in processes], [output.read_text() for output in outputs]

    return run


def errors(text):
    return [line for line in text.splitlines() if line.startswith("error:")]


def test_an_error_of_all_processes_is_printed_once(both):
    codes, said = both("--sync-batch-norm")
    assert codes == [2, 2] and len(errors("".join(said))) == 1


def test_an_error_of_one_process_is_printed_and_ends_both(both):
    def before(rank):
        def shards(*arguments):
            raise DataError("an image of the second process")
            yield

        if rank == 1:
            Feed.shards = shards

    codes, said = both(before=before)
    assert codes == [2, 2] and "Traceback" not in "".join(said)
    assert [len(errors(text)) for text in said] == [1, 1] and "an image of the second process" in said[1]


def test_an_interruption_in_the_evaluation_ends_both(both, tmp_path):
    def before(rank):
        evaluate = train_file.evaluate_epoch
        train_file.evaluate_epoch = lambda run: (os.kill(os.getpid(), signal.SIGTERM), evaluate(run))[1]

    codes, said = both(before=before)
    assert codes == [130, 130], said
    assert load_checkpoint(tmp_path / "run" / "last.pt").training["position"]["evaluated"] == 0
    assert not (tmp_path / "run" / "best.pt").exists()


@pytest.mark.parametrize(("limit", "code"), [(3, 2), (4, 0)])
def test_unreadable_images_are_counted_over_both_and_named_once(both, tiny_dataset, tmp_path, limit, code):
    data = shutil.copytree(tiny_dataset, tmp_path / "data")
    bad = [path for path in (data / "bounding_box_train").iterdir() if "_c1" in path.name]  # one of each identity
    for path in bad:
        path.write_bytes(b"")
    codes, said = both("--max-bad-images", limit, data=data)
    assert codes == [code, code] and len(errors("".join(said))) == (code == 2), said
    if code == 0:
        log = (tmp_path / "run" / "log.txt").read_text().splitlines()
        assert [sum(str(path) in line for line in log) for path in bad] == [1] * 4


def test_a_locked_folder_is_refused_by_the_first_process(both, tmp_path):
    with run_lock(tmp_path / "run"):
        codes, said = both()
    assert codes == [2, 2] and "Traceback" not in "".join(said)
    assert str(tmp_path / "run") in errors(said[0])[0]


@pytest.mark.parametrize("values", [("2",), ("2", "0", "0"), ("2", "0", "0", None, "29500"), ("two",)])
def test_an_incomplete_environment_of_torchrun_is_refused(monkeypatch, values):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in zip(NAMES, values, strict=False):
        if value:
            monkeypatch.setenv(name, value)
    with pytest.raises(PmmError), joined("cpu"):
        pass


def test_a_port_in_use_is_refused(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        for name, value in zip(NAMES, ("2", "0", "0", "127.0.0.1", port), strict=True):
            monkeypatch.setenv(name, value)
        with pytest.raises(PmmError) as caught, joined("cpu"):
            pass
    assert port in caught.value.problem and "torchrun" in caught.value.remedy


def test_processes_need_a_gpu_each(monkeypatch):
    for name, value in zip(NAMES, ("2", "0", "1", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    for device, gpus in (("cuda:0", 2), ("cuda", 1), ("auto", 1)):
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        with pytest.raises(PmmError), joined(device):
            pass


def test_an_error_is_reported_once_and_always_without_a_store(store, monkeypatch):
    assert first_to_report("one") and not first_to_report("one") and first_to_report("other")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert first_to_report("one"), "a restarted training reports it again"
    monkeypatch.delenv("MASTER_PORT")
    assert first_to_report("one") and first_to_report("one")
