"""Typed JSON names the wrong entry, files are written whole or not at all, and runs are found again."""

import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from pmm_edge.errors import DataError, ModelError, OutputError
from pmm_edge.files import (
    check_new_folder,
    check_place,
    decode_json,
    encode_json,
    folder_written_whole,
    remove_unfinished,
    written_whole,
)
from pmm_edge.runs import AboutRun, about_run, data_of, new_run_folder, new_run_path, resolve_checkpoint


@dataclass
class Part:
    size: int


@dataclass
class Whole:
    name: str
    parts: list[Part]
    ratio: float | None = None


def test_json_there_and_back() -> None:
    value = Whole("a", [Part(1), Part(2)], float("nan"))
    for indent in (0, 2):
        assert decode_json(Whole, encode_json(value, indent), "it") == Whole("a", value.parts)
    assert encode_json({"b": 1, "a": None}, 0) == '{"a":null,"b":1}'
    assert encode_json({"path": Path("a/b")}) == '{\n  "path": "a/b"\n}\n'
    assert decode_json(Whole, '{"name": "a", "parts": [], "unknown": 1}', "it") == Whole("a", [])


def test_wrong_json() -> None:
    for text, entry in {
        '{"name": "a", "parts": [{"size": 1}, {"size": "2"}]}': "$.parts[1].size",
        '{"name": "a"}': "parts",
        '{"name": "a", "parts": [{"size": 1.5}]}': "$.parts[0].size",
        "[" * 100_000: "x.json",
        b"\xff": "x.json",
    }.items():
        for kind in (DataError, ModelError):
            with pytest.raises(kind) as caught:
                decode_json(Whole, text, "x.json", kind)
            assert entry in caught.value.problem


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with written_whole(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(KeyboardInterrupt), written_whole(path) as temporary:
        temporary.write_text("part")
        raise KeyboardInterrupt
    with pytest.raises(OutputError), written_whole(path):
        raise OSError(28, "No space left on device")
    with pytest.raises(RuntimeError), folder_written_whole(tmp_path / "folder") as folder:
        (folder / "part").touch()
        raise RuntimeError
    assert path.read_text() == "old"
    assert [each for each in tmp_path.rglob("*") if each.is_file()] == [path]
    assert not (tmp_path / "folder").exists()


def test_what_killed_processes_left_is_removed_by_the_next_of_the_same_name(tmp_path: Path) -> None:
    path, names = tmp_path / "last[1].pt", [f".last[1].pt.{word}.tmp" for word in ("0123abcd", "mine")]
    (tmp_path / ".last[1].pt.89abcdef.tmp").mkdir()
    for name in (*names, ".last1.pt.0123abcd.tmp"):
        (tmp_path / name).touch()
    with written_whole(path) as temporary:
        assert {each.name for each in tmp_path.iterdir()} == {temporary.name, *names[1:], ".last1.pt.0123abcd.tmp"}
        remove_unfinished(path)
        temporary.write_text("not removed while it is written")
        with folder_written_whole(tmp_path / "bundle") as folder:
            remove_unfinished(tmp_path / "bundle")
            (folder / "part").touch()
    assert path.is_file() and (tmp_path / "bundle" / "part").is_file()


def test_a_file_removed_by_another_process_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, locked = fcntl.flock, list[None]()

    def late(descriptor: int, flags: int) -> None:
        if not locked:
            next(tmp_path.iterdir()).unlink()
        flock(descriptor, flags)
        locked.append(None)

    monkeypatch.setattr("fcntl.flock", late)
    with written_whole(tmp_path / "file") as temporary:
        assert temporary.exists()
        temporary.write_text("whole")
    assert (tmp_path / "file").read_text() == "whole" and len(locked) == 2


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for path in (tmp_path / "file" / "deep" / "x", tmp_path / "full", Path("/proc/x")):
        with pytest.raises(OutputError):
            check_place(path)
    for path in (tmp_path / "file" / "x", tmp_path / "full", tmp_path / "file"):
        with pytest.raises(OutputError):
            check_new_folder(path)
    with pytest.raises(OutputError), folder_written_whole(tmp_path / ("x" * 300)):
        pass
    check_place(tmp_path / "a" / "b" / "c")
    check_new_folder(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


def test_the_data_set_of_a_model(tmp_path: Path) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    run = new_run_folder(AboutRun("quick", str(data), "0.1.0", "cuhk03-np-labeled"), tmp_path / "run")
    for model in (run / "best.pt", run / "export" / "model.onnx"):
        assert data_of(model) == (data, "cuhk03-np-labeled")
        assert data_of(model, layout="market-layout") == (data, "market-layout")
        assert data_of(model, data) == (data, "cuhk03-np-labeled")
        assert data_of(model, other) == (other, None)  # another data set's layout is its own
        assert data_of(model, other, "msmt17") == (other, "msmt17")


def test_a_model_without_a_run(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    assert data_of(model, tmp_path, "msmt17") == (tmp_path, "msmt17")
    with pytest.raises(ModelError):  # it does not exist
        data_of(model)
    model.touch()
    with pytest.raises(DataError, match="--data"):
        data_of(model)


def test_a_run_folder_is_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    about = AboutRun("quick", "data", "0")
    runs = [new_run_folder(about, Path("runs", name)) for name in ("old", "new", "unfinished")]
    for missing in (None, runs[2], Path("missing.pt")):
        with pytest.raises(ModelError):
            resolve_checkpoint(missing)
    for age, run in enumerate(runs[:2]):
        (run / "best.pt").touch()
        os.utime(run / "best.pt", (9 - age, 9 - age))  # the older run ended later
    assert resolve_checkpoint(None) == runs[1] / "best.pt"
    (tmp_path / "interrupted").mkdir()
    (tmp_path / "interrupted/last.pt").touch()
    with pytest.raises(ModelError, match=r"--resume .*interrupted"):
        resolve_checkpoint(tmp_path / "interrupted")
    assert resolve_checkpoint(runs[0]) == resolve_checkpoint(runs[0] / "best.pt") == runs[0] / "best.pt"


def test_the_newest_run_may_be_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    about = AboutRun("quick", "data", "0")
    new_run_folder(about, Path("../first"))
    assert not list(Path().iterdir())
    for folder in (new_run_path("quick"), Path("../caf\udce9")):
        new_run_folder(about, folder)
        (folder / "best.pt").touch()
        assert resolve_checkpoint(None).samefile(folder / "best.pt")
    (tmp_path / "caf\udce9" / "best.pt").unlink()
    assert resolve_checkpoint(None).parent.parent == Path("runs")


def test_runs_that_start_in_the_same_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(new_run_path, ["quick"] * 64))
    assert len(set(folders)) == len(list(Path("runs").iterdir())) == 64
    Path("file").touch()
    monkeypatch.setattr("pmm_edge.runs.RUNS", Path("file"))
    with pytest.raises(OutputError):
        new_run_path("quick")


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    first, second = AboutRun("quick", "data", "0"), AboutRun("quick", "other", "0")
    new_run_folder(first, tmp_path)
    assert about_run(new_run_folder(second, tmp_path)).data == "other"  # the first one never started
    (tmp_path / "config.toml").touch()
    for folder in (tmp_path, tmp_path / "config.toml", tmp_path / "config.toml" / "deep"):
        with pytest.raises(OutputError):
            new_run_folder(first, folder)
    assert about_run(tmp_path).data == "other"
    (tmp_path / "run.json").write_text("{}")
    assert about_run(tmp_path) is None
