"""Finding images, embedding them in order, saving the result, and evaluating a data set."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

import pmm_edge
from pmm_edge.bench.evaluation import evaluate_model
from pmm_edge.data.dataset import read, scan
from pmm_edge.data.synthetic import SyntheticConfig, make_synthetic
from pmm_edge.errors import CheckFailedError, DataError, OutputError, PmmError
from pmm_edge.images import IN_FIGURES
from pmm_edge.retrieval.distances import unit_length
from pmm_edge.runtime import Embedder, embed_files
from pmm_edge.runtime.embed_files import cosine_figures, embed_dataset, evaluate_dataset, pool_dataset
from pmm_edge.runtime.listing import find_images
from pmm_edge.spec import METADATA_KEY, Distance, ModelSpec

NAMES = ["a/10.jpg", "a/2.PNG", "b.jpg", "c/d/e.jpeg"]


@pytest.fixture(scope="module")
def mars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tracklets of two frames."""
    root = tmp_path_factory.mktemp("data") / "tracklets"
    people = SyntheticConfig(train_identities=2, test_identities=3, cameras=2, images=2, frames=2)
    make_synthetic(root, people, workers=1)
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of one color each in nested folders, among files that a search must ignore."""
    root = tmp_path / "crops"
    for number, name in enumerate(NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 40), (60 * number, 30, 200)).save(root / name)
    for name in ("notes.txt", "._b.jpg", ".thumbs/b.jpg"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("not an image")
    return root


def test_find_images_in_folders_lists_and_paths(folder: Path, tmp_path: Path) -> None:
    found = find_images(folder)
    assert (found.source, found.labels, found.names) == ("folder", None, NAMES)
    assert found.paths == [folder / name for name in NAMES]
    lines = tmp_path / "list.txt"
    lines.write_text(f"crops/b.jpg\n\n{folder / 'a' / '2.PNG'}\r\ncrops/b.jpg\n", encoding="utf-8-sig")
    found = find_images(lines)
    assert found.source == "list"
    assert found.paths == [folder / "b.jpg", folder / "a" / "2.PNG", folder / "b.jpg"]
    assert found.names == ["crops/b.jpg", str(folder / "a" / "2.PNG"), "crops/b.jpg"]
    one = find_images(folder / "b.jpg")
    assert (one.source, one.paths, one.names) == ("image", [folder / "b.jpg"], ["b.jpg"])
    assert find_images([str(folder / "b.jpg")]).paths == [folder / "b.jpg"]


def test_find_images_of_a_data_set_with_labels(tiny_dataset: Path) -> None:
    found, dataset = find_images(tiny_dataset), read(tiny_dataset)
    assert found.paths == [*dataset.query.paths, *dataset.gallery.paths, *dataset.train.paths]
    assert found.names[0].startswith("query/0101_c1")
    assert found.labels is not None
    assert found.labels["split"].tolist() == ["query"] * 12 + ["gallery"] * 12 + ["train"] * 12
    np.testing.assert_array_equal(found.labels["pids"][:12], dataset.query.pids)
    np.testing.assert_array_equal(found.labels["camids"][24:], dataset.train.camids)
    assert find_images(tiny_dataset / "query").source == "folder"


@pytest.mark.parametrize(
    ("source", "layout"),
    [("empty", None), ("missing", None), ("binary.txt", None), ("crops/b.jpg", "market1501"), ("crops", "market1501")],
)
def test_sources_without_images_are_refused(source: str, layout: str | None, folder: Path) -> None:
    (folder.parent / "empty").mkdir()
    (folder.parent / "binary.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError) as caught:
        find_images(folder.parent / source, layout)
    assert str(folder.parent / source) in caught.value.problem


def test_embed_files_keeps_the_order(onnx: Embedder, tiny_dataset: Path) -> None:
    paths = sorted((tiny_dataset / "query").iterdir())
    heard: list[int] = []
    embedded = embed_files(onnx, paths, batch=5, report=lambda what, done, total, detail="": heard.append(done))
    expected = onnx.embed([np.asarray(Image.open(path)) for path in paths])
    np.testing.assert_allclose(embedded.embeddings, expected, rtol=1e-4, atol=1e-4)
    assert embedded.images.paths == paths
    assert heard == [0, 5, 10, 12]
    assert (embedded.backend, embedded.device, embedded.skipped) == ("onnxruntime", "cpu", [])
    assert embed_files(onnx, []).embeddings.shape == (0, 1536)
    with pytest.raises(PmmError):
        embed_files(onnx, paths, batch=0)


def test_unreadable_images_are_skipped_or_raise(onnx: Embedder, folder: Path, tmp_path: Path) -> None:
    (folder / "a" / "2.PNG").write_bytes((folder / "a" / "2.PNG").read_bytes()[:60])
    paths = [*find_images(folder).paths, folder / "gone.jpg"]
    embedded = embed_files(onnx, paths, batch=2, skip_bad=True)
    assert embedded.images.paths == [paths[row] for row in (0, 2, 3)]
    assert [image.path for image in embedded.skipped] == [paths[1], paths[4]]
    assert all(image.reason for image in embedded.skipped)
    expected = onnx.embed([np.asarray(Image.open(path).convert("RGB")) for path in embedded.images.paths])
    np.testing.assert_allclose(embedded.embeddings, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(DataError) as caught:
        embed_files(onnx, paths)
    assert str(paths[1]) in caught.value.problem
    with pytest.raises(CheckFailedError):
        embed_files(onnx, [paths[1], paths[4]], tmp_path / "e.npz", skip_bad=True)
    assert not (tmp_path / "e.npz").exists()


def test_npz_opens_without_pickle_and_parquet_has_the_same_columns(
    tiny_onnx: Path, onnx: Embedder, tiny_dataset: Path, folder: Path, tmp_path: Path
) -> None:
    embedded = embed_files(str(tiny_onnx), str(tiny_dataset), str(tmp_path / "new" / "e.npz"), device="cpu")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["e.npz"]
    with np.load(tmp_path / "new" / "e.npz", allow_pickle=False) as file:
        assert set(file) == {"embeddings", "paths", "spec", "pids", "camids", "split"}
        np.testing.assert_array_equal(file["embeddings"], embedded.embeddings)
        assert file["embeddings"].dtype == np.float32
        assert file["paths"].tolist() == embedded.images.names
        assert file["split"][12] == "gallery"
        assert ModelSpec.from_json(str(file["spec"])) == onnx.spec
    embedded.save(tmp_path / "e.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "e.parquet")
    assert table.column_names == ["paths", "embeddings", "pids", "camids", "split"]
    np.testing.assert_array_equal(np.stack(table["embeddings"].to_numpy()), embedded.embeddings)
    assert table["pids"].to_pylist() == embedded.images.labels["pids"].tolist()
    assert ModelSpec.from_json(table.schema.metadata[METADATA_KEY.encode()].decode()) == onnx.spec
    embed_files(onnx, folder, tmp_path / "plain.npz")
    with np.load(tmp_path / "plain.npz") as file:
        assert set(file) == {"embeddings", "paths", "spec"}


def test_each_folder_is_a_tracklet(onnx: Embedder, folder: Path, tmp_path: Path) -> None:
    single = embed_files(onnx, folder, flip=True)
    pooled = embed_files(onnx, folder, tmp_path / "t.npz", flip=True, tracklets=True)
    rows = [[0, 1], [2], [3]]
    assert pooled.images.names == ["a", ".", "c/d"]
    assert pooled.images.paths == [folder / "a", folder, folder / "c" / "d"]
    for found, images in ((pooled.embeddings, single.embeddings), (pooled.flipped, single.flipped)):
        expected = [pmm_edge.pool(images[row], [0] * len(row))[1][0] for row in rows]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    with np.load(tmp_path / "t.npz") as file:
        assert set(file) == {"embeddings", "paths", "spec", "frames"}
        assert (file["paths"].tolist(), file["frames"].tolist()) == (["a", ".", "c/d"], [2, 1, 1])
    (folder / "c/d/e.jpeg").write_bytes(b"")
    (folder / "a/10.jpg").write_bytes(b"")
    left = embed_files(onnx, folder, tracklets=True, skip_bad=True)
    assert (left.images.names, left.images.labels["frames"].tolist()) == (["a", "."], [1, 1])
    np.testing.assert_allclose(left.embeddings, single.embeddings[1:3], rtol=1e-4, atol=1e-4)


def test_tracklets_of_a_data_set(onnx: Embedder, mars: Path, tiny_dataset: Path) -> None:
    dataset = read(mars)
    single, pooled = embed_files(onnx, mars), embed_files(onnx, mars, tracklets=True)
    tracks = single.images.labels["tracks"]
    assert len(pooled.embeddings) == len(np.unique(tracks)) == len(single.embeddings) / 2
    assert set(pooled.images.labels["frames"]) == {2}
    for row in (0, 7, -1):
        assert pooled.images.names[row].endswith("F001.jpg")
        own = tracks == pooled.images.labels["tracks"][row]
        assert set(single.images.labels["pids"][own]) == {pooled.images.labels["pids"][row]}
        expected = pmm_edge.pool(single.embeddings[own], [0, 0])[1][0]
        np.testing.assert_allclose(pooled.embeddings[row], expected, rtol=1e-5)
    both = np.concatenate([dataset.query.tracks, dataset.gallery.tracks])
    queries = len(dataset.query) // 2
    ranked, embeddings = pool_dataset(dataset, single.embeddings[: len(both)])
    assert (len(ranked.query), len(ranked.gallery)) == (queries, len(both) // 2 - queries)
    by_number = dict(zip(*pmm_edge.pool(single.embeddings[: len(both)], both), strict=True))
    expected = [by_number[number] for number in (*ranked.query.tracks, *ranked.gallery.tracks)]
    np.testing.assert_allclose(embeddings, expected, rtol=1e-5)
    results = evaluate_model(onnx.path, [mars], tracklets=True, rerank=True, device="cpu")[0].results
    assert list(results) == ["plain", "tracklets", "re-ranking", "tracklets + re-ranking"]
    assert results["tracklets"].mAP == pytest.approx(evaluate_dataset(ranked, embeddings).mAP, abs=1e-6)
    with pytest.raises(DataError, match="no tracklets"):
        embed_files(onnx, tiny_dataset, tracklets=True)


def test_outputs_are_checked_before_the_model_is_loaded(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder.npz").mkdir()
    for name in ("e.csv", "folder.npz", "crops/b.jpg/e.npz"):
        with pytest.raises(OutputError):
            embed_files(tmp_path / "missing.onnx", folder, tmp_path / name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(PmmError, match="pyarrow"):
        embed_files(tmp_path / "missing.onnx", folder, tmp_path / "e.parquet")


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_flip_averages_an_image_and_its_mirror_image(
    backend: str, tiny_dataset: Path, request: pytest.FixtureRequest
) -> None:
    embedder: Embedder = request.getfixturevalue(backend)
    paths = sorted((tiny_dataset / "query").iterdir())
    embedded = embed_files(embedder, paths, flip=True)
    # Resized first: mirroring before and after resizing differ.
    size = embedder.spec.input.width, embedder.spec.input.height
    crops = [np.asarray(Image.open(path).resize(size, Image.Resampling.BILINEAR)) for path in paths]
    plain, mirrored = embedder.embed(crops), embedder.embed([np.fliplr(crop).copy() for crop in crops])
    assert np.abs(plain - mirrored).max() > 0.01 * np.abs(plain).max()
    tolerance = {"rtol": 1e-4, "atol": 1e-5 * np.abs(plain).max()}
    np.testing.assert_allclose(embedded.embeddings, plain, **tolerance)
    np.testing.assert_allclose(embedded.flipped, (plain + mirrored) / 2, **tolerance)


def test_an_evaluation_reads_no_junk_and_skips_no_other_image(
    onnx: Embedder, tiny_dataset: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(tiny_dataset, tmp_path / "data"))
    (root / "bounding_box_test" / "-1_c1s1_000000_00.jpg").touch()
    dataset = read(root).without_junk()
    assert len(embed_dataset(onnx, dataset).embeddings) == 24
    assert evaluate_model(onnx.path, [root], device="cpu")[0].results["plain"].valid_queries == 12
    for bad in (dataset.query.paths[3], dataset.gallery.paths[3]):
        whole = bad.read_bytes()
        bad.write_bytes(whole[:99])
        with pytest.raises(DataError, match=bad.name) as caught:
            embed_dataset(onnx, dataset)
        assert caught.value.remedy == IN_FIGURES
        bad.write_bytes(whole)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("rerank", [False, True])
def test_evaluate_dataset_is_evaluate(rerank: bool, distance: Distance, tiny_dataset: Path) -> None:
    dataset, rng = scan(tiny_dataset), np.random.default_rng(0)
    query, gallery, count = dataset.query, dataset.gallery, len(dataset.query)
    pids = np.concatenate([query.pids, gallery.pids])
    features = rng.standard_normal((pids.max() + 1, 8))[pids] + rng.standard_normal((len(pids), 8))
    labels = query.pids, gallery.pids, query.camids, gallery.camids
    expected = pmm_edge.evaluate(features[:count], features[count:], *labels, rerank=rerank, distance=distance)
    result = evaluate_dataset(dataset, features.astype(np.float32), rerank, distance)
    np.testing.assert_array_equal(result.cmc, expected.cmc)
    assert result.mAP == pytest.approx(expected.mAP)


def test_cosine_figures(tiny_dataset: Path) -> None:
    dataset = scan(tiny_dataset)
    features = np.random.default_rng(0).standard_normal((24, 8)).astype(np.float32)
    assert cosine_figures(dataset, features) == evaluate_dataset(dataset, unit_length(features)).figures()
    features[5] = 0.0
    assert cosine_figures(dataset, features) is None
