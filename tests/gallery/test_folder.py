"""A folder survives kills, full disks and damage, keeps the view of its readers, and forgets what was deleted."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from gallery.conftest import SIZE, model_of
from numpy.typing import NDArray

import pmm_edge
from pmm_edge.errors import DataError, OutputError
from pmm_edge.gallery import Gallery
from pmm_edge.gallery.folder import FolderGallery, Manifest, Segment

pytestmark = pytest.mark.usefixtures("small")


def vectors(numbers: NDArray[np.int64]) -> NDArray[np.float32]:
    """The row of each number."""
    return np.stack([np.random.default_rng(number).standard_normal(SIZE, np.float32) for number in numbers])


def add(gallery: Gallery, first: int, count: int = 70) -> None:
    numbers = np.arange(first, first + count)
    names = [f"name-{number:06d}" for number in numbers]
    gallery.add(vectors(numbers), sources=names, pids=numbers // 10, times=numbers)


def contents(folder: Path) -> list[int]:
    """The numbers of all rows, each of which has its own vector and labels."""
    gallery = pmm_edge.open_gallery(folder)
    if gallery.model is None:
        return []
    rows = gallery.info(check=True).rows
    numbers = []
    for hit in gallery.search(np.zeros((1, SIZE), np.float32), top=rows + 1, exact=True)[0].hits if rows else ():
        number = int(hit.source.removeprefix("name-"))
        assert (hit.pid, hit.time.timestamp()) == (number // 10, number)
        assert hit.distance == pytest.approx(np.linalg.norm(vectors(np.array([number]))), rel=1e-5)
        numbers.append(number)
    return sorted(numbers)


def test_a_kill_at_any_moment_loses_and_doubles_nothing(tmp_path: Path) -> None:
    random, folder, expected = np.random.default_rng(0), tmp_path / "people", 0

    def manifest() -> int:
        path = folder / "gallery.json"
        return path.stat().st_mtime_ns if path.exists() else 0

    for _ in range(12):
        before = manifest()
        child = os.fork()
        if not child:
            try:
                gallery = pmm_edge.open_gallery(folder, model_of())
                for first in range(70 * expected, 70_000, 70):
                    add(gallery, first)
                    gallery.delete(pids=[first // 10])
            finally:
                os._exit(0)
        while manifest() == before:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = contents(folder)
        assert len(found) == len(set(found))
        parts = {number // 70 for number in found}
        last = max(parts, default=0)
        assert {number for number in range(70 * last) if number // 10 % 7} == {one for one in found if one < 70 * last}
        assert last >= expected
        expected = last
    assert expected
    gallery = pmm_edge.open_gallery(folder, model_of())
    add(gallery, 70 * expected)
    gallery.delete(pids=[7 * expected])
    manifest, files = gallery.view.manifest, list((folder / "data").iterdir())
    assert {path.name.split(".")[0] for path in files} == {
        one.name for one in (*manifest.segments, manifest.index) if one
    }
    assert gallery.info().size == sum(path.stat().st_size for path in files)


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    gallery = pmm_edge.open_gallery(tmp_path / "people", model_of())
    add(gallery, 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for space in (70 * SIZE * 4 + 100, 1000):  # in a file of vectors, and in the manifest
        resource.setrlimit(resource.RLIMIT_FSIZE, (space, limits[1]))
        try:
            with pytest.raises(OutputError, match="people"):
                add(gallery, 70)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert contents(tmp_path / "people") == list(range(70))
    add(gallery, 70)
    assert contents(tmp_path / "people") == list(range(140))


def test_what_was_added_before_an_error_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery, extend = pmm_edge.open_gallery(tmp_path / "people", model_of()), FolderGallery._extend

    def full(self: FolderGallery, segment: Segment, *rows: Any) -> Segment:
        if self.view.manifest.segments:
            raise OSError(28, "No space left on device")
        return extend(self, segment, *rows)

    with monkeypatch.context() as patched, pytest.raises(OutputError):
        patched.setattr(FolderGallery, "_extend", full)
        add(gallery, 0, 200)
    assert gallery.info(check=True).rows == len(gallery.search(vectors(np.arange(1)), top=200)[0].hits) == 150
    assert contents(tmp_path / "people") == list(range(150))


def test_a_reader_keeps_its_view(tmp_path: Path) -> None:
    writer = pmm_edge.open_gallery(tmp_path / "people", model_of())
    for first in range(0, 490, 70):
        add(writer, first)
    reader = pmm_edge.open_gallery(tmp_path / "people")
    before = reader.search(vectors(np.arange(20)))
    add(writer, 490)
    assert writer.delete(pids=list(range(20))) == 200
    assert reader.search(vectors(np.arange(20))) == before
    assert before[5].hits[0].source == "name-000005"
    assert {hit.pid for one in writer.search(vectors(np.arange(20))) for hit in one.hits}.isdisjoint(range(20))


def test_deleted_rows_are_in_no_file(tmp_path: Path) -> None:
    gallery = pmm_edge.open_gallery(tmp_path / "people", model_of())
    for first in range(0, 560, 70):
        add(gallery, first)
    index = gallery.view.index.ntotal
    secret = [b"name-000123", vectors(np.array([123])).tobytes(), vectors(np.array([123]))[0, :2].tobytes()]

    def found() -> list[bool]:
        texts = [path.read_bytes() for path in (tmp_path / "people").rglob("*") if path.is_file()]
        return [any(text in one for one in texts) for text in secret]

    assert found() == [True] * 3
    assert gallery.delete(sources=["name-000123"]) == 1
    assert found() == [False] * 3
    assert gallery.view.index.ntotal == index - 1
    assert contents(tmp_path / "people") == [number for number in range(560) if number != 123]
    assert gallery.delete(pids=list(range(56))) == 559
    assert (gallery.info().rows, list((tmp_path / "people" / "data").iterdir())) == (0, [])
    assert gallery.search(np.zeros((1, SIZE), np.float32))[0].hits == []
    add(gallery, 0)
    assert contents(tmp_path / "people") == list(range(70))


def test_deleted_rows_leave_the_index_and_the_segments_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery, commit, done = pmm_edge.open_gallery(tmp_path / "people", model_of()), FolderGallery._commit, []
    for first in range(0, 490, 70):
        add(gallery, first)

    def killed_after_the_first(self: FolderGallery, manifest: Manifest) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(commit(self, manifest))

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(FolderGallery, "_commit", killed_after_the_first)
        for pid in (3, 4):
            gallery.delete(pids=[pid])
    left = pmm_edge.open_gallery(tmp_path / "people")
    assert left.info().index
    for exact in (True, False):
        assert len(left.search(vectors(np.arange(30, 31)), top=500, exact=exact)[0].hits) == left.info().rows == 480


def test_names_survive_any_locale(tmp_path: Path) -> None:
    script = (
        "import sys, numpy as np, pmm_edge; from gallery.conftest import SIZE, model_of\n"
        "gallery = pmm_edge.open_gallery(sys.argv[1], model_of())\n"
        "gallery.add(np.ones((1, SIZE)), sources=['a'], cameras='stra\\xdfe')"
    )
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    tests, paths = Path(__file__).parents[1], os.environ.get("PYTHONPATH", "")
    environment = os.environ | locale | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent), paths])}
    subprocess.run([sys.executable, "-c", script, tmp_path / "people"], check=True, env=environment)
    assert pmm_edge.open_gallery(tmp_path / "people").info().cameras == ["straße"]


def test_one_writer(tmp_path: Path) -> None:
    gallery = pmm_edge.open_gallery(tmp_path / "people", model_of())
    add(gallery, 0)
    with FileLock(tmp_path / "people" / "lock"):
        for write in (lambda: add(gallery, 70), lambda: gallery.delete(pids=[1])):
            with pytest.raises(OutputError, match="people"):
                write()
        assert contents(tmp_path / "people") == list(range(70))
    other = pmm_edge.open_gallery(tmp_path / "people", model_of())
    add(gallery, 70)
    add(other, 140)  # another process wrote in between
    assert contents(tmp_path / "people") == list(range(210))


def test_damage_is_one_error(tmp_path: Path) -> None:
    gallery = pmm_edge.open_gallery(tmp_path / "people", model_of())
    for first in range(0, 490, 70):
        add(gallery, first)
    files = [tmp_path / "people" / "gallery.json", *sorted((tmp_path / "people" / "data").iterdir())]
    for number, file in enumerate(files):
        for damage in ("flip", "truncate", "remove"):
            copy = tmp_path / f"{damage}{number}"
            damaged = Path(shutil.copytree(tmp_path / "people", copy), *file.relative_to(tmp_path / "people").parts)
            content = bytearray(damaged.read_bytes())
            content[len(content) // 2] ^= 1
            damaged.write_bytes(content if damage == "flip" else content[: len(content) // 2])
            if damage == "remove":
                damaged.unlink()
            with pytest.raises(DataError, match=copy.name):
                pmm_edge.open_gallery(copy).info(check=True)


def test_a_folder_that_is_no_gallery_keeps_its_files(tmp_path: Path) -> None:
    """Neither images in a folder `data` nor a gallery without its manifest are taken for the remains of a process."""
    image, lost = tmp_path / "project" / "data" / "a.jpg", tmp_path / "lost"
    image.parent.mkdir(parents=True)
    image.touch()
    add(pmm_edge.open_gallery(lost, model_of()), 0)
    (lost / "gallery.json").unlink()
    before = sorted(tmp_path.rglob("*"))
    for wrong in (image, image.parent, image.parents[1], lost):
        with pytest.raises(DataError, match=wrong.name):
            add(pmm_edge.open_gallery(wrong, model_of()), 0)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".gallery.json.01234567.tmp").touch()
    add(pmm_edge.open_gallery(tmp_path / "killed", model_of()), 0)
    (tmp_path / "killed" / "data" / "notes.txt").touch()
    (tmp_path / "killed" / "data" / "left.rows").touch()
    add(pmm_edge.open_gallery(tmp_path / "killed", model_of()), 70)
    left = {path.name for path in (tmp_path / "killed").rglob("*")}
    assert "notes.txt" in left and "left.rows" not in left
    assert contents(tmp_path / "killed") == list(range(140))
