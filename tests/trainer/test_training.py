"""What a run writes, what its settings do, and what happens if its data or its losses go wrong."""

import json
import shutil
import warnings
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from tiny_training import CONFIG, journal

from pmm_edge.errors import CheckFailedError, DataError, PmmError, PmmWarning
from pmm_edge.model import Checkpoint, load_checkpoint, save_checkpoint
from pmm_edge.retrieval import evaluate_distances
from pmm_edge.spec import Method
from pmm_edge.trainer import step
from pmm_edge.trainer import train as train_file
from pmm_edge.trainer.config import choose_config
from pmm_edge.trainer.state import model_spec
from pmm_edge.trainer.train import new_network, train

SHORT = replace(CONFIG, epochs=2, batch=16, evaluate_every=1, ema=0.0)
"""One step in an epoch."""
IMAGE_BYTES = 48 * 32 * 3


@pytest.fixture
def run(tiny_dataset, tmp_path):
    """Train on a copy of the data with some settings of `SHORT` replaced."""
    data = shutil.copytree(tiny_dataset, tmp_path / "data")
    return lambda **settings: train(data, config=replace(SHORT, **settings), out=tmp_path / "run")


def metrics(folder, kind):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def test_a_run_folder_has_settings_log_metrics_and_checkpoints(whole):
    assert whole.finished and whole.epochs_done == 4 and not whole.stop_requested
    assert choose_config(config=whole.folder / "config.toml") == CONFIG
    trained = [("train", epoch) for epoch in (1, 2, 3, 4)]
    assert journal(whole.folder) == [("evaluate", 0), *trained[:2], ("evaluate", 2), *trained[2:], ("evaluate", 4)]
    lines = metrics(whole.folder, "train")
    assert {"loss", "triplet_1", "identity_3", "images_per_second", "lr"} <= lines[0].keys()
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert whole.before.rank1 == metrics(whole.folder, "evaluate")[0]["rank1"]
    assert "epoch 4 evaluate" in (whole.folder / "log.txt").read_text()
    assert list((whole.folder / "tensorboard").iterdir())


def test_the_best_checkpoint_has_the_average_and_its_figures_and_nothing_for_resuming(run):
    result = run(ema=0.5, evaluate_every=2)
    best, last = (load_checkpoint(result.folder / name) for name in ("best.pt", "last.pt"))
    assert best.spec.retrieval == result.best and 0 < result.best.mAP <= 1
    assert 0 < best.spec.retrieval_cosine.mAP <= 1 and last.spec.retrieval_cosine is None
    assert (best.spec.num_classes, best.spec.input.height, best.training) == (4, 48, {})
    average = last.training["average"]
    assert not torch.equal(best.weights["stage1.linear.weight"], last.weights["stage1.linear.weight"])
    assert all(torch.equal(best.weights[name], average[f"module.{name}"]) for name in best.weights)


def test_the_best_checkpoint_has_decision_thresholds_if_the_test_people_suffice(run, crowd, tmp_path):
    few = run(epochs=1)
    assert few.calibration is None and "no decision thresholds" in (few.folder / "log.txt").read_text()
    events = []
    many = train(crowd, config=SHORT, out=tmp_path / "many", report=lambda what, *_: events.append(what))
    assert events.index("train") < events.index("hashing the data"), "an untrained network needs no thresholds"
    spec = load_checkpoint(many.folder / "best.pt").spec
    assert (spec.calibration, spec.retrieval) == (many.calibration, many.best)
    assert spec.calibration.identities == 20 and spec.calibration.impostor_pairs == 60 * 19 * 2
    resumed = train(resume=many.folder)
    assert resumed.finished and resumed.calibration == many.calibration


@pytest.mark.parametrize(
    ("name", "value"),
    [("preset", "edge"), ("device", "tpu"), ("accumulate", 4), ("backbone", "vgg"), ("backbone_weights", "imagnet")],
)
def test_a_wrong_setting_is_refused_before_a_folder_is_created(tiny_dataset, tmp_path, name, value):
    with pytest.raises(PmmError):
        train(tiny_dataset, config=SHORT, out=tmp_path / "run", **{name: value})
    assert not (tmp_path / "run").exists()


def test_clipping_bounds_the_gradient(run, monkeypatch):
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def recorded(parameters, largest):
        parameters = list(parameters)
        clip(parameters, largest)
        norms.append(torch.stack([p.grad.norm() for p in parameters]).norm().item())

    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", recorded)
    run(clip_norm=0.5)
    assert len(norms) == 2 and max(norms) <= 0.5 + 1e-4


def test_patience_stops_early(run, monkeypatch):
    labels = [np.array(label) for label in ([1, 2], [1, 2], [1, 1], [2, 2])]
    same = evaluate_distances(np.eye(2, dtype=np.float32), *labels)
    monkeypatch.setattr("pmm_edge.trainer.train.evaluate_dataset", lambda *_: same)
    result = run(epochs=9, patience=2)
    assert result.finished and result.epochs_done == 3, "the first evaluation is the best, two more are not better"


@pytest.mark.parametrize(
    "mix", ["cutout", "cutmix", "a-cutmix", "dropblock", "none", "baseline", "bdb", "pcb", "aos", "cama"]
)
def test_every_method_trains_and_its_checkpoint_loads(run, mix):
    folder = run(epochs=1, **({"method": mix} if mix in get_args(Method) else {"mix": mix})).folder
    assert 0 < metrics(folder, "train")[0]["loss"] < 100
    best = load_checkpoint(folder / "best.pt")
    assert best.network()(torch.zeros(1, 3, 48, 32)).shape[1] == best.spec.embedding_size


def test_init_from_loads_the_tensors_that_fit_and_imagenet_the_rest_of_the_backbone(monkeypatch, tmp_path):
    def offline(name):
        raise PmmError("offline")

    monkeypatch.setattr("pmm_edge.model.checkpoint.imagenet_weights", offline)
    network, path = new_network(SHORT, 4), tmp_path / "earlier.pt"
    checkpoint = Checkpoint(model_spec(SHORT, network, 4, "tiny"), network.state_dict())
    save_checkpoint(path, checkpoint)
    count, config = len(checkpoint.weights), replace(SHORT, seed=1, backbone_weights="imagenet", init_from=str(path))
    with pytest.warns(PmmWarning, match=f"{count} of {count} tensors fit"):
        network = new_network(config, 4)
    assert all(torch.equal(tensor, checkpoint.weights[name]) for name, tensor in network.state_dict().items())
    with pytest.warns(PmmWarning, match=f"{count - 18} of {count} tensors fit"):
        network = new_network(replace(config, method="bdb"), 4)
    assert torch.equal(network.backbone.conv1.weight, checkpoint.weights["backbone.conv1.weight"])
    del checkpoint.weights["backbone.layer4.bn2.bias"]
    save_checkpoint(path, checkpoint)
    with pytest.raises(PmmError, match="offline"):
        new_network(config, 4)


def test_an_unreadable_image_is_replaced_and_named_and_too_many_stop_the_run(run, tmp_path):
    bad, other = sorted((tmp_path / "data" / "bounding_box_train").iterdir())[4:6]
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.warns(PmmWarning, match=bad.name) as warned:
        folder = run().folder
    assert len(warned) == 1 and str(bad) in (folder / "log.txt").read_text()
    other.write_bytes(b"")
    shutil.rmtree(folder)
    with pytest.raises(DataError):
        run(max_bad_images=1)


def test_junk_is_not_read_and_an_image_that_cannot_be_skipped_is_named(run, tmp_path):
    data = tmp_path / "data"
    (data / "bounding_box_test" / "-1_c1s1_000000_00.jpg").touch()
    folder = run(epochs=1).folder
    for images, named in (("bounding_box_train/0003_*", r"identity 3 .*0003_c"), ("query/0102_c2*", "0102_c2")):
        shutil.rmtree(folder)
        for image in data.glob(images):
            image.write_bytes(b"")
        with pytest.raises(DataError, match=named):
            run()


def test_images_of_nobody_are_skipped_with_a_warning(run, tmp_path):
    for image in (tmp_path / "data" / "bounding_box_train").glob("0001_*"):
        image.rename(image.with_name(image.name.replace("0001", "0000", 1)))
    with pytest.warns(PmmWarning) as warned:
        folder = run(epochs=1, batch=8).folder
    assert len(warned) == 1 and load_checkpoint(folder / "best.pt").spec.num_classes == 3


def test_a_loss_that_is_not_finite_stops_the_run_and_does_not_reach_its_checkpoint(run, tmp_path, monkeypatch):
    losses, real = [], step.pmm_loss

    def breaks(*arguments):
        loss, parts = real(*arguments)
        losses.append(loss)
        return (loss * torch.nan if len(losses) == 2 else loss), parts

    monkeypatch.setattr(step, "pmm_loss", breaks)
    with pytest.raises(CheckFailedError) as caught:
        run()
    assert "epoch 2, step 1 " in caught.value.problem and str(tmp_path / "run") in caught.value.problem
    assert torch.isfinite(load_checkpoint(tmp_path / "run" / "last.pt").weights["stage1.linear.weight"]).all()


@pytest.mark.parametrize(("images", "cached"), [(36, 36), (20, 20), (0, 0)])
def test_the_cache_is_shared_by_all_splits_and_a_small_one_is_named(run, monkeypatch, images, cached):
    runs, fit = [], train_file.fit
    monkeypatch.setattr(train_file, "fit", lambda run: (runs.append(run), fit(run))[1])
    with warnings.catch_warnings(record=True) as warned:
        folder = run(epochs=1, cache_gib=(images + 0.5) * IMAGE_BYTES / 2**30).folder
    assert runs[0].feed.crops.cached_bytes + runs[0].crops.cached_bytes == cached * IMAGE_BYTES
    assert len(warned) == (cached < 36) == ("--cache-gib 0.1" in (folder / "log.txt").read_text())
