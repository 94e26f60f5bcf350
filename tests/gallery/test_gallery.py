"""Both kinds of storage against a plain list of rows: adding, searching with filters, deciding, deleting."""

import shutil
import tarfile
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gallery.conftest import SIZE, calibrated, model_of
from numpy.typing import NDArray
from qdrant_client import QdrantClient

import pmm_edge
from pmm_edge.errors import CheckFailedError, DataError, ModelError, OutputError, PmmError
from pmm_edge.gallery import Gallery
from pmm_edge.images import read_crop
from pmm_edge.retrieval import pairwise_distances
from pmm_edge.runtime import Embedder
from pmm_edge.spec import Distance

pytestmark = [pytest.mark.usefixtures("small"), pytest.mark.filterwarnings("ignore:.*[Ll]ocal:UserWarning")]


class Reference:
    """What a gallery must contain."""

    def __init__(self, distance: Distance) -> None:
        self.rows: list[tuple[NDArray[np.float32], int, str, float, str]] = []
        self.distance = distance

    def nearest(self, query: NDArray[np.float32], keep: Any) -> tuple[int, list[float], list[str]]:
        rows = list(filter(keep, self.rows))
        if not rows:
            return 0, [], []
        distances = pairwise_distances(query[None], np.stack([row[0] for row in rows]), self.distance)[0]
        order = np.argsort(distances, kind="stable")[:10]
        return len(rows), distances[order].tolist(), [rows[one][4] for one in order]


@pytest.fixture(params=["folder", "qdrant"])
def opened(request: pytest.FixtureRequest, tmp_path: Path, client: QdrantClient) -> Callable[..., Gallery]:
    """Opens the gallery people in each kind of storage."""
    if request.param == "qdrant":
        return partial(pmm_edge.open_gallery, "people", client=client)
    return partial(pmm_edge.open_gallery, tmp_path / "people")


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("storage", ["folder", "float16", "qdrant"])
def test_a_gallery_is_its_rows(storage: str, distance: Distance, tmp_path: Path, client: QdrantClient) -> None:
    kinds = {"qdrant": {"client": client}, "float16": {"dtype": "float16"}, "folder": {"dtype": "float32"}}
    place = "people" if storage == "qdrant" else tmp_path / "people"
    reopened = partial(pmm_edge.open_gallery, place, model_of(), distance=distance, **kinds[storage])
    random, reference, gallery = np.random.default_rng(0), Reference(distance), reopened()
    for step in range(6):
        count, first = int(random.integers(80, 220)), 1000 * step
        # What float16 holds, so that all storages hold the same.
        embeddings = random.standard_normal((count, SIZE)).astype(np.float16).astype(np.float32)
        sources = [f"c/{first + row}.jpg" for row in range(count)]
        pids, cameras = random.integers(-1, 20, count), random.choice(["", "lobby", "straße"], count)
        times = random.integers(0, 1000, count).astype(float)
        if step % 2:  # a part of them again
            gallery.add(embeddings[:30], sources=sources[:30], pids=pids[:30], cameras=cameras[:30], times=times[:30])
        done = gallery.add(embeddings, sources=sources, pids=pids, cameras=cameras, times=times)
        reference.rows += zip(embeddings, pids.tolist(), cameras.tolist(), times.tolist(), sources, strict=True)
        assert (done.added, done.known, done.rows) == (count - 30 * (step % 2), 30 * (step % 2), len(reference.rows))
        gallery = reopened() if step % 3 == 0 else gallery
        if step in (2, 4):
            pid, gone = int(pids[0]), sources[5]
            assert gallery.delete(pids=[pid]) == sum(row[1] == pid for row in reference.rows)
            reference.rows = [row for row in reference.rows if row[1] != pid]
            assert gallery.delete(sources=[gone, "nothing"]) == sum(row[4] == gone for row in reference.rows)
            reference.rows = [row for row in reference.rows if row[4] != gone]
        queries = random.standard_normal((3, SIZE)).astype(np.float32)
        for filters, keep in (
            ({}, lambda row: True),
            ({"exact": True}, lambda row: True),
            ({"cameras": ["lobby", "nowhere"]}, lambda row: row[2] == "lobby"),
            ({"cameras": ["straße", ""], "since": 600.0}, lambda row: row[2] != "lobby" and row[3] >= 600),
            ({"since": 100.0, "before": 900.0}, lambda row: 100 <= row[3] < 900),
            ({"before": -1.0}, lambda row: False),
        ):
            for query, found in zip(queries, gallery.search(queries, **filters), strict=True):
                searched, distances, sources = reference.nearest(query, keep)
                assert found.searched == searched
                tolerance = 2e-3 if storage == "float16" and distance == "cosine" else 1e-5
                np.testing.assert_allclose([hit.distance for hit in found.hits], distances, atol=tolerance)
                if tolerance < 1e-4:
                    assert [hit.source for hit in found.hits] == sources
    info = reopened().info(check=True)
    assert info.rows == len(reference.rows)
    assert info.identities == len({row[1] for row in reference.rows} - {-1})
    assert info.cameras == ["lobby", "straße"]
    assert info.oldest.timestamp() == min(row[3] for row in reference.rows)
    if storage != "qdrant":
        assert info.index.recall >= 0.99
        assert info.index.trained >= 400


def test_a_filter_is_one_value_or_several(opened: Callable[..., Gallery]) -> None:
    gallery, rows = opened(model_of()), np.eye(4, SIZE, dtype=np.float32)
    gallery.add(rows, sources=["ab", "a", "b", "c"], pids=[1, 2, 3, 3], cameras=["", "lob", "lobby", "7"])
    for cameras, found in (("lobby", ["b"]), (["lobby", ""], ["ab", "b"]), ({"lobby", ""}, ["ab", "b"]), (7, ["c"])):
        hits = gallery.search(rows[:1], cameras=cameras)[0].hits
        assert sorted(hit.source for hit in hits) == found
    assert (gallery.delete(sources={"ab"}), gallery.delete(pids=np.array([3.0])), gallery.info().rows) == (1, 2, 1)
    assert (gallery.delete(sources="ab"), gallery.delete(sources="a"), gallery.info().rows) == (0, 1, 0)


def test_the_threshold_decides(opened: Callable[..., Gallery]) -> None:
    embeddings, gallery = np.eye(3, SIZE, dtype=np.float32), opened(model_of())
    gallery.add(embeddings, sources=["a", "b", "c"], pids=[4, 5, -1])
    (found,) = gallery.search(embeddings[:1])
    assert (found.verdict, found.threshold, found.hits[0].same_person) == ("no threshold", None, None)
    with pytest.raises(ModelError):
        gallery.search(embeddings[:1], fmr=1e-3)
    gallery = opened(calibrated(1.0))  # the model was calibrated later
    near, far = gallery.search(np.stack([0.5 * embeddings[0], -9 * embeddings[0]]))
    assert (near.verdict, far.verdict) == ("same person", "nobody")
    assert [(hit.pid, hit.same_person) for hit in near.hits] == [(4, True), (5, False), (None, False)]
    assert near.expected_false_matches == pytest.approx(3e-3)
    with pytest.raises(ModelError):
        gallery.search(embeddings[:1], fmr=0.5)


def test_age_and_ids(tmp_path: Path) -> None:
    gallery, now = pmm_edge.open_gallery(tmp_path / "g", model_of()), time.time()
    rows = np.ones((4, SIZE), np.float32)
    gallery.add(rows, sources=["video.mp4"] * 4, ids=[1, 2, 3, 3], times=[now - 90_000, now - 80_000, now, now])
    assert gallery.info().rows == 3
    gallery.add(rows[:1], sources=["x"], times=datetime.fromtimestamp(now - 100_000, timezone.utc).isoformat())
    gallery.add(rows[:1], sources=["y"])
    assert [gallery.delete(older_than=age) for age in ("1d", "23h", timedelta(hours=22))] == [2, 0, 1]
    assert gallery.delete(sources=["video.mp4"]) == 1
    assert [hit.source for hit in gallery.search(rows[:1])[0].hits] == ["y"]
    large = [1, 2**63 + 1, 2**63 + 2]  # NumPy makes float64 of this list, in which two of them are equal
    assert gallery.add(rows[:3], sources=["z"] * 3, ids=large).added == 3
    assert {hit.id for hit in gallery.search(rows[:1])[0].hits} > {*large}


def test_wrong_use(opened: Callable[..., Gallery]) -> None:
    gallery, rows = opened(model_of()), np.ones((2, SIZE), np.float32)
    for call in (lambda: gallery.search(rows), lambda: gallery.delete(pids=[1]), lambda: gallery.info()):
        with pytest.raises(DataError, match="people"):
            call()
    gallery.add(rows, sources=["a", "b"])
    for other in (model_of(SIZE + 1), model_of(digest="b"), model_of(normalized_output=True)):
        with pytest.raises(ModelError, match="people"):
            opened(other)
    with pytest.raises(DataError, match="cosine"):
        opened(distance="cosine")
    for values, error in (
        (np.ones((2, SIZE - 1)), ModelError),
        (np.full((2, SIZE), np.nan), DataError),
        (np.ones((1, SIZE)), DataError),
        ("text", DataError),
    ):
        with pytest.raises(error):
            gallery.add(values, sources=["c", "d"])
    with pytest.raises(DataError, match="sources"):
        gallery.add(rows)
    milliseconds = 1000 * time.time()
    for label in (
        *({"pids": [1, 2, 3]}, {"pids": "x"}, {"pids": [1.5, 2]}, {"pids": np.array([np.nan, 2])}, {"times": "noon"}),
        *({"pids": np.array([2**63, 2], np.uint64)}, {"ids": [-1, 2]}),
        *({"times": moment} for moment in (milliseconds, [0, np.nan], np.inf)),
    ):
        with pytest.raises(PmmError):
            gallery.add(rows, sources=["c", "d"], **label)
    for age in ("30", "d", "thirty days", "1y"):
        with pytest.raises(PmmError, match=age):
            gallery.delete(older_than=age)
    for pids in (1.5, [1.5], [2**63], [None], "x"):  # no other person must be deleted
        with pytest.raises(PmmError):
            gallery.delete(pids=pids)
    with pytest.raises(PmmError):
        gallery.delete()
    with pytest.raises(PmmError):
        gallery.search(rows, top=0)
    with pytest.raises(PmmError, match="model"):
        opened().search("query.jpg")
    assert gallery.info().rows == 2
    for wrong in ({"distance": "manhattan"}, {"dtype": "float64"}):  # no such gallery must be created
        with pytest.raises(PmmError, match=next(iter(wrong.values()))):
            opened(model_of(), **wrong)


def test_a_server_that_does_not_answer_and_other_collections(client: QdrantClient) -> None:
    with pytest.raises(OutputError, match="9/people"):
        pmm_edge.open_gallery("http://127.0.0.1:9/people")
    with pytest.raises(PmmError, match=":9"):
        pmm_edge.open_gallery("http://127.0.0.1:9")
    from qdrant_client.models import Distance as Metric
    from qdrant_client.models import VectorParams

    with pytest.raises(DataError, match="float16"):  # before the collection exists, as afterwards
        pmm_edge.open_gallery("people", model_of(), dtype="float16", client=client)
    client.create_collection("other", vectors_config=VectorParams(size=4, distance=Metric.EUCLID))
    with pytest.raises(DataError, match="other"):
        pmm_edge.open_gallery("other", client=client)


def test_images_and_files_of_embed_are_the_same_rows(tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    embedder: Embedder = pmm_edge.load(tiny_onnx, device="cpu")
    query = next((tiny_dataset / "query").glob("0102_c2*"))
    found = []
    for name in ("e.npz", "e.parquet"):
        pmm_edge.embed_files(embedder, tiny_dataset, tmp_path / name)
        gallery = pmm_edge.open_gallery(tmp_path / name[2:], embedder)
        assert gallery.add(tmp_path / name, split="gallery").added == 12
        found.append([(hit.pid, hit.camera, hit.distance) for hit in gallery.search(query)[0].hits])
    gallery = pmm_edge.open_gallery(tmp_path / "images", embedder)
    assert gallery.add(tiny_dataset, split="gallery").added == 12
    found.append([(hit.pid, hit.camera, hit.distance) for hit in gallery.search(query)[0].hits])
    for one in found[:2]:
        assert [row[:2] for row in one] == [row[:2] for row in found[2]]
        np.testing.assert_allclose([row[2] for row in one], [row[2] for row in found[2]], rtol=1e-3)
    crops = shutil.copytree(tiny_dataset / "query", tmp_path / "crops")
    (crops / "broken.jpg").touch()
    done = gallery.add(crops, cameras="door")  # a folder of images without labels
    assert (done.added, done.known, [image.path.name for image in done.skipped]) == (12, 0, ["broken.jpg"])
    (crops / "broken.jpg").unlink()
    assert gallery.add(crops).known == 12
    first = gallery.search([read_crop(query, 128, 64)])[0].hits[0]
    assert (first.source, first.pid, first.camera) == (str(crops / query.name), None, "door")


def test_only_new_images_are_embedded_from_folders_and_tar_files(
    tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    """The rest of an interrupted command, whatever cannot be read, in a gallery that needs unit vectors."""
    crops, images = tmp_path / "crops", sorted((tiny_dataset / "query").iterdir())
    crops.mkdir()
    shutil.copy(images[0], crops / "a.jpg")
    gallery = pmm_edge.open_gallery(tmp_path / "people", tiny_onnx, distance="cosine", device="cpu")
    assert gallery.add(crops).added == 1
    (crops / "broken.jpg").touch()
    for added in (0, 1):
        done = gallery.add(crops)
        assert (done.added, done.known, len(done.skipped)) == (added, 1, 1)
        shutil.copy(images[1], crops / "b.jpg")
    with tarfile.open(crops / "c.tar", "w") as tar:
        tar.add(images[2], "x/c.jpg")
    assert gallery.add(crops).added == 1
    assert gallery.search(images[2])[0].hits[0].source == str(crops / "c.tar" / "x" / "c.jpg")
    for name in ("a.jpg", "b.jpg", "c.tar"):
        (crops / name).unlink()
    with pytest.raises(CheckFailedError, match="broken"):
        gallery.add(crops)


@pytest.mark.torch
def test_a_checkpoint_and_its_exports_are_one_model(
    tiny_checkpoint: Path, tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    pmm_edge.embed_files(tiny_checkpoint, tiny_dataset / "query", tmp_path / "e.npz", device="cpu")
    gallery = pmm_edge.open_gallery(tmp_path / "people", tiny_onnx, device="cpu")
    assert gallery.add(tmp_path / "e.npz").added == 12
    (found,) = gallery.search(next((tiny_dataset / "query").iterdir()), top=1)
    assert found.hits[0].distance < 0.01


def test_damaged_files_of_embed_are_one_error(tmp_path: Path) -> None:
    path, spec = tmp_path / "e.npz", model_of(checkpoint_sha256=64 * "a").spec.to_json()
    np.savez_compressed(path, spec=spec, paths=["a"], embeddings=np.ones((1, SIZE), np.float32))
    whole = path.read_bytes()
    name = whole.rindex(b"PK\1\2")
    for at in (whole.index(b"spec.npy") + 100, name + 10):  # compressed data, and the method of compression
        path.write_bytes(whole[:at] + b"\xff\xff" + whole[at + 2 :])
        with pytest.raises(DataError, match=r"e\.npz"):
            pmm_edge.open_gallery(tmp_path / "people").add(path)


def test_a_folder_of_parquet_files(tmp_path: Path) -> None:
    random, folder = np.random.default_rng(0), tmp_path / "embeddings"
    folder.mkdir()
    metadata = {"pmm_edge.spec": model_of().spec.to_json(), "pmm_edge.model_sha256": 64 * "a"}
    for number in range(2):
        values = random.standard_normal((4, SIZE)).astype(np.float16)
        columns = {
            "path": [f"{number}-{row}" for row in range(4)],
            "pid": [5, None, -1, 0],
            "camid": [1, None, 2, None],
            "embedding_note": ["a column of the user"] * 4,
        }
        embedding = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), SIZE)
        table = pa.table({**columns, "split": pa.nulls(4, pa.string()), "embedding": embedding}, metadata=metadata)
        pq.write_table(table, folder / f"shard-{number:06d}.parquet")
    gallery = pmm_edge.open_gallery(tmp_path / "people", model_of())
    pq.write_table(table[:0], tmp_path / "empty.parquet")
    assert gallery.add(tmp_path / "empty.parquet").added == 0
    done = gallery.add(folder)
    with pytest.raises(DataError, match=r"empty\.parquet"):
        gallery.search(tmp_path / "empty.parquet")
    assert (done.added, done.junk, done.rows) == (6, 2, 6)
    hits = {hit.source: (hit.pid, hit.camera) for hit in gallery.search(values[:1].astype(np.float32))[0].hits}
    assert hits["1-0"] == (5, "1")
    assert hits["1-1"] == hits["1-3"] == (None, "")
    pq.write_table(table.replace_schema_metadata({**metadata, "pmm_edge.model_sha256": 64 * "b"}), folder / "z.parquet")
    with pytest.raises(ModelError, match="people"):
        gallery.add(folder)
    (folder / "z.parquet").write_bytes((folder / "shard-000000.parquet").read_bytes()[:-100])
    with pytest.raises(DataError, match=r"z\.parquet"):
        gallery.add(folder)
    assert gallery.info().rows == 6
