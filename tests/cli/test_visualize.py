"""`pmm visualize` draws what it is pointed at, and says in one line what it cannot draw."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from pmm_edge.model import Checkpoint, build_model, load_checkpoint, save_checkpoint
from pmm_edge.pictures.attention import cam_grid
from pmm_edge.runs import AboutRun, new_run_folder
from pmm_edge.spec import InputSpec, ModelSpec


@pytest.fixture
def run(tiny_checkpoint: Path, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run in runs/ of the current folder."""
    monkeypatch.chdir(tmp_path)
    folder = new_run_folder(AboutRun("one", str(tiny_dataset), "0"), Path("runs/one"))
    shutil.copy(tiny_checkpoint, folder / "best.pt")
    return folder


@pytest.fixture
def bdb(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = build_model("bdb", num_classes=4, backbone="resnet18")
    spec = ModelSpec("bdb", "resnet18", 4, InputSpec(96, 64), 1536, network.stages, mix="none")
    path = tmp_path / "bdb" / "best.pt"
    save_checkpoint(path, Checkpoint(spec, network.state_dict()))
    return path


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        return image


def test_without_arguments_all_pictures_of_the_newest_run(pmm: Callable, run: Path) -> None:
    ended = pmm("visualize", "--device", "cpu")
    assert ended.exit_code == 0, ended.stderr
    for kind in ("cams", "galleries", "mixing"):
        image = opened(run / "pictures" / f"{kind}.png")
        assert min(image.size) > 500
        assert len(image.convert("RGB").getcolors(image.width * image.height)) > 1000  # not blank
        assert f"{kind}.png" in ended.stdout
    (measured,) = json.loads((run / "pictures" / "overlap.json").read_text())
    assert measured["images"] == 12  # the queries
    assert set(measured["pairs"]) == {"I-II", "I-III", "II-III"}
    assert f"{measured['mean']:.3f}" in ended.stdout
    assert "no " not in ended.stderr  # nothing was left out


def test_the_seed_decides_what_is_drawn(pmm: Callable, run: Path) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert pmm("visualize", "mixing", "--images", 2, "--seed", seed, "--out", folder).exit_code == 0
    first, again, other = (opened(Path(folder, "mixing.png")).tobytes() for folder in "abc")
    assert first == again
    assert first != other


@pytest.mark.parametrize("kind", ["folder", "list", "image"])
def test_cams_of_any_images(pmm: Callable, run: Path, tiny_dataset: Path, tmp_path: Path, kind: str) -> None:
    crops = tmp_path / "crops"
    (crops / "deep").mkdir(parents=True)
    for name in ("one.png", "deep/two.jpg"):
        Image.open(next((tiny_dataset / "query").iterdir())).save(crops / name)
    (tmp_path / "list.txt").write_text("crops/one.png\ncrops/deep/two.jpg\n")
    source = {"folder": crops, "list": tmp_path / "list.txt", "image": crops / "one.png"}[kind]
    ended = pmm("visualize", "cams", "--data", source, "--out", "new/pictures", "--json")
    assert ended.exit_code == 0, ended.stderr
    printed = json.loads(ended.stdout)
    assert printed["files"] == {"cams": "new/pictures/cams.png"}
    assert printed["overlap"][0]["images"] == (1 if kind == "image" else 2)
    opened(tmp_path / "new/pictures/cams.png")

    everything = pmm("visualize", "--data", source, "--out", "rest")
    assert everything.exit_code == 0
    assert "no galleries:" in everything.stderr
    assert [path.name for path in Path("rest").glob("*.png")] == ["cams.png"]


def test_methods_side_by_side(pmm: Callable, run: Path, bdb: Path, tiny_dataset: Path) -> None:
    ended = pmm("visualize", "cams", bdb, run, "--data", tiny_dataset, "--out", "both", "--json")
    assert ended.exit_code == 0, ended.stderr
    printed = json.loads(ended.stdout)
    assert [len(model["pairs"]) for model in printed["overlap"]] == [1, 3]
    paths = sorted((tiny_dataset / "query").iterdir())[:2]
    assert cam_grid([bdb, run / "best.pt"], paths, device="cpu").width > cam_grid(bdb, paths[:1], device="cpu").width


def test_a_network_that_mixes_nothing_gets_the_other_pictures(pmm: Callable, bdb: Path, tiny_dataset: Path) -> None:
    ended = pmm("visualize", "all", bdb, "--data", tiny_dataset, "--out", bdb.parent / "p")
    assert ended.exit_code == 0
    assert "no mixing:" in ended.stderr
    assert sorted(path.name for path in (bdb.parent / "p").glob("*.png")) == ["cams.png", "galleries.png"]


def test_galleries_of_an_export_need_no_torch(tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    without = "import sys; sys.modules['torch'] = None; from pmm_edge.cli import main; main()"
    options = ["--data", tiny_dataset, "--out", tmp_path / "g", "--top", 3, "--images", 2]
    command = [sys.executable, "-c", without, "visualize", "galleries", tiny_onnx, *options]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    opened(tmp_path / "g/galleries.png")


def test_the_true_class_of_training_images(pmm: Callable, run: Path, tmp_path: Path, tiny_dataset: Path) -> None:
    ended = pmm("visualize", "cams", "--true-class", "--out", "true", "--json")
    assert ended.exit_code == 0, ended.stderr
    assert json.loads(ended.stdout)["overlap"][0]["images"] == 12  # those of training
    assert "is no data set: who is on its images is not known" in refused(
        pmm, "cams", "--true-class", "--data", tiny_dataset / "query"
    )
    other = shutil.copytree(tiny_dataset, tmp_path / "other")
    for path in (other / "bounding_box_train").glob("0001*"):
        path.unlink()
    assert "knows 4 people, the training set of" in refused(pmm, "cams", "--true-class", "--data", other)


def refused(pmm: Callable, *arguments: object) -> str:
    ended = pmm("visualize", *arguments)
    assert ended.exit_code == 2
    assert ended.stdout == ""
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert ended.stderr.strip().endswith(errors[0])
    return errors[0]


def test_models_that_cannot_be_drawn(pmm: Callable, run: Path, tiny_onnx: Path, tiny_dataset: Path) -> None:
    assert "is an export without classifiers" in refused(pmm, "cams", tiny_onnx, "--data", tiny_dataset)
    assert "Name the checkpoint" in refused(pmm, "mixing", tiny_onnx, "--data", tiny_dataset)
    assert "missing.pt does not exist" in refused(pmm, "all", "missing.pt", "--data", tiny_dataset)
    assert "are drawn of one model, 2 were named" in refused(pmm, "galleries", run, run)
    shutil.copy(run / "best.pt", "lone.pt")
    assert "does not say which data set it belongs to. Name one" in refused(pmm, "all", "lone.pt")
    assert "unknown device 'npu'" in refused(pmm, "cams", "--device", "npu")
    shutil.rmtree("runs")
    assert "Run pmm train first" in refused(pmm)


def test_images_that_cannot_be_drawn(pmm: Callable, run: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    assert "nowhere does not exist" in refused(pmm, "cams", "--data", "nowhere")
    (tmp_path / "empty").mkdir()
    assert "names no images" in refused(pmm, "cams", "--data", "empty")
    assert "is no data set: galleries must know who" in refused(pmm, "galleries", "--data", tiny_dataset / "query")
    assert "is no data set: the mixing must know who" in refused(pmm, "mixing", "--data", tiny_dataset / "query")
    for count in (0, 101):
        assert f"{count} images, 10 hits cannot be drawn. Choose 1 to 100" in refused(pmm, "--images", count)
    broken = shutil.copytree(tiny_dataset, tmp_path / "broken")
    image = next((broken / "query").iterdir())
    image.write_bytes(image.read_bytes()[:400])
    assert f"cannot read image {image}" in refused(pmm, "cams", "--data", broken)
    Path("file").touch()
    assert "cannot write file/pictures" in refused(pmm, "--out", "file/pictures")
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_query_without_an_answer_has_no_gallery(pmm: Callable, run: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(tiny_dataset, tmp_path / "alone")
    for path in (alone / "bounding_box_test").iterdir():
        path.rename(path.with_name(path.name.replace("010", "020", 1)))
    assert "has a match in the gallery from another camera" in refused(pmm, "galleries", "--data", alone)


def test_the_checkpoint_is_not_changed(pmm: Callable, run: Path, tiny_checkpoint: Path) -> None:
    assert pmm("visualize", "mixing").exit_code == 0
    assert (run / "best.pt").read_bytes() == tiny_checkpoint.read_bytes()
    assert load_checkpoint(run / "best.pt").spec.num_classes == 4
