"""Folders of embeddings: the rows of `embed_files`, tar files, resuming after kills, and what is refused."""

import io
import json
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
from base64 import b64decode, b64encode
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet
import pytest

import pmm_edge
from pmm_edge.data.dataset import read
from pmm_edge.data.loader import ahead
from pmm_edge.errors import CheckFailedError, DataError, OutputError, PmmError, PmmWarning
from pmm_edge.runtime import Embedder, embed_files
from pmm_edge.runtime.shards import BAD_FOLDER, MANIFEST, EmbeddedShards, embed_shards
from pmm_edge.runtime.storage import Storage
from pmm_edge.spec import METADATA_KEY, ModelSpec


def table(folder: str | Path, *parts: str) -> pyarrow.Table:
    return pyarrow.dataset.dataset(Path(folder, *parts), format="parquet").to_table()


def contents(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.parquet")}


def embeddings(rows: pyarrow.Table) -> np.ndarray:
    return np.stack(rows["embedding"].to_numpy())


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def crops(tiny_dataset: Path, tmp_path: Path) -> Path:
    """23 images in nested folders, of which two cannot be read."""
    root, sources = tmp_path / "crops", sorted((tiny_dataset / "bounding_box_test").iterdir())
    for number in range(23):
        target = root / f"cam{number % 3}" / f"{number:02d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sources[number % len(sources)], target)
    (root / "cam0" / "03.jpg").write_bytes(b"")
    (root / "cam2" / "20.jpg").unlink()
    (root / "cam2" / "20.jpg").symlink_to("nowhere")
    return root


@pytest.fixture
def whole(onnx: Embedder, crops: Path, tmp_path: Path) -> EmbeddedShards:
    return embed_shards(onnx, crops, tmp_path / "whole", shard_rows=5, batch=2)


def test_the_rows_are_those_of_embed_files(onnx: Embedder, crops: Path, whole: EmbeddedShards) -> None:
    expected = embed_files(onnx, crops, batch=2, skip_bad=True)
    rows, bad = table(whole.folder), table(whole.folder, BAD_FOLDER)
    assert rows.schema.names == ["path", "pid", "camid", "split", "embedding"]
    assert rows.schema.field("embedding").type == pyarrow.list_(pyarrow.float32(), 1536)
    assert rows["path"].to_pylist() == expected.images.names
    np.testing.assert_allclose(embeddings(rows), expected.embeddings, rtol=1e-4, atol=1e-4)
    assert rows["pid"].null_count == rows["split"].null_count == len(rows) == whole.rows == whole.embedded == 21
    assert bad["path"].to_pylist() == ["cam0/03.jpg", "cam2/20.jpg"]
    assert all(bad["error"].to_pylist())
    assert (whole.bad, len(whole.skipped), whole.manifest.shards, whole.kept) == (2, 2, 5, 0)
    metadata = pyarrow.parquet.read_schema(Path(whole.folder, "shard-000004.parquet")).metadata
    assert ModelSpec.from_json(metadata[METADATA_KEY.encode()]) == onnx.spec
    assert metadata[b"pmm_edge.model_sha256"].decode() == onnx.spec.checkpoint_sha256
    assert metadata[b"pmm_edge.distance"] == b"euclidean"
    assert metadata[b"pmm_edge.version"].decode() == pmm_edge.__version__


def test_labels_of_a_data_set_and_float16(onnx: Embedder, tiny_dataset: Path, tmp_path: Path) -> None:
    embed_shards(onnx, tiny_dataset, tmp_path / "half", dtype="float16")
    rows, dataset = table(tmp_path / "half"), read(tiny_dataset)
    assert rows["split"].to_pylist() == ["query"] * 12 + ["gallery"] * 12 + ["train"] * 12
    assert rows["pid"].to_pylist()[:12] == dataset.query.pids.tolist()
    assert rows["camid"].to_pylist()[24:] == dataset.train.camids.tolist()
    assert rows.schema.field("embedding").type == pyarrow.list_(pyarrow.float16(), 1536)
    expected = embed_files(onnx, tiny_dataset).embeddings
    np.testing.assert_allclose(embeddings(rows), expected, rtol=2e-3, atol=1e-3)


def test_lists_and_sequences(onnx: Embedder, crops: Path, tmp_path: Path) -> None:
    names = ["crops/cam1/01.jpg", "crops/cam0/00.jpg", "crops/cam1/01.jpg"]
    (tmp_path / "list.txt").write_text("\n".join(names))
    embed_shards(onnx, tmp_path / "list.txt", tmp_path / "listed", shard_rows=2)
    assert table(tmp_path / "listed")["path"].to_pylist() == names
    embed_shards(onnx, [tmp_path / names[0]], tmp_path / "one")
    assert table(tmp_path / "one")["path"].to_pylist() == [str(tmp_path / names[0])]


def test_tar_files(onnx: Embedder, tiny_dataset: Path, tmp_path: Path) -> None:
    first, second = (path.read_bytes() for path in sorted((tiny_dataset / "query").iterdir())[:2])
    tars = tmp_path / "tars"
    tars.mkdir()
    labels = json.dumps({"pid": 7, "camid": 2, "split": "gallery", "more": 1}).encode()
    write_tar(
        tars / "a.tar",
        {"x/01.jpg": first, "x/01.json": labels, "02.cls": b"9\n", "02.jpg": second, "../03.jpg": first, "04.txt": b""},
    )
    write_tar(tars / "b.tar", {"1.jpg": first, "1.json": b"{", "2.jpg": second, "3.left.jpg": first, "3.jpg": b"x"})
    write_tar(tars / "c.tar", {"1.txt": b"no image"})
    shutil.copy(sorted((tiny_dataset / "query").iterdir())[0], tars / "d.jpg")
    result = embed_shards(onnx, tars, tmp_path / "out", batch=2)
    rows, bad = table(result.folder), table(result.folder, BAD_FOLDER)
    names = ["a.tar/x/01.jpg", "a.tar/02.jpg", "a.tar/../03.jpg", "b.tar/2.jpg", "b.tar/3.left.jpg", "d.jpg"]
    assert rows["path"].to_pylist() == names
    assert rows["pid"].to_pylist() == [7, 9, None, None, None, None]
    assert (rows["camid"].to_pylist()[0], rows["split"].to_pylist()[0]) == (2, "gallery")
    assert bad["path"].to_pylist() == ["b.tar/1.jpg", "b.tar/3.jpg", "c.tar"]
    assert result.manifest.shards == 4
    expected = onnx.embed(sorted((tiny_dataset / "query").iterdir())[:2])
    np.testing.assert_allclose(embeddings(rows)[[0, 1, 5]], expected[[0, 1, 0]], rtol=1e-4, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tars"]  # nothing is extracted


def test_what_cannot_be_stored_of_a_tar_file(
    onnx: Embedder, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = next((tiny_dataset / "query").iterdir()).read_bytes()
    too_large = json.dumps({"camid": 2**63}).encode()
    members = {"1.a.jpg": bytes(len(image) + 1), "1.b.jpg": image, "2.jpg": image, "2.json": too_large}
    tar = write_tar(tmp_path / "a.tar", members | {"3.jpg": image, "3.cls": b"9" * 30, "4.jpg": image, "4.cls": b"4"})
    monkeypatch.setattr("pmm_edge.runtime.listing.MEMBER_LIMIT", len(image))
    embed_shards(onnx, tar, tmp_path / "out")
    rows, bad = table(tmp_path / "out"), table(tmp_path / "out", BAD_FOLDER)
    assert (rows["path"].to_pylist(), rows["pid"].to_pylist()) == (["a.tar/1.b.jpg", "a.tar/4.jpg"], [None, 4])
    assert bad["path"].to_pylist() == ["a.tar/1.a.jpg", "a.tar/2.jpg", "a.tar/3.jpg"]


@pytest.mark.parametrize("damage", ["cut", "cut between members", "header", "not a tar"])
def test_a_damaged_tar_file_is_one_bad_row(onnx: Embedder, tiny_dataset: Path, tmp_path: Path, damage: str) -> None:
    images = [path.read_bytes() for path in sorted((tiny_dataset / "query").iterdir())[:4]]
    tar = write_tar(tmp_path / "a.tar", {f"{number}.jpg": image for number, image in enumerate(images)})
    with tarfile.open(tar) as file:
        offsets = [member.offset for member in file]
    content = bytearray(tar.read_bytes())
    if damage == "header":
        content[offsets[2] + 5] ^= 255
    elif damage == "not a tar":
        content = bytearray(b"text" * 1000)
    else:
        del content[offsets[2] + (600 if damage == "cut" else 0) :]
    tar.write_bytes(content)
    if damage == "not a tar":
        with pytest.raises(CheckFailedError):
            embed_shards(onnx, tar, tmp_path / "out")
    else:
        assert embed_shards(onnx, tar, tmp_path / "out").rows == 2
        assert table(tmp_path / "out")["path"].to_pylist() == ["a.tar/0.jpg", "a.tar/1.jpg"]
    bad = table(tmp_path / "out", BAD_FOLDER)
    assert (bad["path"].to_pylist(), len(bad)) == (["a.tar"], 1)


def test_finished_shards_are_kept_and_damaged_ones_are_written_again(
    onnx: Embedder, crops: Path, whole: EmbeddedShards
) -> None:
    expected, folder = contents(whole.folder), Path(whole.folder)
    victims = [folder / f"shard-00000{number}.parquet" for number in range(4)]
    victims[0].unlink()
    half = len(expected[victims[1].name]) // 2
    victims[1].write_bytes(expected[victims[1].name][:half])
    flipped = bytearray(expected[victims[2].name])
    flipped[half] ^= 1
    victims[2].write_bytes(flipped)
    footer = expected[victims[3].name]  # a schema that pyarrow does not support: integers of 128 bits
    (schema,) = re.findall(rb"ARROW:schema\x18[\x80-\xff]*[\x00-\x7f]([\w+/=]+)", footer)
    wrong = b64encode(b64decode(schema).replace(struct.pack("<i", 64), struct.pack("<i", 128)))
    victims[3].write_bytes(footer.replace(schema, wrong))
    (bad,) = [path for path in (folder / BAD_FOLDER).iterdir() if path.name == "shard-000004.parquet"]
    bad.unlink()
    with pytest.warns(PmmWarning) as warned:
        again = embed_shards(onnx, crops, folder, shard_rows=5, batch=2)
    assert len([one for one in warned if issubclass(one.category, PmmWarning)]) == 4
    assert (again.kept, again.embedded, again.rows, again.bad) == (0, 21, 21, 2)
    assert contents(folder) == expected
    last = embed_shards(onnx, crops, folder, shard_rows=5, batch=2)
    assert (last.kept, last.embedded, last.rows, last.bad, last.skipped) == (5, 0, 21, 2, [])


def test_other_runs_are_refused_and_nothing_is_lost(
    onnx: Embedder, crops: Path, whole: EmbeddedShards, torch: Embedder, tmp_path: Path
) -> None:
    folder, expected = Path(whole.folder), contents(whole.folder)
    for model, changes in ((onnx, {"shard_rows": 6}), (onnx, {"dtype": "float16"}), (torch, {})):
        with pytest.raises(OutputError, match="whole"):
            embed_shards(model, crops, folder, **{"shard_rows": 5, **changes})
    elsewhere = embed_shards(torch, crops, tmp_path / "elsewhere", shard_rows=5)
    shutil.copy(Path(elsewhere.folder, "shard-000003.parquet"), folder)
    with pytest.raises(OutputError, match=r"shard-000003\.parquet"):
        embed_shards(onnx, crops, folder, shard_rows=5)
    assert contents(folder) == expected | {"shard-000003.parquet": contents(elsewhere.folder)["shard-000003.parquet"]}
    (folder / "shard-000003.parquet").unlink()
    shutil.copy(crops / "cam0" / "00.jpg", crops / "cam1" / "new.jpg")
    with pytest.raises(OutputError):
        embed_shards(onnx, crops, folder, shard_rows=5)
    for spoil in (lambda: (folder / MANIFEST).write_text("{}"), (folder / MANIFEST).unlink):
        spoil()
        with pytest.raises(OutputError):
            embed_shards(onnx, crops, folder, shard_rows=5)


def test_wrong_use(onnx: Embedder, crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").touch()
    for source in (*(tmp_path / name for name in ("empty", "empty.txt", "missing", "missing.tar")), []):
        with pytest.raises(DataError):
            embed_shards(onnx, source, tmp_path / "out")
    with monkeypatch.context() as patched, pytest.raises(DataError, match="crops"):
        patched.setattr("os.listdir", Mock(side_effect=PermissionError(13, "Permission denied")))
        embed_shards(onnx, crops, tmp_path / "out")
    for wrong in ({"batch": 0}, {"shard_rows": 0}, {"dtype": "float64"}, {"workers": 2}):
        with pytest.raises(PmmError):
            embed_shards(onnx, crops, tmp_path / "out", **wrong)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(PmmError, match=r"\.\[parquet\]"):
        embed_shards(onnx, crops, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_ignored_is_one_warning(onnx: Embedder, crops: Path, tmp_path: Path) -> None:
    (crops / "cam0" / "animation.gif").touch()
    with pytest.warns(PmmWarning, match="gif") as caught:
        embed_shards(onnx, crops, tmp_path / "out")
    assert len(caught) == 1


def test_an_image_that_appears_meanwhile(onnx: Embedder, crops: Path, tmp_path: Path) -> None:
    def add(what: str, *_: object) -> None:
        if what.startswith("embedding"):
            shutil.copy(crops / "cam0" / "00.jpg", crops / "cam2" / "zz.jpg")

    with pytest.raises(DataError, match="crops"):
        embed_shards(onnx, crops, tmp_path / "out", batch=1, shard_rows=1, report=add)


def test_a_full_disk_loses_no_finished_shard(
    onnx: Embedder, crops: Path, whole: EmbeddedShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write = tmp_path / "full", pyarrow.parquet.ParquetWriter.write_table

    def full(self: object, rows: pyarrow.Table) -> None:
        if len(list(out.glob("*.parquet"))) == 3:
            raise OSError(28, "No space left on device")
        write(self, rows)

    with monkeypatch.context() as patched:
        patched.setattr(pyarrow.parquet.ParquetWriter, "write_table", full)
        with pytest.raises(OutputError, match=r"shard-000003\.parquet"):
            embed_shards(onnx, crops, out, shard_rows=5, batch=2)
    assert sorted(path.name for path in out.iterdir()) == [BAD_FOLDER, MANIFEST, *sorted(contents(out))]
    assert embed_shards(onnx, crops, out, shard_rows=5, batch=2).kept == 3
    assert contents(out) == contents(whole.folder)


def test_kills_neither_lose_nor_double_a_row(
    tiny_onnx: Path, crops: Path, whole: EmbeddedShards, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    out.mkdir()
    (out / f".{MANIFEST}.0123abcd.tmp").touch()  # what a kill at the very start leaves
    command = [sys.executable, "-m", "pmm_edge", "embed", tiny_onnx, crops, "-o", out, "--shard-rows", "5"]
    command += ["--batch", "2", "--device", "cpu", "--json"]
    for shards in (1, 3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list(out.glob("*.parquet"))) < shards and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    facts = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert (facts["rows"], facts["bad"]) == (21, 2)
    assert facts["kept"] >= 3
    assert contents(out) == contents(whole.folder)
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]


def test_the_command(pmm: Callable, tiny_onnx: Path, crops: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows"
    facts = pmm("embed", tiny_onnx, crops, "-o", out, "--dtype", "float16", "--device", "cpu", "--json").json
    assert {name: facts[name] for name in ("written", "rows", "bad", "shards", "kept", "dtype", "embedding_size")} == {
        "written": str(out), "rows": 21, "bad": 2, "shards": 1, "kept": 0, "dtype": "float16", "embedding_size": 1536
    }  # fmt: skip
    shown = pmm("embed", tiny_onnx, crops, "-o", out, "--dtype", "float16", "--device", "cpu").ok
    assert str(out) in shown.stdout
    assert str(out) in pmm("embed", tiny_onnx, crops, "-o", out).error
    assert "--dtype" in pmm("embed", tiny_onnx, crops, "-o", tmp_path / "e.npz", "--dtype", "float16").error
    assert "--tracklets" in pmm("embed", tiny_onnx, crops, "-o", tmp_path / "t", "--tracklets").error


def test_object_storage(
    onnx: Embedder, crops: Path, whole: EmbeddedShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Storage, path: Path) -> None:
        raise OSError("timed out")

    class Buckets:
        """The file systems of pyarrow, with a folder in the place of S3."""

        @staticmethod
        def from_uri(url: str) -> tuple[object, str]:
            if url.startswith("s3://"):
                return pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem()), url[5:]
            return original.from_uri(url)

    original = pyarrow.fs.FileSystem
    monkeypatch.setattr(pyarrow.fs, "FileSystem", Buckets)
    (crops / "cam2" / "20.jpg").unlink()  # no links there
    write_tar(crops / "x.tar", {"1.jpg": (crops / "cam0" / "00.jpg").read_bytes()})
    settings = {"shard_rows": 5, "batch": 2}
    here = embed_shards(onnx, crops, tmp_path / "here", **settings)
    there = embed_shards(onnx, "s3://crops", "s3://bucket/out", **settings)
    assert contents(tmp_path / "bucket" / "out") == contents(tmp_path / "here") != contents(whole.folder)
    assert (there.rows, there.bad, there.folder) == (22, 1, "s3://bucket/out") and here.rows == 22
    (tmp_path / "bucket" / "out" / "shard-000002.parquet").unlink()
    again = embed_shards(onnx, "s3://crops", f"file://{tmp_path}/bucket/out", **settings)
    assert (again.kept, again.rows) == (5, 22)
    assert contents(tmp_path / "bucket" / "out") == contents(tmp_path / "here")
    with pytest.raises(DataError):
        embed_shards(onnx, "s3://nothing", tmp_path / "none")
    with monkeypatch.context() as patched:  # a network that fails is not a bad image
        patched.setattr(Storage, "open", broken)
        for source in ("s3://crops/cam0", "s3://crops/x.tar"):
            with pytest.raises(DataError, match="timed out"):
                embed_shards(onnx, source, tmp_path / "none")
            shutil.rmtree(tmp_path / "none")
    for wrong in ("s4://crops", "http://host/crops"):
        with pytest.raises(PmmError, match="crops"):
            embed_shards(onnx, wrong, tmp_path / "none")


def test_items_are_computed_ahead_and_errors_arrive() -> None:
    def numbers() -> object:
        try:
            yield from range(5)
            raise KeyError(1)
        finally:
            closed.append(True)

    closed: list[bool] = []
    found = []
    with pytest.raises(KeyError):
        found.extend(ahead(numbers(), 2))
    for number in (items := ahead(numbers(), 1)):
        if number == 1:
            items.close()
    assert closed == [True, True]
    assert list(ahead([None, 1], 1)) == [None, 1]
