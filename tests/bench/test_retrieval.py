"""A model is judged as it is, with mirror images and re-ranked; what was embedded can be read elsewhere."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pmm_edge
from pmm_edge.bench.parity import Embedded, embed_dataset, evaluate_embeddings, judge
from pmm_edge.data.dataset import ReidDataset, scan
from pmm_edge.runtime import Embedder


@pytest.fixture(scope="module")
def dataset(tiny_dataset: Path) -> ReidDataset:
    return scan(tiny_dataset)


@pytest.fixture(params=["torch", "onnxruntime"])
def embedder(request: pytest.FixtureRequest, tiny_checkpoint: Path, tiny_onnx: Path) -> Embedder:
    return pmm_edge.load(tiny_checkpoint if request.param == "torch" else tiny_onnx, "cpu")


def random_embedded(dataset: ReidDataset) -> Embedded:
    """Embeddings of people who are hard to tell apart, so that no row is like another."""
    rng = np.random.default_rng(0)
    pids = np.concatenate([dataset.query.pids, dataset.gallery.pids])
    centres = rng.standard_normal((pids.max() + 1, 8))
    plain, flip = (centres[pids] + rng.standard_normal((2, len(pids), 8))).astype(np.float32)
    return Embedded(dataset, plain, flip)


def test_flip_is_the_mean_of_an_image_and_its_mirror_image(embedder: Embedder, dataset: ReidDataset) -> None:
    embedded = embed_dataset(embedder, dataset, flip=True)
    # The network's size, so that mirroring before and after resizing are one.
    size = embedder.spec.input.width, embedder.spec.input.height
    crops = [
        np.asarray(Image.open(path).resize(size, Image.Resampling.BILINEAR))
        for path in (*dataset.query.paths, *dataset.gallery.paths)
    ]
    plain, mirrored = embedder.embed(crops), embedder.embed([np.fliplr(crop).copy() for crop in crops])
    assert np.abs(plain - mirrored).max() > 0.01 * np.abs(plain).max()
    tolerance = {"rtol": 1e-4, "atol": 1e-5 * np.abs(plain).max()}
    np.testing.assert_allclose(embedded.plain, plain, **tolerance)
    np.testing.assert_allclose(embedded.flip, (plain + mirrored) / 2, **tolerance)
    assert embed_dataset(embedder, dataset).flip is None


def test_each_row_is_one_evaluation(dataset: ReidDataset) -> None:
    embedded = random_embedded(dataset)
    query, gallery, count = dataset.query, dataset.gallery, len(dataset.query)
    expected = {
        name: pmm_edge.evaluate(
            *(features[:count], features[count:], query.pids, gallery.pids, query.camids, gallery.camids),
            rerank="re-ranking" in name,
        )
        for name, features in (
            ("plain", embedded.plain),
            ("flip", embedded.flip),
            ("re-ranking", embedded.plain),
            ("flip + re-ranking", embedded.flip),
        )
    }
    rows = judge(embedded, rerank=True)
    assert [row.name for row in rows] == list(expected)
    for row in rows:
        assert row.result.mAP == expected[row.name].mAP
        np.testing.assert_array_equal(row.result.cmc, expected[row.name].cmc)
    assert len({row.result.mAP for row in rows}) == 4
    assert [row.name for row in judge(embedded)] == ["plain", "flip"]
    assert [row.name for row in judge(Embedded(dataset, embedded.plain), rerank=True)] == ["plain", "re-ranking"]


def test_junk_is_not_embedded_and_changes_no_figure(tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    root = shutil.copytree(tiny_dataset, tmp_path / "junk")
    gallery = root / "bounding_box_test"
    for number, image in enumerate(sorted((root / "query").iterdir())[:5]):
        shutil.copy(image, gallery / f"-1_c{number % 3 + 1}s1_{number:06d}_00.jpg")
    embedder = pmm_edge.load(tiny_onnx, "cpu")
    with_junk = scan(root)
    assert len(with_junk.gallery) == 17
    embedded = embed_dataset(embedder, with_junk)
    assert len(embedded.plain) == 12 + 12
    (row,) = judge(embedded)
    assert row.result.mAP == judge(embed_dataset(embedder, scan(tiny_dataset)))[0].result.mAP
    whole = pmm_edge.runtime.embed_files(embedder, [*with_junk.query.paths, *with_junk.gallery.paths])
    assert evaluate_embeddings(whole, with_junk).mAP == pytest.approx(row.result.mAP)


def test_saved_features_give_the_same_figures_in_any_program(dataset: ReidDataset, tmp_path: Path) -> None:
    embedded = random_embedded(dataset)
    embedded.save(tmp_path / "features.npz")
    with np.load(tmp_path / "features.npz", allow_pickle=False) as saved:
        sides = ("pids", "camids")
        labels = [saved[f"{side}_{what}"] for what in sides for side in ("query", "gallery")]
        plain = pmm_edge.evaluate(saved["query_features"], saved["gallery_features"], *labels)
        flip = pmm_edge.evaluate(saved["query_features_flip"], saved["gallery_features_flip"], *labels)
        assert list(saved["gallery_names"]) == [path.name for path in dataset.gallery.paths]
    assert [plain.mAP, flip.mAP] == [row.result.mAP for row in judge(embedded)]
    Embedded(dataset, embedded.plain).save(tmp_path / "plain.npz")
    with np.load(tmp_path / "plain.npz") as saved:
        assert "query_features_flip" not in saved


def test_progress_names_each_row_and_comes_to_an_end(tiny_onnx: Path, dataset: ReidDataset) -> None:
    last: dict[str, tuple[int, int]] = {}

    def report(what: str, done: int, total: int, detail: str = "") -> None:
        last[what] = (done, total)

    embedded = embed_dataset(pmm_edge.load(tiny_onnx, "cpu"), dataset, flip=True, report=report)
    judge(embedded, rerank=True, report=report)
    assert list(last) == [
        "embedding with model.onnx",
        "embedding with model.onnx, mirrored",
        "ranking, plain",
        "ranking, flip",
        "re-ranking, plain",
        "re-ranking, flip",
    ]
    assert all(done == total for done, total in last.values())
