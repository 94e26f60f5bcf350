"""Runs on a small data set, from the outside: what a run folder holds, and what survives an interruption."""

import errno
import json
import os
import shutil
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch

from pmm_edge.errors import DataError, ModelError, OutputError
from pmm_edge.model import load_checkpoint, save_checkpoint
from pmm_edge.runs import about_run
from pmm_edge.trainer.config import PRESETS, read_config
from pmm_edge.trainer.state import alone_in
from pmm_edge.trainer.train import resume, train

CONFIG = replace(PRESETS["quick"], height=96, width=64, epochs=3, batch=8, evaluate_every=2, erase_size=8, device="cpu")


@pytest.fixture(scope="module")
def run(tiny_dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return train(CONFIG, tiny_dataset, out=folder)


def weights(folder):
    return load_checkpoint(folder / "last.pt").weights


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def test_a_run_folder_holds_settings_log_metrics_and_checkpoints(run, tiny_dataset):
    assert run.finished and run.epochs_done == 3
    assert read_config(run.folder / "config.toml") == CONFIG
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["epoch"]) for line in lines] == [
        ("evaluate", 0),
        ("train", 1),
        ("train", 2),
        ("evaluate", 2),
        ("train", 3),
        ("evaluate", 3),
    ]
    assert {"loss", "triplet_1", "identity_3", "images_per_second", "lr"} <= lines[1].keys()
    assert "epoch 3 evaluate" in (run.folder / "log.txt").read_text()
    assert list((run.folder / "tensorboard").iterdir())


def test_the_best_checkpoint_carries_its_figures(run):
    best = load_checkpoint(run.folder / "best.pt")
    assert best.spec.retrieval == run.best and 0 < run.best.mAP <= 1
    assert best.spec.num_classes == 4 and best.spec.input.height == 96
    assert not best.training, "what only resuming needs stays in last.pt"


def test_the_figures_before_training_are_kept_beside(run):
    first = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert run.before.rank1 == first["rank1"]


def test_training_lowers_the_loss(run):
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < losses[0]


def interrupt_at(step, number):
    def report(what, done, total, detail=""):
        if what == "train" and done == step:
            os.kill(os.getpid(), number)

    return report


@pytest.mark.parametrize(("step", "number"), [(1, signal.SIGINT), (4, signal.SIGTERM)])
def test_an_interrupted_run_goes_on_to_the_very_same_weights(run, tiny_dataset, tmp_path, monkeypatch, step, number):
    monkeypatch.setattr("pmm_edge.trainer.logging.REPORT_SECONDS", 0.0)
    stopped = train(CONFIG, tiny_dataset, out=tmp_path / "run", report=interrupt_at(step, number))
    assert not stopped.finished and stopped.epochs_done < 3
    finished = resume(tmp_path / "run")
    assert finished.finished
    assert_same_weights(weights(run.folder), weights(finished.folder))
    assert finished.best == run.best and finished.before == run.before


def test_resuming_refuses_other_data(run, tiny_dataset, tmp_path):
    data = shutil.copytree(tiny_dataset, tmp_path / "data")
    folder = train(replace(CONFIG, epochs=1), data, out=tmp_path / "run").folder
    next((data / "bounding_box_train").iterdir()).unlink()
    with pytest.raises(DataError, match="holds other images"):
        resume(folder)


def test_resuming_refuses_a_training_image_of_another_size_and_takes_a_mended_gallery(tiny_dataset, tmp_path):
    data = shutil.copytree(tiny_dataset, tmp_path / "data")
    folder = train(replace(CONFIG, epochs=1), data, out=tmp_path / "run").folder
    train_image, gallery_image = (next((data / name).iterdir()) for name in ("bounding_box_train", "bounding_box_test"))
    whole = train_image.read_bytes()
    gallery_image.write_bytes(gallery_image.read_bytes() + b"mended")
    train_image.write_bytes(whole + b"changed")
    with pytest.raises(DataError, match=rf"holds other images.*--init-from {folder}/last.pt"):
        resume(folder)
    train_image.write_bytes(whole)
    assert resume(folder).finished


def test_a_checkpoint_from_before_sizes_were_kept_is_held_against_names_and_labels(tiny_dataset, tmp_path):
    folder = train(replace(CONFIG, epochs=1), tiny_dataset, out=tmp_path / "run").folder
    checkpoint = load_checkpoint(folder / "last.pt")
    checkpoint.training["fingerprint"] = checkpoint.training["fingerprint"].split()[0]
    save_checkpoint(folder / "last.pt", checkpoint)
    assert resume(folder).finished


def test_a_data_set_that_moved_is_found_where_it_is_said_to_be(pmm, tiny_dataset, tmp_path):
    data, moved, other = tmp_path / "data", tmp_path / "moved", tmp_path / "other"
    shutil.copytree(tiny_dataset, data)
    folder = train(replace(CONFIG, epochs=1), data, out=tmp_path / "run").folder
    shutil.copytree(data, other)
    next((other / "bounding_box_train").iterdir()).unlink()
    data.rename(moved)
    gone = pmm("train", "--resume", folder)
    assert gone.exit_code == 2 and f"pmm train NEWPLACE --resume {folder}" in gone.stderr
    wrong = pmm("train", other, "--resume", folder)
    assert wrong.exit_code == 2 and f"{other} holds other images" in wrong.stderr
    assert about_run(folder).data == str(data)
    assert pmm("train", moved, "--resume", folder).exit_code == 0
    assert about_run(folder).data == str(moved)
    assert load_checkpoint(folder / "last.pt").spec.dataset == "data", "the run's name for it"
    assert pmm("train", "--resume", folder).exit_code == 0


def test_a_folder_that_is_being_trained_in_is_left_alone(run, tiny_dataset, tmp_path):
    folder = shutil.copytree(run.folder, tmp_path / "run")
    (folder / ".last.pt.0123abcd.tmp").touch()  # that of the process that trains
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with alone_in(folder):
        for second in (partial(resume, folder), partial(train, CONFIG, tiny_dataset, out=folder)):
            with pytest.raises(OutputError, match="another process is training in") as caught:
                second()
            assert caught.value.exit_code == 2
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert resume(folder).finished, "let go of, it can be trained in"


def test_a_folder_is_trained_in_where_there_are_no_locks(tmp_path, monkeypatch):
    def refused(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refused)
    with alone_in(tmp_path), alone_in(tmp_path):
        pass
    monkeypatch.setattr("pmm_edge.trainer.state.fcntl", None)
    with alone_in(tmp_path):
        pass


def test_resuming_removes_what_a_kill_left_and_no_other_file(run, tmp_path):
    folder = shutil.copytree(run.folder, tmp_path / "run")
    left = [folder / f".{name}.0123abcd.tmp" for name in ("last.pt", "best.pt", "epoch-0002.pt", "metrics.jsonl")]
    others = [folder / name for name in (".bench.json.0123abcd.tmp", ".last.pt.mine.tmp", "last.pt.0123abcd.tmp")]
    for path in (*left, *others):
        path.touch()
    resume(folder)
    assert [path.exists() for path in left] == [False] * 4 and all(path.exists() for path in others)


def test_two_runs_do_not_share_a_folder(run, tiny_dataset):
    before = weights(run.folder)
    with pytest.raises(OutputError, match="taken by another run"):
        train(CONFIG, tiny_dataset, out=run.folder)
    assert_same_weights(before, weights(run.folder))


def test_resuming_what_is_no_run(tmp_path):
    with pytest.raises(ModelError, match="is no run folder"):
        resume(tmp_path)
