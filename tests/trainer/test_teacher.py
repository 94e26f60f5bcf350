"""Learning from a teacher: its targets, the losses that compare with them, what is saved and what is refused."""

import json
import math
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save
from tiny_training import CONFIG, assert_same_run
from torch import nn

import pmm_edge as pmm
from pmm_edge.errors import ModelError, PmmError, PmmWarning
from pmm_edge.export.reduce import reduce_checkpoint, reduced_path
from pmm_edge.files import sha256
from pmm_edge.model import StageOutput, load_checkpoint, save_checkpoint
from pmm_edge.runtime.model_file import DIGEST_KEY, parse_model
from pmm_edge.spec import METADATA_KEY
from pmm_edge.trainer import logging, teacher
from pmm_edge.trainer import train as train_file
from pmm_edge.trainer.device import World
from pmm_edge.trainer.teacher import distillation_loss, embedding_loss, relation_losses
from pmm_edge.trainer.train import train


@pytest.fixture
def student(whole, tiny_dataset, tmp_path):
    """Train with the run `whole`, or another teacher, and some settings of `CONFIG` replaced."""

    def run(name="run", report=lambda *_: None, **settings):
        config = replace(CONFIG, **{"method": "baseline", "teacher": str(whole.folder), **settings})
        return train(tiny_dataset, config=config, out=tmp_path / name, report=report)

    return run


def huber(difference):
    return 0.5 * difference**2 if abs(difference) < 1 else abs(difference) - 0.5


def slow_relations(embeddings):
    """Distances divided by their mean, and the cosine at the first of three, None if two of them are equal."""
    count = range(len(embeddings))
    distances = {(i, j): math.dist(embeddings[i], embeddings[j]) for i in count for j in count if i != j}
    mean = sum(distances.values()) / len(distances)

    def cosine(j, i, k):
        sides = [[a - b for a, b in zip(embeddings[end], embeddings[j], strict=True)] for end in (i, k)]
        lengths = distances[j, i] * distances[j, k]
        return sum(a * b for a, b in zip(*sides, strict=True)) / lengths if lengths else None

    cosines = {(j, i, k): cosine(j, i, k) for j in count for i in count for k in count if len({i, j, k}) == 3}
    return {pair: distance / mean for pair, distance in distances.items()}, cosines


@pytest.mark.parametrize("copies", [False, True])
def test_the_relations_are_those_of_a_slow_reference(copies):
    ours, targets = (np.random.default_rng(seed).normal(size=(6, 3 + seed)) for seed in (0, 1))
    targets[1] = targets[0] if copies else targets[1]
    (distances, cosines), (their_distances, their_cosines) = (slow_relations(side.tolist()) for side in (ours, targets))
    differences = [huber(distances[pair] - their_distances[pair]) for pair in distances]
    angles = [huber(cosines[at] - their_cosines[at]) for at in cosines if their_cosines[at] is not None]
    assert len(angles) == 6 * 5 * 4 - (2 * 2 * 4) * copies
    found = relation_losses(torch.tensor(ours) * 7 + 3, torch.tensor(targets) / 5 - 1)  # of any scale and origin
    assert [loss.item() for loss in found] == pytest.approx([sum(differences) / 30, sum(angles) / len(angles)])
    same = relation_losses(torch.tensor(targets).float(), torch.tensor(targets).float())
    assert [loss.item() for loss in same] == pytest.approx([0, 0], abs=1e-9)


def test_the_embedding_loss_is_one_minus_the_cosine():
    projected, targets = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [3.0, 3.0]])
    assert embedding_loss(projected, targets).item() == pytest.approx(0.5)


def test_gradients_are_those_of_finite_differences_and_finite_for_equal_embeddings():
    random = torch.Generator().manual_seed(0)
    embeddings, targets, others = (torch.randn(5, 4, dtype=torch.float64, generator=random) for _ in range(3))
    embeddings.requires_grad_()
    assert torch.autograd.gradcheck(lambda each: relation_losses(each, targets), embeddings)
    assert torch.autograd.gradcheck(lambda each: embedding_loss(each, others), embeddings)
    equal = torch.ones(5, 4, requires_grad=True)
    sum(relation_losses(equal, targets.float())).backward()
    assert torch.isfinite(equal.grad).all()


def test_the_parts_are_named_and_summed_with_their_weights_in_float32():
    random = torch.Generator().manual_seed(0)
    embedding, projected, targets = (torch.randn(4, size, generator=random) for size in (8, 6, 6))
    outputs = [StageOutput(embedding[:, :4], torch.zeros(4, 2)), StageOutput(embedding[:, 4:], torch.zeros(4, 2))]
    with torch.autocast("cpu", torch.bfloat16):
        total, parts = distillation_loss(outputs, projected, targets)
    expected = [*relation_losses(embedding, targets), embedding_loss(projected, targets)]
    assert list(parts) == ["relation_distance", "relation_angle", "embedding"]
    assert [part.item() for part in parts.values()] == pytest.approx([part.item() for part in expected])
    assert total.item() == pytest.approx(sum(teacher.PARTS[name] * part.item() for name, part in parts.items()))


def test_targets_are_mean_embeddings_of_images_and_mirror_images(student, tiny_checkpoint, monkeypatch):
    """The teacher has another input size, architecture and embedding size than the student."""
    seen, shards = {}, []

    def recorded(run):
        seen["feed"] = run.feed
        shards.extend(run.feed.shards(run.feed.batches(1), 1, 0, logging.Meter()))
        os.kill(os.getpid(), signal.SIGINT)
        return False

    monkeypatch.setattr(train_file, "train_epoch", recorded)
    student(teacher=str(tiny_checkpoint))
    paths, embedder = seen["feed"].paths, pmm.load(tiny_checkpoint)
    images = [np.asarray(Image.open(path)) for path in paths]
    expected = (embedder.embed(images) + embedder.embed([image[:, ::-1] for image in images])) / 2
    expected -= expected.mean(axis=0)
    np.testing.assert_allclose(seen["feed"].targets, expected, atol=1e-4 * np.abs(expected).max())
    indices = np.concatenate(seen["feed"].batches(1))
    given = torch.cat([shard.targets for step in shards for shard in step])
    assert np.array_equal(given.numpy(), seen["feed"].targets[indices]), "each image has its own target"


def test_best_pt_has_no_projection_and_names_the_teacher(student, whole):
    folder = student(precision="bf16", clip_norm=10.0, epochs=1, distill_weight=0.5).folder
    best, last = (load_checkpoint(folder / name) for name in ("best.pt", "last.pt"))
    own = best.network().state_dict()
    assert best.weights.keys() == last.weights.keys() == own.keys() and best.training == {}
    assert {name: tuple(tensor.shape) for name, tensor in last.training["projection"].items()} == {
        "weight": (1536, 512),
        "bias": (1536,),
    }
    assert best.spec.teacher_sha256 == last.spec.teacher_sha256 == sha256(whole.folder / "best.pt")
    assert (
        best.spec.architecture == "baseline" and f'teacher = "{whole.folder}"' in (folder / "config.toml").read_text()
    )
    (line,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
    weighted = sum(weight * line[name] for name, weight in teacher.PARTS.items())
    assert line["loss"] == pytest.approx(line["triplet_1"] + line["identity_1"] + 0.5 * weighted, rel=1e-5)


def test_a_run_that_began_with_other_weights_of_distillation_is_not_resumed(student, monkeypatch):
    folder = student(epochs=1).folder
    monkeypatch.setitem(teacher.PARTS, "embedding", 31.0)
    with pytest.raises(ModelError, match="embedding"):
        train(resume=folder)


def test_a_reduced_checkpoint_is_a_teacher_and_initializes_the_full_network(student, whole, crowd, tmp_path):
    full = shutil.copy(whole.folder / "best.pt", tmp_path / "best.pt")
    reduced = reduce_checkpoint(full, load_checkpoint(full), 4, False, crowd, None, lambda *_: None)
    path = reduced_path(full, 4, False)
    last = load_checkpoint(student(teacher=str(path), epochs=1).folder / "last.pt")
    assert last.training["projection"]["weight"].shape == (4, 512) and last.spec.teacher_sha256 == sha256(path)
    with pytest.warns(PmmWarning, match=f"{len(reduced.weights) - 2} of {len(reduced.weights)} tensors fit"):
        network = train_file.new_network(replace(CONFIG, seed=1, init_from=str(path)), 4)
    assert all(torch.equal(tensor, reduced.weights[name]) for name, tensor in network.state_dict().items())


def test_exported_weights_are_the_same_teacher_as_their_checkpoint(tiny_checkpoint, tmp_path):
    checkpoint, exported = load_checkpoint(tiny_checkpoint), tmp_path / "model.safetensors"
    spec = replace(checkpoint.spec, checkpoint_sha256=sha256(tiny_checkpoint))
    weights = {name: part.contiguous() for name, part in checkpoint.weights.items() if "classifier" not in name}
    metadata = {METADATA_KEY: spec.to_json()}
    metadata[DIGEST_KEY] = parse_model(exported, save(weights, metadata)).digest
    exported.write_bytes(save(weights, metadata))
    places, images = (tiny_checkpoint, exported), torch.rand(2, 3, 96, 64)
    ours, theirs = (teacher.read_teacher(path, World(), torch.device("cpu")) for path in places)
    assert ours.sha256 == theirs.sha256 == sha256(tiny_checkpoint)
    with torch.no_grad():
        torch.testing.assert_close(ours.embed(images), theirs.embed(images))


def test_a_teacher_may_have_been_trained_on_another_number_of_people(student, whole, tmp_path):
    other = load_checkpoint(whole.folder / "best.pt")
    for name, tensor in other.weights.items():
        if "classifier" in name:
            other.weights[name] = tensor[[0, 1, 2, 3, 0, 1, 2]]
    save_checkpoint(tmp_path / "other.pt", replace(other, spec=replace(other.spec, num_classes=7)))
    spec = load_checkpoint(student(teacher=str(tmp_path / "other.pt"), epochs=1).folder / "best.pt").spec
    assert (spec.num_classes, spec.teacher_sha256) == (4, sha256(tmp_path / "other.pt"))


def test_a_step_moves_the_projection_and_its_weight_scales_the_loss(student):
    runs = [student(f"run-{weight}", epochs=1, distill_weight=weight).folder for weight in (0.0, 1.0)]
    states = [load_checkpoint(folder / "last.pt") for folder in runs]
    moved = [state.training["projection"]["weight"] for state in states]
    assert not torch.equal(*moved)
    assert not torch.equal(*(state.weights["backbone.conv1.weight"] for state in states))


def test_a_run_interrupted_in_the_embedding_and_in_a_step_resumes_to_the_same_bits(student, monkeypatch):
    whole, events, rate = student("whole"), [], train_file.learning_rate

    def seen(what, count):
        events.append(what)
        if events.count(what) == count:
            os.kill(os.getpid(), signal.SIGINT)

    stopped = student("stopped", report=lambda what, *_: what == "teacher" and seen(what, 1))
    assert not stopped.finished and stopped.epochs_done == 0
    monkeypatch.setattr(logging, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(train_file, "learning_rate", lambda *of: (seen("step", 5), rate(*of))[1])
    assert train(resume=stopped.folder).epochs_done == 2
    assert train(resume=stopped.folder).finished
    assert_same_run(whole.folder, stopped.folder)


def test_a_moved_teacher_is_found_at_its_new_place_and_another_one_is_refused(student, whole, tmp_path):
    moved, config = tmp_path / "moved.pt", tmp_path / "run" / "config.toml"
    shutil.copy(whole.folder / "best.pt", tmp_path / "best.pt")
    folder = student(teacher=str(tmp_path / "best.pt"), epochs=1).folder
    (tmp_path / "best.pt").rename(moved)
    with pytest.raises(ModelError) as caught:
        train(resume=folder)
    assert str(tmp_path / "best.pt") in caught.value.problem and str(config) in caught.value.remedy
    text = config.read_text()
    config.write_text(text.replace(str(tmp_path / "best.pt"), str(moved)))
    assert train(resume=folder).finished
    other = load_checkpoint(moved)
    calibrated = replace(other.spec, checkpoint_sha256=sha256(moved), dataset="other")  # as by pmm calibrate
    save_checkpoint(moved, replace(other, spec=calibrated))
    assert train(resume=folder).finished
    save_checkpoint(moved, other)
    other.weights["stage1.bn.bias"] += 1
    save_checkpoint(moved, other)
    with pytest.raises(ModelError) as caught:
        train(resume=folder)
    assert sha256(moved) in caught.value.problem and calibrated.checkpoint_sha256 in caught.value.remedy
    config.write_text(text.replace(str(tmp_path / "best.pt"), ""))
    with pytest.raises(ModelError, match="teacher: '', was"):
        train(resume=folder)


@pytest.mark.parametrize("broken", ["nan", "equal"])
def test_a_teacher_without_usable_embeddings_is_refused(student, whole, tmp_path, broken):
    checkpoint = load_checkpoint(whole.folder / "best.pt")
    for name in ("stage1", "stage2", "stage3"):
        nn.init.constant_(checkpoint.weights[f"{name}.bn.weight"], torch.nan if broken == "nan" else 0.0)
    save_checkpoint(tmp_path / "bad.pt", checkpoint)
    with pytest.raises(ModelError) as caught:
        student(teacher=str(tmp_path / "bad.pt"))
    assert str(tmp_path / "bad.pt") in caught.value.problem


def test_what_is_no_teacher_is_refused_before_a_folder_is_created(student, tmp_path):
    for name in ("file.pt", "model.onnx"):
        (tmp_path / name).write_text("text")
    for wrong in (tmp_path / "missing", tmp_path, tmp_path / "file.pt", tmp_path / "model.onnx"):
        with pytest.raises(ModelError) as caught:
            student(teacher=str(wrong))
        assert str(wrong) in caught.value.problem
    with pytest.raises(PmmError):
        student(method="pmm")
    assert not (tmp_path / "run").exists()
