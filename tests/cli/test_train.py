"""`pmm train`: the result, the settings, and one clear line for everything that can be wrong."""

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pmm_edge.files import decode_toml
from pmm_edge.runs import AboutRun, new_run_folder
from pmm_edge.trainer.config import choose_config

TINY = ["--height", 96, "--width", 64, "--epochs", 1, "--batch", 8, "--erase-size", 8, "--device", "cpu"]


def test_a_run(pmm: Callable, tiny_dataset: Path, tmp_path: Path) -> None:
    ended = pmm("train", tiny_dataset, "-o", tmp_path / "run", *TINY, "--json")
    assert ended.exit_code == 0, ended.stderr
    printed = json.loads(ended.stdout)
    assert (printed["folder"], printed["finished"]) == (str(tmp_path / "run"), True)
    assert 0 < printed["best"]["mAP"] <= 1
    assert (tmp_path / "run" / "best.pt").is_file()
    assert pmm("train", "--resume", tmp_path / "run", "--epochs", 9).exit_code == 2
    taken = pmm("train", tiny_dataset, "-o", tmp_path / "run", *TINY).error
    assert str(tmp_path / "run") in taken
    assert "--out" in taken


def test_print_config_prints_toml_that_repeats_the_run(pmm: Callable, tmp_path: Path) -> None:
    path = "/weights/" + "a long name " * 15 + '/:smile:/[bold]\t"x".pth'
    printed = pmm("train", "--preset", "market1501", "--epochs", 7, "--backbone-weights", path, "--print-config").stdout
    settings = decode_toml(dict, printed, "it")
    assert (settings["preset"], settings["epochs"], settings["backbone_weights"]) == ("market1501", 7, path)
    (tmp_path / "run.toml").write_text(printed)
    assert pmm("train", "--config", tmp_path / "run.toml", "--print-config").stdout == printed
    assert decode_toml(dict, pmm("train", "--print-config").stdout, "it")["preset"] == "quick"


def test_print_config_of_a_run_trains_nothing(pmm: Callable, tiny_dataset: Path, tmp_path: Path) -> None:
    folder = new_run_folder(AboutRun("quick", str(tiny_dataset), "0"), tmp_path / "run")
    settings = choose_config("quick", settings={"epochs": 3, "device": "cpu"}).to_toml()
    (folder / "config.toml").write_text(settings)
    before = sorted(folder.iterdir())
    assert pmm("train", "--resume", folder, "--print-config").stdout == settings
    assert sorted(folder.iterdir()) == before
    assert str(tmp_path) in pmm("train", "--resume", tmp_path, "--print-config").error


def test_images_that_cannot_be_used(pmm: Callable, tiny_dataset: Path, tmp_path: Path) -> None:
    data = shutil.copytree(tiny_dataset, tmp_path / "data")
    train = sorted((data / "bounding_box_train").iterdir())
    image = sorted((data / "query").iterdir())[0]
    image.write_bytes(image.read_bytes()[:400])
    assert str(image) in pmm("train", data, "--out", tmp_path / "run", *TINY).error
    for path in train[3:]:  # one identity is left
        path.unlink()
    assert str(data) in pmm("train", data, "--out", tmp_path / "run", *TINY).error
    assert not list(tmp_path.glob("run/*.pt"))


def test_a_full_disk_leaves_no_part_of_a_checkpoint(tiny_dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = map(str, [sys.executable, "-m", "pmm_edge", "train", tiny_dataset, "--out", folder, *TINY])
    # A limit on the size of files stands for a full disk: both fail in the write.
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20 << 20, 20 << 20))
    ended = subprocess.run([*command], capture_output=True, text=True, preexec_fn=limit, check=False)
    assert ended.returncode == 2, ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("error: cannot write")
    assert str(folder) in last
    assert not list(folder.glob("*.pt")) + list(folder.glob(".*"))
