"""Finding images, embedding them in order, saving the result, and evaluating a data set."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

import pmm_edge
from pmm_edge.data.dataset import ReidDataset, read, scan
from pmm_edge.errors import CheckFailedError, DataError, OutputError, PmmError
from pmm_edge.runtime import Embedder, embed_files
from pmm_edge.runtime.embed_files import EmbeddedDataset, EmbeddedFiles, ImageList, embed_dataset, find_images
from pmm_edge.spec import METADATA_KEY, ModelSpec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of one color each in nested folders, among files that a search must ignore."""
    root = tmp_path / "crops"
    for number, name in enumerate(("b.jpg", "a/2.PNG", "a/10.jpg", "c/d/e.jpeg")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 40), (60 * number, 30, 200)).save(root / name)
    for name in ("notes.txt", "._b.jpg", ".thumbs/b.jpg"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("not an image")
    return root


def test_find_images_in_a_folder_sorted_by_path(folder: Path) -> None:
    found = find_images(folder)
    assert (found.source, found.labels) == ("folder", None)
    assert found.names == ["a/10.jpg", "a/2.PNG", "b.jpg", "c/d/e.jpeg"]
    assert found.paths == [folder / name for name in found.names]


def test_find_images_in_a_list_relative_to_its_folder(folder: Path, tmp_path: Path) -> None:
    lines = tmp_path / "list.txt"
    lines.write_text(f"crops/b.jpg\n\n{folder / 'a' / '2.PNG'}\r\ncrops/b.jpg\n", encoding="utf-8-sig")
    found = find_images(lines)
    assert found.source == "list"
    assert found.paths == [folder / "b.jpg", folder / "a" / "2.PNG", folder / "b.jpg"]
    assert found.names == ["crops/b.jpg", str(folder / "a" / "2.PNG"), "crops/b.jpg"]


def test_find_one_image_and_a_sequence_of_paths(folder: Path) -> None:
    one = find_images(folder / "b.jpg")
    assert (one.source, one.paths, one.names) == ("image", [folder / "b.jpg"], ["b.jpg"])
    assert find_images([str(folder / "b.jpg")]).paths == [folder / "b.jpg"]
    assert find_images([]).paths == []


def test_find_images_of_a_data_set_with_labels(tiny_dataset: Path) -> None:
    found, dataset = find_images(tiny_dataset), read(tiny_dataset)
    assert found.paths == [*dataset.query.paths, *dataset.gallery.paths, *dataset.train.paths]
    assert found.names[0].startswith("query/0101_c1")
    assert found.labels is not None
    assert found.labels.split.tolist() == ["query"] * 12 + ["gallery"] * 12 + ["train"] * 12
    np.testing.assert_array_equal(found.labels.pids[:12], dataset.query.pids)
    np.testing.assert_array_equal(found.labels.camids[24:], dataset.train.camids)
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
    assert 0 < embedded.model_seconds <= embedded.seconds
    assert embed_files(onnx, []).embeddings.shape == (0, 1536)
    with pytest.raises(PmmError):
        embed_files(onnx, paths, batch=0)


def test_embed_files_from_paths_to_a_file(tiny_onnx: Path, folder: Path, tmp_path: Path) -> None:
    embedded = embed_files(str(tiny_onnx), str(folder), str(tmp_path / "new" / "e.npz"), device="cpu")
    with np.load(tmp_path / "new" / "e.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["embeddings"], embedded.embeddings)
        assert file["paths"].tolist() == embedded.images.names == ["a/10.jpg", "a/2.PNG", "b.jpg", "c/d/e.jpeg"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["e.npz"]


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


def embedded_with(spec: ModelSpec, images: ImageList) -> EmbeddedFiles:
    embeddings = np.random.default_rng(0).random((len(images.paths), 4), dtype=np.float32)
    return EmbeddedFiles(spec, images, embeddings, [], "onnxruntime", "cpu", 1.0, 0.5)


def test_npz_opens_without_pickle_and_carries_labels_and_spec(
    onnx: Embedder, tiny_dataset: Path, tmp_path: Path
) -> None:
    embedded = embedded_with(onnx.spec, find_images(tiny_dataset))
    embedded.save(tmp_path / "e.npz")
    with np.load(tmp_path / "e.npz", allow_pickle=False) as file:
        assert set(file) == {"embeddings", "paths", "spec", "pids", "camids", "split"}
        np.testing.assert_array_equal(file["embeddings"], embedded.embeddings)
        assert file["embeddings"].dtype == np.float32
        assert file["split"][12] == "gallery"
        assert ModelSpec.from_json(str(file["spec"])) == onnx.spec


def test_parquet_has_the_same_columns(onnx: Embedder, tiny_dataset: Path, tmp_path: Path) -> None:
    embedded = embedded_with(onnx.spec, find_images(tiny_dataset))
    embedded.save(tmp_path / "e.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "e.parquet")
    assert table.column_names == ["path", "embedding", "pid", "camid", "split"]
    np.testing.assert_array_equal(np.stack(table["embedding"].to_numpy()), embedded.embeddings)
    assert table["pid"].to_pylist() == embedded.images.labels.pids.tolist()
    assert ModelSpec.from_json(table.schema.metadata[METADATA_KEY.encode()].decode()) == onnx.spec
    embedded_with(onnx.spec, find_images(["a", "b"])).save(tmp_path / "plain.parquet")
    assert pyarrow.parquet.read_table(tmp_path / "plain.parquet").column_names == ["path", "embedding"]


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


@pytest.fixture(scope="module")
def dataset(tiny_dataset: Path) -> ReidDataset:
    return scan(tiny_dataset)


def random_embeddings(dataset: ReidDataset) -> EmbeddedDataset:
    """Embeddings of people who are hard to tell apart, so that no two evaluations agree by chance."""
    rng = np.random.default_rng(0)
    pids = np.concatenate([dataset.query.pids, dataset.gallery.pids])
    centers = rng.standard_normal((pids.max() + 1, 8))
    plain, flipped = (centers[pids] + rng.standard_normal((2, len(pids), 8))).astype(np.float32)
    return EmbeddedDataset(dataset, plain, flipped)


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_flip_averages_an_image_and_its_mirror_image(
    backend: str, dataset: ReidDataset, request: pytest.FixtureRequest
) -> None:
    embedder: Embedder = request.getfixturevalue(backend)
    embedded = embed_dataset(embedder, dataset, flip=True)
    # Resized first: mirroring before and after resizing differ.
    size = embedder.spec.input.width, embedder.spec.input.height
    paths = (*dataset.query.paths, *dataset.gallery.paths)
    crops = [np.asarray(Image.open(path).resize(size, Image.Resampling.BILINEAR)) for path in paths]
    plain, mirrored = embedder.embed(crops), embedder.embed([np.fliplr(crop).copy() for crop in crops])
    assert np.abs(plain - mirrored).max() > 0.01 * np.abs(plain).max()
    tolerance = {"rtol": 1e-4, "atol": 1e-5 * np.abs(plain).max()}
    np.testing.assert_allclose(embedded.embeddings, plain, **tolerance)
    np.testing.assert_allclose(embedded.flipped, (plain + mirrored) / 2, **tolerance)


def test_evaluate_passes_its_options_on(dataset: ReidDataset) -> None:
    embedded = random_embeddings(dataset)
    query, gallery, count = dataset.query, dataset.gallery, len(dataset.query)
    labels = query.pids, gallery.pids, query.camids, gallery.camids
    found = set()
    for flip, features in ((False, embedded.embeddings), (True, embedded.flipped)):
        for rerank in (False, True):
            expected = pmm_edge.evaluate(features[:count], features[count:], *labels, rerank=rerank)
            result = embedded.evaluate(rerank=rerank, flip=flip)
            np.testing.assert_array_equal(result.cmc, expected.cmc)
            assert result.mAP == expected.mAP
            found.add(result.mAP)
    assert len(found) == 4
    assert embedded.evaluate(ap_cutoff=1).mAP < embedded.evaluate().mAP
    assert len(embedded.evaluate(max_rank=3).cmc) == 3
    with pytest.raises(DataError):
        EmbeddedDataset(dataset, embedded.embeddings).evaluate(flip=True)


def test_junk_is_not_embedded_and_changes_no_metric(onnx: Embedder, tiny_dataset: Path, tmp_path: Path) -> None:
    root = shutil.copytree(tiny_dataset, tmp_path / "junk")
    for number, image in enumerate(sorted((root / "query").iterdir())[:5]):
        shutil.copy(image, root / "bounding_box_test" / f"-1_c{number % 3 + 1}s1_{number:06d}_00.jpg")
    with_junk = scan(root)
    assert len(with_junk.gallery) == 17
    embedded = embed_dataset(onnx, with_junk)
    assert len(embedded.embeddings) == 12 + 12
    assert embedded.flipped is None
    assert embedded.evaluate().mAP == embed_dataset(onnx, scan(tiny_dataset)).evaluate().mAP
    whole = embed_files(onnx, [*with_junk.query.paths, *with_junk.gallery.paths]).embeddings
    assert EmbeddedDataset(with_junk, whole).evaluate().mAP == pytest.approx(embedded.evaluate().mAP)


def test_saved_features_give_the_same_metrics_in_any_program(dataset: ReidDataset, tmp_path: Path) -> None:
    embedded = random_embeddings(dataset)
    embedded.save(tmp_path / "features.npz")
    with np.load(tmp_path / "features.npz", allow_pickle=False) as saved:
        labels = [saved[f"{side}_{what}"] for what in ("pids", "camids") for side in ("query", "gallery")]
        for suffix, flip in (("", False), ("_flip", True)):
            features = (saved[f"{side}_features{suffix}"] for side in ("query", "gallery"))
            assert pmm_edge.evaluate(*features, *labels).mAP == embedded.evaluate(flip=flip).mAP
        assert list(saved["gallery_names"]) == [path.name for path in dataset.gallery.paths]
    EmbeddedDataset(dataset, embedded.embeddings).save(tmp_path / "plain.npz")
    with np.load(tmp_path / "plain.npz") as saved:
        assert "query_features_flip" not in saved
