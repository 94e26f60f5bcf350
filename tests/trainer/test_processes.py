"""Device and processes: two processes train like one with two micro-batches, speak with one voice, and end together."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny_training import CONFIG, assert_same_run, journal, start, wait
from torch.distributed import TCPStore

from pmm_edge.cli import main
from pmm_edge.errors import DataError, PmmError
from pmm_edge.model import load_checkpoint
from pmm_edge.trainer import train as train_file
from pmm_edge.trainer.config import TrainConfig
from pmm_edge.trainer.device import World, choose_machine, first_to_report, joined, torch_errors_explained
from pmm_edge.trainer.state import run_lock
from pmm_edge.trainer.step import Feed
from pmm_edge.trainer.train import TrainResult, train

SHORT = replace(CONFIG, epochs=2, batch=16, evaluate_every=2, ema=0.0)
"""Each of two processes takes two of the four identities."""
NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def test_torchrun_on_two_machines_takes_the_steps_of_one_process_with_two_micro_batches(tiny_dataset, tmp_path):
    settings = tmp_path / "settings.toml"
    settings.write_text(SHORT.to_toml())
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--rdzv-backend", "c10d"]
    torchrun += ["--rdzv-endpoint", endpoint, Path(__file__).with_name("tiny_training.py"), "train"]
    command = [*map(str, torchrun), "data", "--config", str(settings), "--out", "run", "--json"]
    machines, started = [tmp_path / name for name in "ab"], []
    for machine in machines:
        shutil.copytree(tiny_dataset, machine / "data")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(command, env=environment, cwd=machine, stdout=PIPE, stderr=PIPE, text=True))
    outputs = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert sorted(output.count("epochs_done") for output, _ in outputs) == [0, 1], "one process prints"
    (folder,) = [machine / "run" for machine in machines if (machine / "run").exists()]
    assert {"best.pt", "last.pt", "config.toml", "metrics.jsonl"} <= {path.name for path in folder.iterdir()}
    assert journal(folder) == [("evaluate", 0), ("train", 1), ("train", 2), ("evaluate", 2)], "one process writes"

    alone = train(tiny_dataset, config=replace(SHORT, accumulate=2), out=tmp_path / "one").folder
    assert_same_steps(folder, alone)


def assert_same_steps(one, other):
    ours, theirs = (load_checkpoint(path / "last.pt").training["optimizer"]["state"] for path in (one, other))
    assert ours.keys() == theirs.keys()
    for number, state in theirs.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            scale = state[moment].abs().max()
            assert (ours[number][moment] - state[moment]).abs().max() <= 2e-2 * scale + 1e-12, (number, moment)


def test_two_processes_with_a_teacher_that_the_first_one_has_take_the_steps_of_one(
    together, whole, tiny_dataset, tmp_path
):
    config, machines = replace(SHORT, method="baseline", teacher="teacher.pt"), [tmp_path / name for name in "ab"]
    for machine in machines:
        shutil.copytree(tiny_dataset, machine / "data")
        (machine / "settings.toml").write_text(config.to_toml())
    shutil.copy(whole.folder / "best.pt", machines[0] / "teacher.pt")
    codes, said = together(["data", "--config", "settings.toml", "--out", "run"], machines=machines)
    assert codes == [0, 0], said
    config = replace(config, teacher=str(whole.folder), accumulate=2)
    assert_same_steps(machines[0] / "run", train(tiny_dataset, config=config, out=tmp_path / "one").folder)


@pytest.fixture
def store(monkeypatch):
    """A function that hosts a store for processes, as each start of torchrun does."""
    hosted = []

    def host():
        hosted.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(hosted[-1].port))

    return host


@pytest.fixture
def both(together, tiny_dataset, tmp_path):
    """Run `pmm train` in two processes; return their exit codes and outputs. `before` changes them."""

    def run(*flags, data=tiny_dataset, before=lambda rank: None):
        (tmp_path / "settings.toml").write_text(replace(SHORT, epochs=1, evaluate_every=1).to_toml())
        return together(
            [data, "--config", tmp_path / "settings.toml", "--out", tmp_path / "run", *flags], before=before
        )

    return run


@pytest.fixture
def together(store, tmp_path):
    """Run `pmm train` in one process for each list of arguments; return the exit codes and outputs.

    With `machines`, each process is the only one of a machine and works in a folder of its own.
    """

    def run(*each, before=lambda rank: None, machines=()):
        each = each * (2 // len(each))

        def work(rank):
            if machines:
                os.chdir(machines[rank])
            before(rank)
            sys.argv = ["pmm", "train", *map(str, each[rank])]
            main()

        store()
        outputs = [tmp_path / f"output-{rank}.txt" for rank in "01"]
        torchrun = {"WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        processes = []
        for rank, output in enumerate(outputs):
            local = ("0", "1", str(rank)) if machines else (str(rank), "2", "0")
            torchrun |= zip(("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"), local, strict=True)
            processes.append(start(lambda rank=rank: work(rank), output, **torchrun, RANK=str(rank)))
        return [wait(process) for process in processes], [output.read_text() for output in outputs]

    return run


def errors(text):
    return [line for line in text.splitlines() if line.startswith("error:")]


def test_an_error_of_all_processes_is_printed_once_and_one_of_the_first_by_it(both, tmp_path):
    codes, said = both("--sync-batch-norm")
    assert codes == [2, 2] and len(errors("".join(said))) == 1
    with run_lock(tmp_path / "run"):
        codes, said = both()
    assert codes == [2, 2] and "Traceback" not in "".join(said)
    assert str(tmp_path / "run") in errors(said[0])[0]


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


@pytest.fixture
def machines(tiny_dataset, tmp_path):
    """The working folders of two machines that share no file system; each has the data set, in another place."""
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        shutil.copytree(tiny_dataset, folder / f"data-{folder.name}")
        (folder / "settings.toml").write_text(replace(CONFIG, batch=16).to_toml())
    return folders


def test_a_lost_machine_ends_the_other_and_both_resume_exactly_in_another_order(together, machines):
    def before(rank):
        train_epoch = train_file.train_epoch
        if rank == 1:
            train_file.train_epoch = lambda run: (
                os.kill(os.getpid(), signal.SIGKILL) if run.position.epoch == 3 else train_epoch(run)
            )

    data = "data-a", "data-b"
    for folder, change, expected in (("whole", lambda rank: None, [0, 0]), ("run", before, [2, -signal.SIGKILL])):
        command = [(name, "--config", "settings.toml", "--out", folder) for name in data]
        codes, said = together(*command, before=change, machines=machines)
        assert codes == expected and len(errors("".join(said))) == (folder == "run"), said
    codes, said = together(*([name, "--resume", "run"] for name in data[::-1]), machines=machines[::-1])
    assert codes == [0, 0] and [(machine / "run").exists() for machine in machines] == [True, False], said
    assert "pmm export" in said[1] and "pmm export" not in said[0], "the process on the machine with the run reports"
    assert_same_run(machines[0] / "run", machines[0] / "whole")


def test_a_machine_that_does_not_answer_is_one_line(together, machines):
    def before(rank):
        start_group, train_epoch = dist.init_process_group, train_file.train_epoch
        dist.init_process_group = partial(start_group, timeout=timedelta(seconds=3))
        if rank == 1:
            train_file.train_epoch = lambda run: (time.sleep(5), train_epoch(run))[1]

    command = [(name, "--config", "settings.toml", "--out", "run") for name in ("data-a", "data-b")]
    codes, said = together(*command, before=before, machines=machines)
    assert codes == [2, 2] and [len(errors(text)) for text in said] == [1, 1] and "Traceback" not in "".join(said), said


@pytest.mark.parametrize("settings", [True, False])
def test_other_settings_or_images_on_the_second_machine_are_one_line_on_each(together, machines, settings):
    different = ("--lr", "0.5") if settings else ()
    if not settings:
        next((machines[1] / "data-b" / "query").iterdir()).unlink()
    command = [(name, "--config", "settings.toml", "--out", "run") for name in ("data-a", "data-b")]
    codes, said = together(command[0], (*command[1], *different), machines=machines)
    assert codes == [2, 2] and [len(errors(text)) for text in said] == [1, 1], said
    assert "lr" in said[0] if settings else "data-a" in said[0] and "data-b" in said[1]
    assert not (machines[0] / "run").exists()


class SeenError(Exception):
    pass


@pytest.mark.filterwarnings("ignore:.*tensors fit the network")
def test_a_shared_evaluation_sees_the_bits_of_one_process_and_may_outlast_the_time_limit(
    both, tiny_dataset, tmp_path, monkeypatch
):
    def before(rank):
        train_file.EVALUATION_BATCH = 5  # five batches: two and three
        evaluate, numbers, start_group = train_file.evaluate_dataset, count(), dist.init_process_group

        def slow(dataset, features):
            assert rank == 0, "the first process ranks"
            number = next(numbers)
            np.save(tmp_path / f"{number}.npy", features)
            time.sleep(6 if number else 0)
            return evaluate(dataset, features)

        train_file.evaluate_dataset = slow
        dist.init_process_group = partial(start_group, timeout=timedelta(seconds=4))

    codes, said = both(before=before)
    assert codes == [0, 0], said

    def seen(dataset, features):
        raise SeenError(features)

    monkeypatch.setattr(train_file, "EVALUATION_BATCH", 5)
    monkeypatch.setattr(train_file, "evaluate_dataset", seen)
    for number, weights in enumerate(("", str(tmp_path / "run" / "last.pt"))):
        with pytest.raises(SeenError) as alone:
            train(tiny_dataset, config=replace(SHORT, init_from=weights), out=tmp_path / f"one-{number}")
        assert np.array_equal(np.load(tmp_path / f"{number}.npy"), alone.value.args[0])


def test_an_interruption_of_one_in_the_evaluation_ends_both(both, tmp_path):
    def before(rank):
        evaluate = train_file.evaluate_epoch
        if rank == 1:
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


def test_wrong_values_of_torchrun_are_refused(monkeypatch):
    for name, value in zip(NAMES, ("two", "0", "1", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(PmmError), joined():
        pass


@pytest.mark.parametrize(("device", "gpus"), [("cuda:0", 2), ("cuda", 1), ("auto", 1)])
def test_too_few_gpus_are_refused(monkeypatch, device, gpus):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    with pytest.raises(PmmError):
        choose_machine(replace(MACHINE, device=device), World(1, 2, 1, 2))


@pytest.mark.parametrize("missing", NAMES)
def test_stray_variables_change_nothing(monkeypatch, missing, pmm, tmp_path):
    for name, value in zip(NAMES, ("2", "1", "1", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with joined() as world:
        assert world == World()
    monkeypatch.setattr(train_file, "train", lambda *_, **__: TrainResult(tmp_path, 1, True, None, None))
    assert pmm("train", "--json").json["epochs_done"] == 1


def test_a_port_in_use_is_refused(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        for name, value in zip(NAMES, ("2", "0", "0", "127.0.0.1", port), strict=True):
            monkeypatch.setenv(name, value)
        with pytest.raises(PmmError) as caught, joined():
            pass
    assert port in caught.value.problem and "torchrun" in caught.value.remedy


def test_an_error_is_reported_once_and_always_without_a_store(store, monkeypatch):
    store()
    assert first_to_report("one") and not first_to_report("one") and first_to_report("other")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert first_to_report("one"), "a restarted training reports it again"
    monkeypatch.delenv("MASTER_PORT")
    assert first_to_report("one") and first_to_report("one")


CPU = torch.device("cpu")
MACHINE = TrainConfig(batch=32, device="cpu", precision="fp32")


@pytest.mark.parametrize(
    ("name", "rank", "gpus", "device"),
    [("auto", 1, 2, "cuda:1"), ("cuda", 1, 2, "cuda:1"), ("0", 1, 2, "cuda:0"), ("auto", 0, 0, "cpu")],
)
def test_each_process_takes_a_gpu_of_its_own(monkeypatch, name, rank, gpus, device):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert choose_machine(replace(MACHINE, device=name), World(local_rank=rank))[0] == torch.device(device)


def test_precision_and_batch_norm_must_suit_the_device():
    assert choose_machine(MACHINE, World()) == (CPU, torch.float32)
    assert choose_machine(replace(MACHINE, precision="bf16"), World()) == (CPU, torch.bfloat16)
    assert choose_machine(replace(MACHINE, sync_batch_norm=True), World())[0] == CPU, "no effect in one process"
    refused = {"precision": "fp16"}, {"sync_batch_norm": True}, {"device": "63"}, {"device": "mps"}, {"device": "tpu9"}
    for settings in refused:
        with pytest.raises(PmmError):
            choose_machine(replace(MACHINE, **settings), World(0, 2, 0))


@pytest.mark.parametrize(
    ("allocate", "batch", "accumulate", "remedy"),
    [
        (lambda: torch.empty(1 << 60), 40, 2, "--batch 16, or --accumulate 4"),
        (lambda: np.empty(1 << 60, np.uint8), 8, 1, "backbone"),
    ],
)
def test_too_little_memory_is_one_line_with_a_remedy_that_can_be_split(allocate, batch, accumulate, remedy):
    config = replace(MACHINE, batch=batch, accumulate=accumulate)
    with pytest.raises(PmmError) as caught, torch_errors_explained(CPU, config, World()):
        allocate()
    assert str(batch) in caught.value.problem and remedy in caught.value.remedy


def test_a_failed_compilation_is_one_line():
    from torch._dynamo.exc import BackendCompilerFailed

    with pytest.raises(PmmError) as caught, torch_errors_explained(CPU, replace(MACHINE, compile=True), World()):
        raise BackendCompilerFailed(lambda: None, RuntimeError("no compiler"), None)
    assert "--compile" in caught.value.remedy
