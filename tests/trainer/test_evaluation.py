"""Evaluation within a training: its own batch, and a stop that need not wait for its end."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from pmm_edge.data.dataset import scan
from pmm_edge.data.loader import Crops
from pmm_edge.errors import PmmError
from pmm_edge.model import build_model, load_checkpoint
from pmm_edge.trainer.config import PRESETS
from pmm_edge.trainer.distributed import World
from pmm_edge.trainer.feed import Feed
from pmm_edge.trainer.train import Evaluation, Run, resume, train

CONFIG = replace(PRESETS["quick"], height=96, width=64, epochs=2, batch=8, evaluate_every=1, erase_size=8, device="cpu")
IMAGE_BYTES = 96 * 64 * 3


def gpu_is_full():
    raise torch.OutOfMemoryError("CUDA out of memory")


def machine_is_full():
    torch.empty(1 << 60)


class Roomy(torch.nn.Module):
    """A network on a device whose memory holds so many images at once."""

    def __init__(self, network, room, allocate=gpu_is_full):
        super().__init__()
        self.network, self.room, self.allocate, self.seen = network, room, allocate, []

    def forward(self, images):
        if len(images) > self.room:
            self.allocate()
        self.seen.append(len(images))
        return self.network(images)


@pytest.fixture
def evaluation(tiny_dataset):
    dataset = scan(tiny_dataset)
    said = []
    query, gallery = (Crops(split.paths, 96, 64) for split in (dataset.query, dataset.gallery))
    return Evaluation(dataset, query, gallery, torch.device("cpu"), warn=said.append), said


@pytest.fixture(scope="module")
def network():
    return build_model("baseline", num_classes=4, backbone="resnet18", height=96, width=64)


@pytest.mark.parametrize("full", [gpu_is_full, machine_is_full])
def test_a_batch_that_does_not_fit_is_halved_once_and_said(evaluation, network, full):
    evaluation, said = evaluation
    expected = evaluation.judge(Roomy(network, 64))
    tight = Roomy(network, 5, full)
    result = evaluation.judge(tight)
    assert sum(tight.seen) == 24 and max(tight.seen) <= 5
    assert evaluation.batch == 4 and "its batch is now 4" in said[-1] and len(said) == 4
    np.testing.assert_allclose(result.mAP, expected.mAP, atol=1e-6)
    evaluation.judge(tight)
    assert len(said) == 4, "the batch that fits is remembered"


def test_a_single_image_that_does_not_fit_does_not_blame_the_batch_of_training(evaluation, network):
    evaluation, _ = evaluation
    with pytest.raises(PmmError, match=r"a single image does not fit .*nvidia-smi") as caught:
        evaluation.judge(Roomy(network, 0))
    assert "--batch" not in str(caught.value)


@pytest.fixture(scope="module")
def whole(tiny_dataset, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pmm_edge.trainer.train.BATCH", 4)
        return train(CONFIG, tiny_dataset, out=tmp_path_factory.mktemp("runs") / "whole")


@pytest.mark.parametrize(("evaluations", "epochs"), [(1, 0), (3, 2)])
def test_an_interruption_in_an_evaluation_waits_for_one_batch_and_changes_nothing(
    whole, tiny_dataset, tmp_path, monkeypatch, evaluations, epochs
):
    monkeypatch.setattr("pmm_edge.trainer.train.BATCH", 4)
    began = []

    def report(what, done, total, detail=""):
        began.extend([what] if what == "embed query" and done == 4 else [])
        if len(began) >= evaluations and what.startswith("embed"):
            assert (what, done) == ("embed query", 4), "one batch, then no more"
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = train(CONFIG, tiny_dataset, out=tmp_path / "run", report=report)
    assert not stopped.finished and stopped.stop_asked and stopped.epochs_done == epochs
    finished = resume(tmp_path / "run")
    assert finished.finished and (finished.best, finished.before) == (whole.best, whole.before)
    one, other = (load_checkpoint(folder / "last.pt").weights for folder in (whole.folder, finished.folder))
    assert all(torch.equal(one[name], other[name]) for name in one)
    kinds = [(folder / "metrics.jsonl").read_text().count("evaluate") for folder in (whole.folder, finished.folder)]
    assert kinds == [3, 3]


@pytest.mark.parametrize(("images", "kept"), [(100, 36), (20, 20), (5, 5), (0, 0)])
def test_the_cache_bounds_all_splits_together(tiny_dataset, tmp_path, images, kept):
    config = replace(CONFIG, cache_gib=(images + 0.5) * IMAGE_BYTES / 2**30)
    dataset = scan(tiny_dataset)
    network = build_model("baseline", num_classes=4, backbone="resnet18")
    run = Run(config, dataset, tmp_path, network, World(), lambda *_, **__: None, print)
    crops = [run.feed.crops, run.evaluation.query, run.evaluation.gallery]
    assert sum(part.cached_bytes for part in crops) == kept * IMAGE_BYTES


@pytest.mark.parametrize(("images", "held"), [(100, False), (20, True)])
def test_a_cache_that_does_not_hold_all_images_is_named_with_one_that_would(tiny_dataset, tmp_path, images, held):
    config = replace(CONFIG, epochs=1, cache_gib=(images + 0.5) * IMAGE_BYTES / 2**30)
    said = []
    train(config, tiny_dataset, out=tmp_path / "run", warn=said.append)
    expected = "0.00034 of 0.00062 GiB of decoded images are kept in memory"
    assert [expected in line and "--cache-gib is 0.00035, and 0.1 would hold all" in line for line in said] == [
        True
    ] * held
    assert (expected in (tmp_path / "run" / "log.txt").read_text()) == held


def test_the_processes_of_a_machine_share_its_memory_and_its_cores(tiny_dataset, monkeypatch):
    monkeypatch.setattr("pmm_edge.machine.usable_cores", lambda root=None: 8.0)
    config = replace(CONFIG, cache_gib=20 * IMAGE_BYTES / 2**30)
    feed = Feed(scan(tiny_dataset).train, config, World(0, 8, 0, local_size=2), torch.device("cpu"))
    assert feed.crops.cached_bytes == 10 * IMAGE_BYTES
    assert feed.crops.workers == 4
