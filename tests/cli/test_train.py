"""`pmm train` as a user meets it: results, and one clear line for everything that can be wrong."""

import json
import resource
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from pmm_edge.files import decode_toml
from pmm_edge.runs import AboutRun, new_run_folder
from pmm_edge.trainer.config import choose_config

TINY = [
    "--height", 96, "--width", 64, "--epochs", 1, "--batch", 8, "--erase-size", 8, "--device", "cpu",
]  # fmt: skip


def test_a_run_prints_its_figures_and_its_folder(pmm, tiny_dataset, tmp_path):
    result = pmm("train", tiny_dataset, "--out", tmp_path / "run", *TINY, "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed["finished"] and 0 < printed["best"]["mAP"] <= 1
    assert (tmp_path / "run" / "best.pt").is_file()
    assert "pmm export" in result.stderr


def test_print_config_prints_toml_that_repeats_the_run(pmm, tmp_path):
    printed = pmm("train", "--preset", "market1501", "--epochs", 7, "--print-config").stdout
    (tmp_path / "run.toml").write_text(printed)
    again = pmm("train", "--config", tmp_path / "run.toml", "--print-config").stdout
    assert again == printed and "epochs = 7" in printed


def test_print_config_names_its_preset_the_default_too(pmm, tmp_path):
    default = pmm("train", "--print-config").stdout
    assert decode_toml(dict, default, "it")["preset"] == "quick"
    (tmp_path / "run.toml").write_text("epochs = 7\n")
    printed = pmm("train", "--config", tmp_path / "run.toml", "--print-config").stdout
    assert printed == default.replace("epochs = 36", "epochs = 7"), "a file without a preset has the same default"


def test_print_config_prints_every_path_as_it_is(pmm):
    path = "/weights/" + "a long name " * 15 + '/:smile:/[bold]\t"x".pth'
    printed = pmm("train", "--backbone-weights", path, "--print-config").stdout
    assert decode_toml(dict, printed, "it")["backbone_weights"] == path


def test_print_config_of_a_run_prints_its_settings_and_trains_nothing(pmm, tiny_dataset, tmp_path):
    folder = new_run_folder(AboutRun("quick", str(tiny_dataset), "0"), tmp_path / "run")
    settings = choose_config("quick", settings={"epochs": 3, "height": 96, "device": "cpu"}).to_toml()
    (folder / "config.toml").write_text(settings)
    before = sorted(folder.iterdir())
    result = pmm("train", "--resume", folder, "--print-config")
    assert result.exit_code == 0 and result.stdout == settings
    assert sorted(folder.iterdir()) == before
    result = pmm("train", "--resume", tmp_path, "--print-config")
    assert result.exit_code == 2 and f"{tmp_path} is not a run folder" in result.stderr and not result.stdout


@pytest.fixture
def data(tiny_dataset, tmp_path):
    return shutil.copytree(tiny_dataset, tmp_path / "data")


def missing(data: Path) -> None:
    shutil.rmtree(data)


def empty(data: Path) -> None:
    shutil.rmtree(data)
    data.mkdir()


def other_layout(data: Path) -> None:
    (data / "bounding_box_train").rename(data / "train")


def no_images(data: Path) -> None:
    shutil.rmtree(data / "query")
    (data / "query").mkdir()


def unparsable_name(data: Path) -> None:
    next((data / "bounding_box_train").iterdir()).rename(data / "bounding_box_train" / "holiday.jpg")


def truncated(data: Path) -> None:
    image = sorted((data / "query").iterdir())[0]  # one in training is passed over, see test_options.py
    image.write_bytes(image.read_bytes()[:400])


def one_identity(data: Path) -> None:
    for path in (data / "bounding_box_train").iterdir():
        if not path.name.startswith("0001"):
            path.unlink()


def one_camera(data: Path) -> None:
    for folder in ("query", "bounding_box_test"):
        for path in (data / folder).iterdir():
            if "_c1" not in path.name:
                path.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (missing, "is not a folder"),
        (empty, "not a data set"),
        (other_layout, "has no folder bounding_box_train"),
        (no_images, "query contains no images"),
        (unparsable_name, "holiday.jpg has no identity"),
        (truncated, "cannot read image"),
        (one_identity, "has 1 identities. Training needs at least two"),
        (one_camera, "from one camera"),
    ],
)
def test_data_that_cannot_be_used(pmm, data, tmp_path, spoil, message):
    spoil(data)
    result = pmm("train", data, "--out", tmp_path / "run", *TINY)
    assert result.exit_code == 2
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and message in line and str(data) in line
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("run/*.pt")), "no checkpoint under a final name"


def test_an_output_folder_that_cannot_be_written(pmm, tiny_dataset, tmp_path):
    (tmp_path / "file").touch()
    result = pmm("train", tiny_dataset, "--out", tmp_path / "file" / "run", *TINY)
    assert result.exit_code == 2 and f"cannot write {tmp_path}/file/run" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mix-block-size", "3x2", "--height", 100], "Choose a height that is a multiple of 48 (such as 96 or 144)"),
        (["--device", "cuda:63"], "cuda:63"),
        (["--device", "tpu9"], "unknown device"),
        (["--backbone", "vgg"], "Choose resnet10"),
        (["--backbone-weights", "/nowhere.pth"], "backbone weights /nowhere.pth do not exist"),
        (["--backbone-weights", "imagnet"], "Did you mean 'imagenet'"),
        (["--precision", "fp16"], "precision fp16 trains on a GPU only. Choose --precision bf16 or fp32"),
        (["--batch", 7], "multiple of 2"),
        (["--preset", "quik"], "Did you mean 'quick'"),
        (["--resume", "runs"], "--resume goes on with a run's own settings"),
    ],
)
def test_wrong_use(pmm, tiny_dataset, tmp_path, arguments, message):
    result = pmm("train", tiny_dataset, "--out", tmp_path / "run", *TINY, *arguments)
    assert result.exit_code == 2 and message in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_one_clear_line_and_leaves_no_part_of_a_checkpoint(tiny_dataset, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "pmm_edge.cli", "train", tiny_dataset, "--out", folder, *TINY]
    # A limit on the size of files stands for a disk that is full: both fail in the write.
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20 << 20, 20 << 20))
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, preexec_fn=limit, check=False)
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: cannot write") and "no space left" in line
    assert not list(folder.glob("*.pt")) and not list(folder.glob(".*"))
