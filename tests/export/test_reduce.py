"""`--embedding-size` writes a checkpoint whose last layer is a PCA, and everything accepts it like any other."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import nn

import pmm_edge
from pmm_edge.console import silent
from pmm_edge.data.dataset import scan
from pmm_edge.errors import ModelError
from pmm_edge.export import export
from pmm_edge.export.graph import StrippedNetwork
from pmm_edge.export.reduce import principal_projection, reduce_checkpoint
from pmm_edge.files import sha256
from pmm_edge.model import Checkpoint, build_model, load_checkpoint, save_checkpoint
from pmm_edge.pictures.attention import attention_of
from pmm_edge.retrieval.distances import pairwise_distances
from pmm_edge.runs import AboutRun, find_checkpoint, write_about_run
from pmm_edge.runtime.embed_files import embed_dataset, evaluate_dataset
from pmm_edge.spec import InputSpec, ModelSpec


def new_run(checkpoint: Path, data: Path, folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(checkpoint, folder / "best.pt")
    write_about_run(folder, AboutRun("one", str(data), "0"))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PMM of ResNet-10, which traces twice as fast as the tiny network."""
    torch.manual_seed(0)
    network = build_model("pmm", num_classes=4, backbone="resnet10", height=96, width=32)
    spec = ModelSpec("pmm", "resnet10", 4, InputSpec(96, 32), 1536, network.stages, network.mix_blocks)
    path = tmp_path_factory.mktemp("full") / "best.pt"
    save_checkpoint(path, Checkpoint(spec, network.state_dict()))
    return path


@pytest.fixture(scope="module")
def run(checkpoint: Path, crowd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose data set has 12 training images, and people enough for thresholds; `reduced-8` was made from it."""
    folder = new_run(checkpoint, crowd, tmp_path_factory.mktemp("reduce") / "run")
    export(folder, embedding_size=8)
    return folder


def rows(seed: int, count: int = 200, size: int = 24) -> np.ndarray:
    """Correlated embeddings after a ReLU, with a mean far from 0."""
    random = np.random.default_rng(seed)
    return (random.normal(size=(count, size)) @ random.normal(size=(size, size)) + 3).clip(0).astype(np.float32)


def project(layer: nn.Linear, embeddings: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return layer(torch.from_numpy(embeddings)).numpy()


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("size", [1, 7, 23])
def test_projection_is_that_of_scikit_learn(size: int, whiten: bool) -> None:
    for seed in range(3):
        embeddings = rows(seed)
        layer, variance = principal_projection(embeddings, size, whiten)
        reference = PCA(size, whiten=whiten, svd_solver="full").fit(embeddings.astype(np.float64))
        expected, found = reference.transform(embeddings), project(layer, embeddings)
        if not whiten:
            np.testing.assert_array_equal(layer.bias.detach(), 0)
            expected = expected + reference.mean_ @ reference.components_.T  # the mean is not subtracted
            weight = layer.weight.detach().numpy()
            np.testing.assert_allclose(weight @ weight.T, np.eye(size), atol=1e-6)
            assert (weight[np.arange(size), np.abs(weight).argmax(axis=1)] > 0).all()
        signs = np.sign((found * expected).sum(axis=0))
        np.testing.assert_allclose(found * signs, expected, atol=1e-4 * np.abs(expected).max())
        assert variance == pytest.approx(reference.explained_variance_ratio_.sum(), abs=1e-6)
        np.testing.assert_allclose(
            principal_projection(embeddings[::-1], size, whiten)[0].weight.detach(), layer.weight.detach(), atol=1e-5
        )


def test_whitened_values_have_variance_1_and_the_others_keep_distances() -> None:
    embeddings = rows(0)
    whitened = project(principal_projection(embeddings, 9, whiten=True)[0], embeddings)
    np.testing.assert_allclose(whitened.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(np.cov(whitened.T), np.eye(9), atol=1e-4)
    embeddings[:, 5] = embeddings[:, 3]  # one direction of 24 is empty
    layer, variance = principal_projection(embeddings, 23)
    reduced = project(layer, embeddings)
    distances = pairwise_distances(embeddings, embeddings)
    np.testing.assert_allclose(pairwise_distances(reduced, reduced), distances, atol=1e-4 * distances.max())
    assert variance == pytest.approx(1)


def test_embeddings_without_enough_directions_are_refused() -> None:
    with pytest.raises(ModelError):
        principal_projection(np.ones((9, 4), np.float32), 2)
    flat = np.repeat(rows(0, size=3), 2, axis=1)
    with pytest.raises(ModelError):
        principal_projection(flat, 4, whiten=True)
    assert principal_projection(flat, 4)[1] == pytest.approx(1)


def test_reduced_checkpoint_describes_itself(run: Path, checkpoint: Path, crowd: Path) -> None:
    full, reduced = (load_checkpoint(folder / "best.pt") for folder in (run, run / "reduced-8"))
    spec, how = reduced.spec, reduced.spec.reduction
    assert sha256(run / "best.pt") == sha256(checkpoint)
    assert how is not None
    assert (spec.embedding_size, spec.stages, spec.calibration.embedding_size) == (8, {}, 8)
    assert (how.from_size, how.stages) == (1536, full.spec.stages)
    assert (how.whitened, how.images, how.dataset) == (False, 12, scan(crowd).name)
    assert how.checkpoint_sha256 == sha256(run / "best.pt")
    assert 0.5 < how.variance <= 1
    assert ModelSpec.from_json(spec.to_json()) == spec
    with pytest.raises(ValueError, match="1536"):
        replace(spec, embedding_size=1536, calibration=None)

    dataset = scan(crowd).without_junk()
    of_full, found = (
        embed_dataset(pmm_edge.load(folder, "cpu"), dataset).embeddings for folder in (run, run / "reduced-8")
    )
    projected = of_full @ reduced.weights["projection.weight"].numpy().T
    np.testing.assert_allclose(found, projected, atol=1e-4 * np.abs(projected).max())
    for embeddings, by_euclidean, by_cosine in (
        (of_full, how.before, how.before_cosine),
        (found, how.after, how.after_cosine),
    ):
        assert evaluate_dataset(dataset, embeddings).figures() == by_euclidean
        assert evaluate_dataset(dataset, embeddings, distance="cosine").figures() == by_cosine
    assert (spec.retrieval, spec.retrieval_cosine) == (how.after, how.after_cosine)
    assert {name for name in reduced.weights if name not in full.weights} == {"projection.weight", "projection.bias"}


def test_bench_calibrate_and_pictures_accept_the_reduced_run(run: Path, crowd: Path, tmp_path: Path) -> None:
    folder = new_run(run / "best.pt", crowd, tmp_path / "run")
    (export_of,) = export(folder, embedding_size=8, normalize_output=True).files
    assert export_of.path == folder / "reduced-8" / "export" / "model.onnx"
    report = pmm_edge.bench(folder / "reduced-8", parity_only=True).report
    assert report.passed
    assert (Path(report.reference.path), report.models[0].embedding_size) == (folder / "reduced-8" / "best.pt", 8)
    assert report.models[0].decisions.thresholds
    assert (folder / "reduced-8" / "bench.json").exists()
    assert find_checkpoint(folder / "best.pt", export_of.spec.checkpoint_sha256) == folder / "reduced-8" / "best.pt"
    assert pmm_edge.calibrate(folder / "reduced-8").written
    assert load_checkpoint(folder / "reduced-8" / "best.pt").spec.reduction == export_of.spec.reduction
    attention = attention_of(folder / "reduced-8" / "best.pt", [next(crowd.rglob("*.jpg"))], device="cpu")
    assert (attention.stages, attention.maps.shape[1]) == (("I", "II", "III"), 3)


def test_reduced_checkpoint_is_kept_until_checkpoint_or_data_change(run: Path, crowd: Path, tmp_path: Path) -> None:
    data = shutil.copytree(crowd, tmp_path / "data")
    folder = new_run(run / "best.pt", data, tmp_path / "run")
    reduced = folder / "reduced-3" / "best.pt"

    def reduce() -> ModelSpec:
        best = folder / "best.pt"
        spec = reduce_checkpoint(best, load_checkpoint(best), 3, False, None, None, silent).spec
        assert spec == load_checkpoint(reduced).spec
        return spec

    first = reduce()
    save_checkpoint(reduced, replace(load_checkpoint(reduced), spec=replace(first, calibration=None)))
    changed = reduced.read_bytes()
    assert reduce().calibration is None  # what was written into it since is kept
    assert reduced.read_bytes() == changed
    next((data / "bounding_box_train").iterdir()).unlink()
    assert reduce().reduction.images == 11
    full = load_checkpoint(folder / "best.pt")
    save_checkpoint(folder / "best.pt", replace(full, spec=replace(full.spec, tools={"another": "1"})))
    assert reduce().reduction.checkpoint_sha256 == sha256(folder / "best.pt") != first.reduction.checkpoint_sha256
    save_checkpoint(folder / "best.pt", replace(full, spec=replace(full.spec, checkpoint_sha256="b" * 64)))
    of_calibrated = reduce()  # which is known by the SHA-256 from before its calibration
    assert (of_calibrated.checkpoint_sha256, of_calibrated.reduction.checkpoint_sha256) == (None, "b" * 64)
    reduced.write_bytes(b"damaged")
    assert reduce().embedding_size == 3


def test_every_precision(checkpoint: Path, people: Path, tmp_path: Path, crops: np.ndarray) -> None:
    folder = new_run(checkpoint, people, tmp_path / "run")
    int8 = {"precision": "int8", "calibration_method": "minmax"}
    with pytest.warns(pmm_edge.errors.PmmWarning, match="thresholds"):  # too few people
        files = export(folder, embedding_size=32, whiten=True, safetensors=True, input_form="raw").files
    for options in ({"precision": "fp16"}, int8, {**int8, "target": "cpu"}):
        files += export(folder, embedding_size=32, whiten=True, **options).files
    expected = pmm_edge.load(folder / "reduced-32-whitened", "cpu").embed(crops)
    assert expected.shape == (5, 32)
    for file in files:
        assert file.path.parent == folder / "reduced-32-whitened" / "export"
        assert (file.spec.embedding_size, file.spec.reduction.whitened) == (32, True)
        found = pmm_edge.load(file.path, "cpu").embed(crops)
        if file.spec.precision == "fp32":
            np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("method", ["baseline", "bdb", "pcb", "cama"])
def test_every_method_has_the_projection_last(method: str) -> None:
    torch.manual_seed(0)
    network = build_model(method, num_classes=4, backbone="resnet10", height=96, width=32).eval()
    images = torch.randn(2, 3, 96, 32)
    with torch.no_grad():
        full = network(images)
        network.projection = nn.Linear(full.shape[1], 5)
        expected = network.projection(full)
        torch.testing.assert_close(network(images), expected)
        torch.testing.assert_close(StrippedNetwork(network)(images), expected, atol=1e-4, rtol=1e-4)


def test_wrong_use_is_one_line(pmm: Callable, run: Path, tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    stray = shutil.copy(run / "best.pt", tmp_path / "stray.pt")
    (tmp_path / "crops").mkdir()
    shutil.copy(next(tiny_dataset.rglob("*.jpg")), tmp_path / "crops")
    before = sorted(run.rglob("*"))
    for arguments in (
        (run, "--embedding-size", 0),
        (run, "--embedding-size", 1536),
        (run, "--embedding-size", 12),  # of 12 training images
        (run, "--embedding-size", 4, "--out", "model.bin"),
        (run, "--whiten"),
        (run / "reduced-8", "--embedding-size", 4),
        (tiny_onnx, "--embedding-size", 4, "--trt"),
        (stray, "--embedding-size", 4),
        (stray, "--embedding-size", 4, "--calibration", tmp_path / "crops"),
        (stray, "--embedding-size", 4, "--calibration", tmp_path / "nowhere"),
    ):
        assert pmm("export", *arguments).error
    assert sorted(run.rglob("*")) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["crops", "stray.pt"]
    found = pmm("export", stray, "--embedding-size", 4, "--calibration", tiny_dataset, "--json").json
    assert found["files"][0]["spec"]["reduction"]["from_size"] == 1536
    assert Path(found["checkpoint"]) == tmp_path / "reduced-4-stray" / "best.pt"
