"""The results of `pmm train`, `export`, `eval`, `embed`, `visualize`, `data` and `synth`."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import msgspec
import numpy as np
import pytest
from color_network import color_network
from PIL import Image

import pmm_edge
from pmm_edge.bench.evaluation import evaluate_model
from pmm_edge.errors import OutputError
from pmm_edge.render import bench_command
from pmm_edge.retrieval.distances import unit_length
from pmm_edge.runs import AboutRun, new_run_folder
from pmm_edge.trainer.config import choose_config

SMALL = ["--train-identities", 2, "--test-identities", 1, "--cameras", 2, "--images", 2, "--workers", 1]
TINY = ["--height", 96, "--width", 64, "--epochs", 1, "--batch", 8, "--erase-size", 8, "--device", "cpu"]


def test_ctrl_c_is_one_line_and_leaves_no_file(
    pmm: Callable, tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["pmm_edge.runtime.embed_files"], "ahead", Mock(side_effect=KeyboardInterrupt))
    for arguments in (("embed", "-o", tmp_path / "e.npz"), ("eval", "--features", tmp_path / "e.npz")):
        ended = pmm(arguments[0], tiny_onnx, tiny_dataset, *arguments[1:])
        assert ended.exit_code == 130
        assert "interrupted" in ended.stderr.strip().splitlines()[-1]
        assert not (tmp_path / "e.npz").exists()


@pytest.mark.torch
def test_a_run(pmm: Callable, tiny_dataset: Path, tmp_path: Path) -> None:
    printed = pmm("train", tiny_dataset, "-o", tmp_path / "run", *TINY, "--json").json
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
    settings = msgspec.toml.decode(printed)
    assert (settings["preset"], settings["epochs"], settings["backbone_weights"]) == ("market1501", 7, path)
    (tmp_path / "run.toml").write_text(printed)
    assert pmm("train", "--config", tmp_path / "run.toml", "--print-config").stdout == printed
    assert msgspec.toml.decode(pmm("train", "--print-config").stdout)["preset"] == "quick"


def test_print_config_of_a_run_trains_nothing(pmm: Callable, run: Path) -> None:
    settings = choose_config("quick", settings={"epochs": 3, "device": "cpu"}).to_toml()
    (run / "config.toml").write_text(settings)
    before = sorted(run.iterdir())
    assert pmm("train", "--resume", run, "--print-config").stdout == settings
    assert sorted(run.iterdir()) == before


@pytest.mark.torch
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


@pytest.mark.torch
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


def test_the_newest_run_is_exported_into_its_folder(
    pmm: Callable, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("old", "new")):
        run = new_run_folder(AboutRun(name, "data", "0"), Path("runs") / name)
        shutil.copy(tiny_checkpoint, run / "best.pt")
        os.utime(run / "best.pt", (1e9 - age, 1e9 - age))
    ended = pmm("export", "--input-form", "raw", "--safetensors", "--deepstream", "tracker", "--json")
    for shown in ("the newest run is runs/new\n", "pmm bench runs/new/export/model-raw.onnx "):
        assert shown in ended.stderr
    lone = Mock(checkpoint=Path("b.pt"), files=[Mock(path=Path("a b.onnx"))])
    assert bench_command(lone) == "pmm bench 'a b.onnx' --reference b.pt --data DATA"
    printed = ended.json
    assert printed["checkpoint"] == "runs/new/best.pt"
    paths = [item["path"] for item in printed["files"]]
    assert paths == ["runs/new/export/model-raw.onnx", "runs/new/export/model-raw.safetensors"]
    assert [pmm_edge.load(path, "cpu").spec.input.form for path in paths] == ["raw", "normalized"]
    assert printed["bundles"] == {"deepstream": "tracker"}
    shown = pmm("export", paths[0], "--deepstream", "other").ok
    assert "other" in shown.stderr


def test_an_engine_that_cannot_be_built_does_not_hide_the_file(
    pmm: Callable, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    out = tmp_path / "model.onnx"
    ended = pmm("export", tiny_checkpoint, "-o", out, "--trt", "--batch-profile", "1,4,8")
    assert ended.exit_code == 1
    assert out.is_file()
    for shown in (str(tmp_path), "model.onnx", "fp32", "uint8", "1.000000"):
        assert shown in ended.stdout
    last = ended.stderr.strip().splitlines()[-1]
    assert str(out) in last
    assert "pmm export model.onnx --trt --batch-profile 1,4,8" in last
    full = Mock(side_effect=OutputError("cannot write tracker: No space left on device"))
    monkeypatch.setattr("pmm_edge.export.bundles.deepstream_bundle", full)
    raw = color_network(tmp_path / "raw.onnx", form="raw")
    ended = pmm("export", raw, "--trt", "--deepstream", tmp_path / "tracker", "--json")
    assert ended.exit_code == 2
    assert len(json.loads(ended.stdout)["failures"]) == 2
    first, last = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert "TensorRT" in first
    assert last == "error: cannot write tracker: No space left on device"


FIGURES = {"Rank-1", "Rank-5", "Rank-10", "mAP", "mINP", "mAP@50"}


def test_eval(pmm: Callable, tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    results = evaluate_model(tiny_onnx, [tiny_dataset], rerank=True, flip=True, device="cpu")[0].results
    features = tmp_path / "new" / "features.npz"
    arguments = ("eval", tiny_onnx, tiny_dataset, "--device", "cpu", "--rerank", "--flip")
    printed = pmm(*arguments, "--features", features, "--json").json
    assert (printed["backend"], printed["queries"], printed["gallery"]) == ("onnxruntime", 12, 12)
    assert [row["name"] for row in printed["rows"]] == ["plain", "flip", "re-ranking", "flip + re-ranking"]
    mean_aps = [result.mAP for result in results.values()]
    assert [row["figures"]["mAP"] for row in printed["rows"]] == pytest.approx(mean_aps)
    assert printed["figures"] == printed["rows"][0]["figures"]
    assert set(printed["figures"]) == FIGURES
    assert printed["figures"]["Rank-5"] == pytest.approx(results["plain"].rank(5))
    with np.load(features) as saved:
        assert saved["query_features"].shape == (12, 1536)
        labels = [saved[f"{side}_{what}"] for what in ("pids", "camids") for side in ("query", "gallery")]
        for suffix, way in (("", "plain"), ("_flip", "flip")):
            both = (saved[f"{side}_features{suffix}"] for side in ("query", "gallery"))
            assert pmm_edge.evaluate(*both, *labels).mAP == pytest.approx(results[way].mAP)
        by_cosine = pmm(*arguments, "--distance", "cosine", "--json").json
        assert (printed["distance"], by_cosine["distance"]) == ("euclidean", "cosine")
        unit = (unit_length(saved[f"{side}_features_flip"]) for side in ("query", "gallery"))
        expected = pmm_edge.evaluate(*unit, *labels, rerank=True).mAP
        assert by_cosine["rows"][3]["figures"]["mAP"] == pytest.approx(expected)
    assert "cosine" in pmm("eval", tiny_onnx, tiny_dataset, "--distance", "manhattan").error
    shown = pmm(*arguments, "--layout", "market1501").stdout
    assert "tiny: 12 queries" in shown  # not Market-1501, whatever --layout says
    for result in results.values():
        assert f" {100 * result.mAP:.1f} " in shown


def test_tracklets(pmm: Callable, tiny_onnx: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "mars", tmp_path / "e.npz"
    assert pmm("synth", data, *SMALL, "--frames", 3).ok
    arguments = ("eval", tiny_onnx, data, "--device", "cpu", "--tracklets")
    printed = pmm(*arguments, "--json").json
    assert [row["name"] for row in printed["rows"]] == ["plain", "tracklets"]
    assert printed["rows"][0]["queries"] == 3 * printed["rows"][1]["queries"] == printed["queries"]
    shown = pmm(*arguments).stdout
    assert f"{printed['queries'] // 3} and {printed['gallery'] // 3} tracklets" in shown
    found = pmm("embed", tiny_onnx, data / "bbox_test", "-o", out, "--tracklets", "--device", "cpu", "--json").json
    people = sorted(path.name for path in (data / "bbox_test").iterdir())
    with np.load(out) as file:
        assert file["paths"].tolist() == people
        assert found["rows"] == len(people) == len(file["embeddings"])


def test_the_cmc_is_drawn(pmm: Callable, tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    odd = shutil.copy(tiny_onnx, tmp_path / "a$_{b$[x].onnx")  # mathematics to matplotlib, markup to rich
    plot = tmp_path / "cmc.png"
    ended = pmm("eval", odd, tiny_dataset, "--cmc", plot).ok
    assert "a$_{b$[x].onnx" in ended.stdout
    with Image.open(plot) as image:
        assert len(image.convert("RGB").getcolors(image.width * image.height)) > 10  # not blank


def test_embed_a_data_set(pmm: Callable, tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.npz"
    printed = pmm("embed", tiny_onnx, tiny_dataset, "-o", out, "--batch", "5", "--device", "cpu", "--json").json
    assert (printed["rows"], printed["embedding_size"], printed["skipped"]) == (36, 1536, [])
    assert (printed["backend"], printed["source"], printed["written"]) == ("onnxruntime", "market-layout", str(out))
    with np.load(out) as file:
        assert file["embeddings"].shape == (36, 1536)
        assert [tiny_dataset / name for name in file["paths"][:12]] == sorted((tiny_dataset / "query").iterdir())


def test_unreadable_images_are_skipped(pmm: Callable, tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "crops"
    folder.mkdir()
    image = next((tiny_dataset / "query").iterdir()).read_bytes()
    for number in range(25):  # these names are emoji to rich
        (folder / f"{number:03d}:x:.jpg").write_bytes(image if number < 2 else image[:300])
    ended = pmm("embed", tiny_onnx, folder, "-o", tmp_path / "e.npz").ok
    assert "2 × 1,536" in ended.stdout
    assert "23 skipped" in ended.stdout
    assert f"skipped: {folder / '002:x:.jpg'}: " in ended.stderr
    assert ended.stderr.count("skipped: ") == 21
    assert len(np.load(tmp_path / "e.npz")["paths"]) == 2


def test_an_edge_box_needs_the_base_dependencies_alone(
    pmm_without: Callable, tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    run = partial(pmm_without, "torch torchvision onnx onnxscript safetensors pyarrow tensorboard")
    assert run("embed", tiny_onnx, tiny_dataset / "query", "-o", tmp_path / "e.npz").ok
    assert np.load(tmp_path / "e.npz")["embeddings"].shape == (12, 1536)
    ended = run("embed", tiny_onnx, tiny_dataset / "query", "-o", tmp_path / "e.parquet")
    assert ended.exit_code == 2
    assert ".[parquet]" in ended.stderr
    options = ("--data", tiny_dataset, "--out", tmp_path / "g", "--top", 3, "--images", 2)
    assert run("visualize", tiny_onnx, "--what", "galleries", *options).ok
    assert (tmp_path / "g" / "galleries.png").is_file()


def test_visualize_the_newest_run(pmm: Callable, run: Path) -> None:
    ended = pmm("visualize", "--device", "cpu", "--images", 2).ok
    for kind in ("cams", "galleries", "mixing"):
        with Image.open(run / "pictures" / f"{kind}.png") as image:
            assert len(image.convert("RGB").getcolors(image.width * image.height)) > 1000  # not blank
        assert f"{kind}.png" in ended.stdout
    measured = json.loads((run / "pictures" / "overlap.json").read_text())
    assert f"{measured['mean']:.3f}" in ended.stdout


def test_counts(pmm: Callable, tiny_dataset: Path) -> None:
    ended = pmm("data", tiny_dataset).ok
    row = next(line for line in ended.stdout.splitlines() if "gallery" in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == ["gallery", "4", "3", "12", "0", "0"]
    facts = pmm("data", tiny_dataset, "--json").json
    assert (facts["layout"], facts["expected"], facts["unreadable"]) == ("market-layout", None, None)
    assert facts["splits"]["query"] == {"identities": 4, "cameras": 3, "images": 12, "distractors": 0, "junk": 0}


def test_decode_names_unreadable_files(pmm: Callable, tiny_dataset: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(tiny_dataset, tmp_path / "tiny"))
    assert pmm("data", data, "--decode").exit_code == 0
    broken = sorted((data / "query").iterdir()) + sorted((data / "bounding_box_test").iterdir())
    for path in broken:
        path.write_bytes(path.read_bytes()[:300])
    ended = pmm("data", data, "--decode")
    assert ended.exit_code == 1
    assert ended.stderr.count("unreadable: ") == 21
    assert f"{broken[0]}: " in ended.stderr
    assert "24 of 36" in ended.stderr.splitlines()[-1]
    ended = pmm("data", data, "--decode", "--json")
    assert ended.exit_code == 1
    assert [item["path"] for item in json.loads(ended.stdout)["unreadable"]] == [str(path) for path in broken]


def test_synth(pmm: Callable, tmp_path: Path) -> None:
    folder, sheet = tmp_path / "set", tmp_path / "pictures" / "sheet.jpg"
    printed = pmm("synth", folder, *SMALL, "--sheet", sheet, "--json").json
    assert (printed["folder"], printed["config"]["train_identities"]) == (str(folder), 2)
    assert printed["images"]["bounding_box_train"] == len(list((folder / "bounding_box_train").iterdir())) == 8
    with Image.open(sheet) as image:
        assert image.format == "JPEG"
    assert "bounding_box_test" in pmm("synth", tmp_path / "other", *SMALL).stdout


def test_eval_on_several_data_sets(pmm: Callable, tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    people = tmp_path / "people"
    for path in [*tiny_dataset.glob("query/*"), *tiny_dataset.glob("bounding_box_test/*")]:
        (people / path.name[:4]).mkdir(parents=True, exist_ok=True)
        (people / path.name[:4] / f"{path.parent.name}{path.name[4:]}").symlink_to(path)
    arguments = ("eval", tiny_onnx, tiny_dataset, people, "--device", "cpu")
    both = pmm(*arguments, "--json")
    alone = pmm("eval", tiny_onnx, tiny_dataset, "--device", "cpu", "--json").json
    assert both.json[0] == alone and [one["data"] for one in both.json] == [str(tiny_dataset), str(people)]
    assert (both.json[1]["queries"], both.json[1]["gallery"]) == (6, 6)  # two people of three cameras with two images
    assert str(people) in both.stderr  # the split was chosen
    shown = pmm(*arguments, "--flip").ok.stdout
    assert [shown.count(name) for name in ("tiny ", "people ", "12 queries, 12 ", "6 queries, 6 ", "+ flip")] == [
        *(2, 2, 1, 1, 2)
    ]
    assert "--cmc" in pmm(*arguments, "--cmc", tmp_path / "cmc.png").error
    assert "nowhere" in pmm(*arguments, tmp_path / "nowhere").error
