"""Folders, lists and data sets into embedding files that others can read, bad images named and left out."""

import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

import pmm_edge
from pmm_edge.data.dataset import read
from pmm_edge.errors import DataError, OutputError, PmmError
from pmm_edge.runtime import Embedder
from pmm_edge.runtime.embed_files import embed_readable_files, find_images, save_embeddings
from pmm_edge.spec import METADATA_KEY, ModelSpec


@pytest.fixture(scope="module")
def onnx(tiny_onnx: Path) -> Embedder:
    return pmm_edge.load(tiny_onnx, "cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of one colour each, in folders; what a search must leave out lies among them."""
    root = tmp_path / "crops"
    for number, name in enumerate(("b.jpg", "a/2.PNG", "a/10.jpg", "c/d/e.jpeg")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 40), (60 * number, 30, 200)).save(root / name)
    for name in ("notes.txt", "._b.jpg", ".thumbs/b.jpg"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("no image")
    return root


def test_a_folder_is_searched_in_the_order_of_its_paths(folder: Path) -> None:
    found = find_images(folder)
    assert (found.source, found.labels) == ("folder", None)
    assert found.names == ["a/10.jpg", "a/2.PNG", "b.jpg", "c/d/e.jpeg"]
    assert found.paths == [folder / name for name in found.names]


def test_a_list_keeps_its_order_and_is_relative_to_its_own_folder(folder: Path, tmp_path: Path) -> None:
    lines = tmp_path / "list.txt"
    lines.write_text(f"crops/b.jpg\n\n{folder / 'a' / '2.PNG'}\r\ncrops/b.jpg\n", encoding="utf-8-sig")
    found = find_images(lines)
    assert found.source == "list"
    assert found.paths == [folder / "b.jpg", folder / "a" / "2.PNG", folder / "b.jpg"]
    assert found.names == ["crops/b.jpg", str(folder / "a" / "2.PNG"), "crops/b.jpg"]


def test_a_data_set_brings_its_labels(tiny_dataset: Path) -> None:
    found = find_images(tiny_dataset)
    dataset = read(tiny_dataset)
    assert found.paths == [*dataset.query.paths, *dataset.gallery.paths, *dataset.train.paths]
    assert found.names[0].startswith("query/0101_c1")
    assert found.labels is not None
    assert found.labels.split.tolist() == ["query"] * 12 + ["gallery"] * 12 + ["train"] * 12
    np.testing.assert_array_equal(found.labels.pids[:12], dataset.query.pids)
    np.testing.assert_array_equal(found.labels.camids[24:], dataset.train.camids)
    assert find_images(tiny_dataset / "query").source == "folder"


def test_what_names_no_images(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for source, message in (
        (empty, "names no images"),
        (tmp_path / "none", "none does not exist"),
        (folder / "b.jpg", "is no text file with one path a line"),
    ):
        with pytest.raises(DataError, match=message):
            find_images(source)
    with pytest.raises(DataError, match="is no folder, so it is in no layout"):
        find_images(folder / "b.jpg", "market1501")
    with pytest.raises(DataError, match="not in the layout"):
        find_images(folder, "market1501")


def test_bad_images_are_named_and_the_others_keep_their_rows(onnx: Embedder, folder: Path) -> None:
    (folder / "a" / "2.PNG").write_bytes((folder / "a" / "2.PNG").read_bytes()[:60])
    paths = [*find_images(folder).paths, folder / "gone.jpg"]
    heard: list[int] = []
    embedded = embed_readable_files(
        onnx, paths, batch=2, report=lambda what, done, total, detail="": heard.append(done)
    )
    assert embedded.rows.tolist() == [0, 2, 3]
    assert [row for row, _ in embedded.bad] == [1, 4]
    assert "runcated" in embedded.bad[0][1]
    assert "No such file" in embedded.bad[1][1]
    assert heard == [0, 2, 4, 5]
    expected = onnx.embed([np.asarray(Image.open(paths[row]).convert("RGB")) for row in embedded.rows])
    np.testing.assert_allclose(embedded.embeddings, expected, rtol=1e-4, atol=1e-4)
    assert 0 < embedded.model_seconds <= embedded.seconds


def test_nothing_readable_gives_no_rows(onnx: Embedder, tmp_path: Path) -> None:
    embedded = embed_readable_files(onnx, [tmp_path / "a.jpg", tmp_path / "b.jpg"], batch=1)
    assert embedded.embeddings.shape == (0, 1536)
    assert len(embedded.bad) == 2
    with pytest.raises(PmmError, match="a batch of 0 images"):
        embed_readable_files(onnx, [], batch=0)


def test_npz_opens_without_pickle_and_carries_the_spec(onnx: Embedder, tiny_dataset: Path, tmp_path: Path) -> None:
    found = find_images(tiny_dataset)
    embeddings = np.random.default_rng(0).random((36, 4), dtype=np.float32)
    save_embeddings(tmp_path / "new" / "e.npz", onnx.spec, found.names, embeddings, found.labels)
    with np.load(tmp_path / "new" / "e.npz", allow_pickle=False) as file:
        assert set(file) == {"embeddings", "paths", "spec", "pids", "camids", "split"}
        np.testing.assert_array_equal(file["embeddings"], embeddings)
        assert file["embeddings"].dtype == np.float32
        assert file["paths"].tolist() == found.names
        assert file["split"][12] == "gallery"
        assert ModelSpec.from_json(str(file["spec"])) == onnx.spec
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["e.npz"]


def test_parquet_has_the_same_columns(onnx: Embedder, tiny_dataset: Path, tmp_path: Path) -> None:
    found = find_images(tiny_dataset)
    embeddings = np.random.default_rng(0).random((36, 4), dtype=np.float32)
    save_embeddings(tmp_path / "e.parquet", onnx.spec, found.names, embeddings, found.labels)
    table = pyarrow.parquet.read_table(tmp_path / "e.parquet")
    assert table.column_names == ["path", "embedding", "pid", "camid", "split"]
    np.testing.assert_array_equal(np.stack(table["embedding"].to_numpy()), embeddings)
    assert table["pid"].to_pylist() == found.labels.pids.tolist()
    assert ModelSpec.from_json(table.schema.metadata[METADATA_KEY.encode()].decode()) == onnx.spec
    save_embeddings(tmp_path / "plain.parquet", onnx.spec, ["a", "b"], embeddings[:2])
    assert pyarrow.parquet.read_table(tmp_path / "plain.parquet").column_names == ["path", "embedding"]


def test_files_that_cannot_be_written(onnx: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = np.zeros((1, 4), np.float32)
    with pytest.raises(OutputError, match=r"must end in \.npz or \.parquet"):
        save_embeddings(tmp_path / "e.csv", onnx.spec, ["a"], one)
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        save_embeddings(tmp_path / "folder.npz", onnx.spec, ["a"], one)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(PmmError, match=r"needs pyarrow.*pmm-edge\[parquet\]"):
        save_embeddings(tmp_path / "e.parquet", onnx.spec, ["a"], one)
