"""`pmm calibrate` changes checkpoints only, exports carry its thresholds, and `match` decides by them."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import pmm_edge
from pmm_edge.bench import parity
from pmm_edge.bench.calibrate import calibrate
from pmm_edge.errors import DataError, ModelError, PmmWarning
from pmm_edge.export import export
from pmm_edge.files import sha256
from pmm_edge.gallery.inputs import EmbeddingModel
from pmm_edge.model import load_checkpoint, save_checkpoint
from pmm_edge.runtime.certificate import certificate_path

DISTANCES = ("euclidean", "cosine")


@pytest.fixture(scope="module")
def calibrated(tiny_checkpoint, crowd, tmp_path_factory):
    """A checkpoint with thresholds."""
    path = shutil.copy(tiny_checkpoint, tmp_path_factory.mktemp("calibrated") / "best.pt")
    assert calibrate(path, crowd).written
    return path


@pytest.fixture(scope="module")
def normalized(calibrated):
    """An export of it with embeddings of unit length."""
    return export(calibrated, out=calibrated.with_name("unit.onnx"), normalize_output=True).files[0].path


def test_only_the_spec_of_a_checkpoint_changes(calibrated, tiny_checkpoint, crowd):
    before, after = load_checkpoint(tiny_checkpoint), load_checkpoint(calibrated)
    assert before.spec.calibration is None
    assert replace(after.spec, calibration=None, checkpoint_sha256=None) == before.spec
    assert after.spec.checkpoint_sha256 == sha256(tiny_checkpoint)
    assert all(torch.equal(tensor, after.weights[name]) for name, tensor in before.weights.items())
    found = after.spec.calibration
    assert (found.dataset, found.identities, found.impostor_pairs) == (crowd.name, 20, 60 * 19 * 2)
    certificate_path(calibrated).write_text("{}")
    with pytest.raises(ModelError):
        calibrate(calibrated, crowd)  # as by any other command
    certificate_path(calibrated).unlink()


def test_exports_and_galleries_of_before_belong_to_the_calibrated_checkpoint(
    tiny_checkpoint, crowd, tiny_dataset, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    checkpoint = Path(shutil.copy(tiny_checkpoint, tmp_path / "best.pt"))
    before = export(checkpoint, out=tmp_path / "before.onnx").files[0].path
    calibrate(checkpoint, crowd)
    after = export(checkpoint, out=tmp_path / "after.onnx").files[0].path
    assert sha256(checkpoint) != sha256(tiny_checkpoint)
    for path in (checkpoint, after):
        assert EmbeddingModel.of(pmm_edge.load(path, "cpu")).sha256 == sha256(tiny_checkpoint), "that of its galleries"
    monkeypatch.setattr(parity, "check_batches", lambda *args: [])
    quick = {"data": tiny_dataset, "limit": 2, "parity_only": True, "device": "cpu"}
    report = pmm_edge.bench(before, **quick).report
    assert Path(report.reference.path) == checkpoint and not report.models[0].failures
    saved = load_checkpoint(checkpoint)
    weights = {name: tensor + 1 for name, tensor in saved.weights.items()}
    save_checkpoint(checkpoint, replace(saved, weights=weights, spec=replace(saved.spec, checkpoint_sha256=None)))
    with pytest.raises(ModelError, match=sha256(tiny_checkpoint)):
        pmm_edge.bench(before, **quick)


def test_exports_carry_the_thresholds_and_keep_them(calibrated, normalized, crowd, tmp_path):
    content, found = normalized.read_bytes(), load_checkpoint(calibrated).spec.calibration
    assert pmm_edge.load(normalized, "cpu").spec.calibration == found.of_unit_length()
    result = calibrate(normalized, crowd, out=tmp_path / "curves.png")
    assert (result.written, normalized.read_bytes()) == (False, content)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    for distance in DISTANCES:  # measured on embeddings of unit length, and converted to them
        measured, converted = (
            one.threshold(1e-2, distance) for one in (result.found.calibration, found.of_unit_length())
        )
        assert measured.false_matches == converted.false_matches
        np.testing.assert_allclose(measured.distance, converted.distance, rtol=1e-4)


def test_match_decides_at_the_threshold(calibrated, normalized, crowd):
    images = sorted((crowd / "query").iterdir())
    one, same, other = images[0], images[1], images[-1]
    for model in (calibrated, normalized):
        embedder = pmm_edge.load(model, "cpu")
        for distance in DISTANCES:
            near, far = (embedder.match(one, image, 1e-2, distance) for image in (same, other))
            threshold = embedder.spec.calibration.threshold(1e-2, distance)
            assert near.threshold == far.threshold == threshold
            for match in (near, far):
                assert match.same == bool(match) == (match.distance <= threshold.distance)
            assert near.distance < far.distance
            features = embedder.embed([one, same, other])
            np.testing.assert_allclose(
                embedder.distances(features[:1], [same, other], distance)[0], [near.distance, far.distance], rtol=1e-5
            )
        assert not embedder.match(one, other, 1e-2)
        with pytest.raises(ModelError, match=r"supports 0\.01"):
            embedder.match(one, same)


def test_wrong_embeddings_and_models_are_refused(calibrated, tiny_checkpoint, tiny_dataset):
    embedder = pmm_edge.load(tiny_checkpoint, "cpu")
    with pytest.raises(ModelError, match="pmm calibrate"):
        embedder.match(*[np.zeros((8, 8, 3), np.uint8)] * 2)
    rows = np.ones((2, embedder.spec.embedding_size), np.float32)
    for wrong in (rows[:, 1:], rows * np.nan):
        with pytest.raises(DataError):
            embedder.distances(rows, wrong)
    with pytest.raises(DataError, match="manhattan"):
        embedder.distances(rows, rows, "manhattan")
    with pytest.raises(ModelError, match="manhattan"):
        pmm_edge.load(calibrated, "cpu").match(*[np.zeros((8, 8, 3), np.uint8)] * 2, distance="manhattan")
    with pytest.raises(DataError, match="1,000"):
        calibrate(calibrated, tiny_dataset)


def test_people_without_cameras_are_compared_with_a_warning(normalized, crowd, tmp_path):
    for number, image in enumerate([*(crowd / "query").iterdir(), *(crowd / "bounding_box_test").iterdir()]):
        (tmp_path / "test" / image.name[:4]).mkdir(parents=True, exist_ok=True)
        shutil.copy(image, tmp_path / "test" / image.name[:4] / f"{number}.jpg")
    with pytest.warns(PmmWarning, match="no cameras"):
        found = calibrate(normalized, tmp_path).found.calibration
    assert (found.identities, found.impostor_pairs) == (20, 20 * 19 * 5)


def test_commands(pmm, calibrated, normalized, crowd):
    facts = pmm("calibrate", normalized, crowd, "--json").json
    assert facts["written"] is False
    assert [entry["fmr"] for entry in facts["refused"]] == [1e-3, 1e-4]
    assert facts["calibration"]["euclidean"]["thresholds"][0]["fmr"] == 0.01
    trained = load_checkpoint(calibrated).spec.checkpoint_sha256
    shown = pmm("calibrate", calibrated, crowd).ok
    assert load_checkpoint(calibrated).spec.checkpoint_sha256 == trained, "also if it is calibrated again"
    assert "0.01" in shown.stdout and "pmm export" in shown.stderr
    assert max(len(line) for line in shown.stdout.splitlines() if line.startswith("│")) <= 80
    images = sorted((crowd / "query").iterdir())
    for other, code in ((images[0], 0), (images[-1], 1)):
        ended = pmm("match", normalized, images[0], other, "--fmr", 0.01, "--json")
        assert ended.exit_code == code
    assert pmm("match", normalized, images[0], images[0], "--fmr", 0.01).stdout.startswith("same person")
    assert "missing.jpg" in pmm("match", normalized, images[0], "missing.jpg", "--fmr", 0.01).error
    assert "0.01" in pmm("match", normalized, *images[:2]).error
    certificate_path(normalized).write_text("{}")
    assert certificate_path(normalized).name in pmm("match", normalized, *images[:2]).error, "exit code 2, not 1"
