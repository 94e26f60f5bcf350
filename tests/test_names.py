"""Names that are not UTF-8 or hold escape sequences, output that nobody can read, links, pipes and stray files."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from pmm_edge.console import printable
from pmm_edge.data.checks import DatasetWarningKind, analyze
from pmm_edge.data.dataset import read
from pmm_edge.errors import DataError, PmmWarning
from pmm_edge.files import decode_json, encode_json, utf8_path, written_whole
from pmm_edge.runs import AboutRun, about_run, new_run_folder, run_of
from pmm_edge.runtime import load
from pmm_edge.runtime.listing import find_images
from pmm_edge.trainer.logging import Journal

ODD = os.fsdecode(b"caf\xe9\x1b[31m\n\xe2\x80\xae")
SHOWN = r"caf\xe9\x1b[31m\n\u202e"


@pytest.fixture
def odd(tiny_dataset: Path, tmp_path: Path) -> Path:
    """A data set whose folder and first images have an odd name."""
    root = shutil.copytree(tiny_dataset, tmp_path / ODD)
    for folder in root.iterdir():
        first = min(folder.iterdir())
        first.rename(first.with_name(f"{first.stem}_{ODD}.jpg"))
    return root


def test_text_is_escaped_and_json_keeps_every_name() -> None:
    assert printable(ODD) == SHOWN
    assert printable("É 中 😀 a\u200db\n", keep="\n") == "É 中 😀 a\u200db\n"
    for indent in (0, 2):
        about = AboutRun(ODD, ODD, "0")
        assert decode_json(AboutRun, encode_json(about, indent), "it") == about
        assert json.loads(encode_json({"a": Path(ODD), "b": float("nan")}, indent)) == {"a": ODD, "b": None}
    with pytest.raises(DataError):
        decode_json(dict[str, float], '{"a": NaN}', "it")


def test_a_data_set_with_odd_names(pmm: Callable, odd: Path, tiny_onnx: Path) -> None:
    shown = pmm("data", odd, "--decode").ok
    assert SHOWN in shown.stdout
    assert pmm("data", odd, "--json").json["folder"] == str(odd)
    model = shutil.copy(tiny_onnx, odd / f"{ODD}.onnx")
    evaluated = pmm(
        "eval", model, odd, "--device", "cpu", "--features", odd / f"{ODD}.npz", "--cmc", odd / "cmc.png"
    ).ok
    assert SHOWN in evaluated.stdout
    embedded = pmm("embed", model, odd, "-o", odd / "e.npz", "--device", "cpu").ok
    found = find_images(odd)
    assert np.load(odd / "e.npz")["paths"].tolist() == found.names
    assert [(odd / name).exists() for name in found.names] == [True] * 36
    pmm("embed", model, odd / "query", "-o", odd / f"{ODD}.parquet", "--device", "cpu").ok  # noqa: B018
    with (odd / f"{ODD}.parquet").open("rb") as file:
        first = pyarrow.parquet.read_table(file)["paths"].to_pylist()[0]
    assert first == f"query/{found.paths[0].name}"[6:].encode("utf-8", "backslashreplace").decode()
    (odd / "list.txt").write_bytes(b"\n".join(map(os.fsencode, ["a.jpg", os.fsdecode(b"query/\xe9.jpg")])))
    with pytest.raises(DataError):
        find_images(odd / "list.txt")  # a name that is not UTF-8 and does not exist: not a text file
    shutil.copy(found.paths[1], odd / os.fsdecode(b"query/\xe9.jpg"))
    assert find_images(odd / "list.txt").paths[1].exists()
    for output in (*shown, *evaluated, *embedded):
        assert not any(char in str(output) for char in "\x1b\u202e\udce9")


def test_a_run_with_odd_names(pmm: Callable, odd: Path, tmp_path: Path) -> None:
    run = tmp_path / f"run{ODD}"
    options = "--height 96 --width 48 --epochs 1 --batch 8 --erase-size 8 --device cpu --backbone resnet10"
    shown = pmm("train", odd, "--out", run, *options.split()).ok
    assert f"run{SHOWN}" in shown.stdout
    assert about_run(run).data == str(odd)
    assert SHOWN in (run / "log.txt").read_text("utf-8")
    assert "\x1b" not in (run / "log.txt").read_text("utf-8")
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert load(run, "cpu").spec.dataset == SHOWN
    pmm("train", "--resume", run).ok  # noqa: B018  the fingerprint is the same


def test_the_log_has_one_line_for_each_message(tmp_path: Path) -> None:
    with Journal(tmp_path, 0, None, active=True) as journal:
        journal.write(f"cannot read {ODD}")
    (line,) = (tmp_path / "log.txt").read_text("utf-8").splitlines()
    assert line.endswith(SHOWN)


@pytest.mark.parametrize("closed", ["", "stdout", "stderr"])
def test_output_never_ends_a_command(closed: str, odd: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | ({closed: writer} if closed else {})
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C"}
    for options in ([], ["--json"]):
        command = [sys.executable, "-m", "pmm_edge", "data", odd, "--decode", *options]
        ended = subprocess.run(command, env=environment, check=False, **streams)
        assert ended.returncode == 0
        assert b"Traceback" not in (ended.stdout or b"") + (ended.stderr or b"")
        if options and not closed:
            assert json.loads(ended.stdout.decode("ascii"))["folder"] == str(odd)
    os.close(writer)


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    (tmp_path / "far" / "deep").mkdir(parents=True)
    Image.new("RGB", (4, 8)).save(tmp_path / "far" / "deep" / "a.png")
    here = tmp_path / "here"
    here.mkdir()
    (here / "link").symlink_to(tmp_path / "far")
    (here / "again").symlink_to(tmp_path / "far" / "deep")
    (here / "b.png").symlink_to(tmp_path / "far" / "deep" / "a.png")
    (tmp_path / "far" / "back").symlink_to(here)
    (tmp_path / "far" / "self").symlink_to(tmp_path / "far")
    assert find_images(here).names == ["again/a.png", "b.png", "link/deep/a.png"]
    out = tmp_path / "out.txt"
    out.symlink_to(tmp_path / "far" / "target.txt")
    with written_whole(out) as temporary:
        temporary.write_text("new")
    assert out.is_symlink() and (tmp_path / "far" / "target.txt").read_text() == "new"


def test_a_path_given_through_a_link_is_remembered_as_given(tmp_path: Path, tiny_dataset: Path) -> None:
    (tmp_path / "detected").symlink_to(tiny_dataset)
    data, run = tmp_path / "detected", new_run_folder(AboutRun("one", "d", "0"), tmp_path / "run")
    assert read(data).root == data
    (tmp_path / "blob").touch()
    (run / "model.onnx").symlink_to(tmp_path / "blob")
    (tmp_path / "best.pt").symlink_to(run / "best.pt")
    assert run_of(run / "model.onnx") == run_of(tmp_path / "best.pt") == run


def test_what_is_not_a_regular_file_is_never_opened(tmp_path: Path, tiny_dataset: Path) -> None:
    data = shutil.copytree(tiny_dataset, tmp_path / "data")
    for path in (tmp_path / "pipe", data / "query" / "0101_c1_pipe.jpg"):
        os.mkfifo(path)
    for name in ("0101_c1.tif", "0101_c1.HEIC", "notes.txt"):
        (data / "query" / name).touch()
    dataset = read(data)
    assert dataset.ignored == {"pipe, device or socket": 1, ".tif": 1, ".heic": 1}
    assert DatasetWarningKind.IGNORED_FILES in [warning.kind for warning in analyze(dataset).warnings]
    with pytest.warns(PmmWarning, match=r"\.heic"):
        assert len(find_images(data / "query").paths) == 12
    with pytest.raises(DataError):
        find_images(tmp_path / "pipe")


def test_libraries_that_need_utf8_get_a_link(tmp_path: Path) -> None:
    for path in (tmp_path / "plain.txt", tmp_path / ODD / "a.txt", tmp_path / f"{ODD}.txt"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
        with utf8_path(path) as readable:
            assert str(readable).encode() and readable.read_text() == "x" and readable.suffix == ".txt"
        assert path.exists() and readable.exists() == (readable == path)
