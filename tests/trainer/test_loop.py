"""Runs on a small data set, from the outside: what a run folder holds, and what survives an interruption."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch

from pmm_edge.errors import DataError, ModelError, OutputError
from pmm_edge.model import load_checkpoint
from pmm_edge.trainer.presets import PRESETS, read_config
from pmm_edge.trainer.start import resume, train

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
    monkeypatch.setattr("pmm_edge.trainer.meter.REPORT_SECONDS", 0.0)
    stopped = train(CONFIG, tiny_dataset, out=tmp_path / "run", report=interrupt_at(step, number))
    assert not stopped.finished and stopped.epochs_done < 3
    finished = resume(tmp_path / "run")
    assert finished.finished
    assert_same_weights(weights(run.folder), weights(finished.folder))
    assert finished.best == run.best and finished.before == run.before


def test_resuming_refuses_other_data(run, tiny_dataset, tmp_path):
    import shutil

    data = shutil.copytree(tiny_dataset, tmp_path / "data")
    folder = train(replace(CONFIG, epochs=1), data, out=tmp_path / "run").folder
    next((data / "bounding_box_train").iterdir()).unlink()
    with pytest.raises(DataError, match="holds other images"):
        resume(folder)


def test_two_runs_do_not_share_a_folder(run, tiny_dataset):
    before = weights(run.folder)
    with pytest.raises(OutputError, match="taken by another run"):
        train(CONFIG, tiny_dataset, out=run.folder)
    assert_same_weights(before, weights(run.folder))


def test_resuming_what_is_no_run(tmp_path):
    with pytest.raises(ModelError, match="is no run folder"):
        resume(tmp_path)
