"""What a run does on request, and when its data, its losses or its settings go wrong."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from pmm_edge.errors import CheckFailedError, DataError, ModelError, PmmError
from pmm_edge.model import load_checkpoint, save_checkpoint
from pmm_edge.retrieval import evaluate_distances
from pmm_edge.trainer.config import PRESETS
from pmm_edge.trainer.state import keep_epoch
from pmm_edge.trainer.train import resume, train

CONFIG = replace(
    PRESETS["quick"], height=96, width=64, epochs=2, batch=16, evaluate_every=1, erase_size=8, device="cpu"
)


@pytest.fixture
def data(tiny_dataset, tmp_path):
    return shutil.copytree(tiny_dataset, tmp_path / "data")


def _same_result():
    return evaluate_distances(
        np.eye(2, dtype=np.float32), *(np.array(labels) for labels in ([1, 2], [1, 2], [1, 1], [2, 2]))
    )


def weights(folder, name="last.pt"):
    return load_checkpoint(folder / name).weights


def test_accumulation_takes_the_batch_in_parts_and_steps_once(data, tmp_path):
    run = train(replace(CONFIG, accumulate=2), data, out=tmp_path / "run")
    steps = load_checkpoint(run.folder / "last.pt").training["optimizer"]["state"][0]["step"]
    assert steps == 2, "one step an epoch: 4 identities, 2 in each part"


def test_the_average_is_what_is_judged_and_kept_as_best(data, tmp_path):
    run = train(replace(CONFIG, ema=0.5, evaluate_every=2), data, out=tmp_path / "run")
    last, best = weights(run.folder), weights(run.folder, "best.pt")
    average = load_checkpoint(run.folder / "last.pt").training["average"]
    assert all(torch.equal(best[name], average[f"module.{name}"]) for name in best)
    assert not torch.equal(best["stage1.linear.weight"], last["stage1.linear.weight"])


def test_clipping_bounds_the_step(data, tmp_path, monkeypatch):
    norms = []
    clip = torch.nn.utils.clip_grad_norm_

    def recorded(parameters, largest):
        parameters = list(parameters)
        clip(parameters, largest)
        norms.append(torch.stack([p.grad.norm() for p in parameters]).norm().item())

    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", recorded)
    train(replace(CONFIG, clip_norm=0.5), data, out=tmp_path / "run")
    assert len(norms) == 2 and max(norms) <= 0.5 + 1e-4


def test_patience_stops_early_and_says_so(data, tmp_path, monkeypatch):
    monkeypatch.setattr("pmm_edge.trainer.train.evaluate", lambda *_: _same_result())
    run = train(replace(CONFIG, epochs=9, patience=2), data, out=tmp_path / "run")
    assert run.finished and run.epochs_done == 3, "the first is the best, two more are not better"
    assert "no better mAP in 2 evaluations" in (run.folder / "log.txt").read_text()


def test_the_last_checkpoints_are_kept(data, tmp_path):
    run = train(replace(CONFIG, epochs=4, keep=2), data, out=tmp_path / "run")
    assert {path.name for path in run.folder.glob("*.pt")} == {"best.pt", "epoch-0003.pt", "epoch-0004.pt", "last.pt"}
    assert load_checkpoint(run.folder / "epoch-0003.pt").training["epoch"] == 3


def test_the_oldest_checkpoints_are_dropped_by_their_epoch_and_no_other_file(tmp_path):
    (tmp_path / "last.pt").write_bytes(b"weights")
    (tmp_path / "epoch-mine.pt").touch()
    for epoch in range(9998, 10_002):
        keep_epoch(tmp_path, epoch, keep=2)
    assert {path.name for path in tmp_path.glob("epoch-*")} == {"epoch-10000.pt", "epoch-10001.pt", "epoch-mine.pt"}


def test_starting_from_a_checkpoint_reports_what_was_taken(data, tmp_path, tiny_checkpoint):
    said = []
    train(replace(CONFIG, epochs=1, init_from=str(tiny_checkpoint)), data, out=tmp_path / "run", warn=said.append)
    assert f"{tiny_checkpoint}: " in said[0] and "tensors taken" in said[0] and "start afresh" not in said[0]
    said.clear()
    config = replace(CONFIG, epochs=1, method="bdb", init_from=str(tiny_checkpoint))
    train(config, data, out=tmp_path / "bdb", warn=said.append)
    assert "start afresh (part.linear.weight" in said[0] and "not used (stage2" in said[0]


def test_imagenet_weights_are_not_fetched_where_a_checkpoint_fills_the_backbone(
    data, tmp_path, monkeypatch, tiny_checkpoint
):
    def offline(name):
        raise PmmError(f"the ImageNet weights of {name} cannot be downloaded")

    monkeypatch.setattr("pmm_edge.model.checkpoint.imagenet_weights", offline)
    config = replace(CONFIG, epochs=1, method="bdb", backbone_weights="imagenet", init_from=str(tiny_checkpoint))
    assert train(config, data, out=tmp_path / "run").finished
    checkpoint = load_checkpoint(tiny_checkpoint)
    del checkpoint.weights["backbone.layer4.1.bn2.bias"]
    save_checkpoint(tmp_path / "partial.pt", checkpoint)
    with pytest.raises(PmmError, match="cannot be downloaded"):
        train(replace(config, init_from=str(tmp_path / "partial.pt")), data, out=tmp_path / "other")


def test_an_unreadable_image_is_passed_over_with_a_warning_and_named_in_the_log(data, tmp_path):
    bad = sorted((data / "bounding_box_train").iterdir())[4]
    bad.write_bytes(bad.read_bytes()[:200])
    said = []
    run = train(CONFIG, data, out=tmp_path / "run", warn=said.append)
    assert run.finished and len(said) == 1 and str(bad) in said[0]
    assert f"warning: cannot read image {bad}" in (run.folder / "log.txt").read_text()


def test_images_numbered_zero_are_left_out_with_a_warning(data, tmp_path):
    for image in (data / "bounding_box_train").glob("0001_*"):
        image.rename(image.with_name(image.name.replace("0001", "0000", 1)))
    said = []
    run = train(replace(CONFIG, epochs=1, batch=8), data, out=tmp_path / "run", warn=said.append)
    assert load_checkpoint(run.folder / "best.pt").spec.num_classes == 3
    assert len(said) == 1 and "skips 3 images with identity 0" in said[0]


def test_too_many_unreadable_images_stop_the_run(data, tmp_path):
    for bad in sorted((data / "bounding_box_train").iterdir())[3:5]:
        bad.write_bytes(b"")
    with pytest.raises(DataError, match="2 training images cannot be read"):
        train(replace(CONFIG, max_bad_images=1), data, out=tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_with_its_batch_saved_and_named(data, tmp_path, monkeypatch):
    from pmm_edge.trainer import step

    calls = []

    def breaks_at_the_second(outputs, pids, mixed=None):
        loss, parts = step_loss(outputs, pids, mixed)
        calls.append(loss)
        return (loss * torch.nan if len(calls) == 2 else loss), parts

    step_loss = step.pmm_loss
    monkeypatch.setattr("pmm_edge.trainer.step.pmm_loss", breaks_at_the_second)
    folder = tmp_path / "run"
    with pytest.raises(CheckFailedError, match=r"loss of epoch 2, step 1 is not finite; .*bad_batch.pt"):
        train(CONFIG, data, out=folder)
    batch = torch.load(folder / "bad_batch.pt", weights_only=True)
    assert batch["crops"].shape == (16, 96, 64, 3) and len(batch["images"]) == 16 and batch["epoch"] == 2
    assert torch.isfinite(weights(folder)["stage1.linear.weight"]).all(), "last.pt is from before"


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_loss_that_is_not_finite_names_last_pt_where_there_is_one(data, tmp_path, monkeypatch, epoch):
    from pmm_edge.trainer import step

    left = [epoch]

    def breaks(outputs, pids, mixed=None):
        loss, parts = step_loss(outputs, pids, mixed)
        left[0] -= 1
        return (loss if left[0] else loss * torch.nan), parts

    step_loss = step.pmm_loss
    monkeypatch.setattr("pmm_edge.trainer.step.pmm_loss", breaks)
    with pytest.raises(CheckFailedError) as caught:
        train(CONFIG, data, out=tmp_path / "run")
    there = (tmp_path / "run" / "last.pt").exists()
    assert there == (epoch == 2) == ("last.pt is from before it" in str(caught.value))
    assert "A new run with --precision fp32" in caught.value.remedy


def test_resuming_refuses_settings_that_were_edited(data, tmp_path):
    folder = train(replace(CONFIG, epochs=1), data, out=tmp_path / "run").folder
    text = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(text.replace("seed = 0", "seed = 7"))
    with pytest.raises(ModelError, match="seed: 7, 0"):
        resume(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"method": "baseline"},
        {"method": "bdb"},
        {"mix": "cutout"},
        {"mix": "cutmix"},
        {"mix": "a-cutmix"},
        {"mix": "dropblock"},
        {"mix": "none"},
    ],
    ids=lambda values: next(iter(values.values())),
)
def test_every_method_trains_and_its_checkpoint_loads(data, tmp_path, values):
    run = train(replace(CONFIG, epochs=1, **values), data, out=tmp_path / "run")
    line = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[1])
    assert 0 < line["loss"] < 100
    best = load_checkpoint(run.folder / "best.pt")
    assert best.network()(torch.zeros(1, 3, 96, 64)).shape[1] == best.spec.embedding_size
