"""`pmm eval`, `pmm embed` and `pmm visualize`: results of any model that loads, and what they cannot use."""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

import pmm_edge
from pmm_edge.bench.evaluation import evaluate_model
from pmm_edge.data.dataset import read

FIGURES = {"Rank-1", "Rank-5", "Rank-10", "mAP", "mINP", "mAP@50"}


def crops(folder: Path, tiny_dataset: Path, good: int, bad: int) -> Path:
    """A folder with readable images, then unreadable ones; their names are emoji to rich."""
    folder.mkdir()
    image = next((tiny_dataset / "query").iterdir()).read_bytes()
    for number in range(good + bad):
        (folder / f"{number:03d}:x:.jpg").write_bytes(image if number < good else image[:300])
    return folder


def test_eval(pmm: Callable, tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    results = evaluate_model(tiny_onnx, tiny_dataset, rerank=True, flip=True, device="cpu").results
    features = tmp_path / "new" / "features.npz"
    arguments = ("eval", tiny_onnx, tiny_dataset, "--device", "cpu", "--rerank", "--flip")
    printed = json.loads(pmm(*arguments, "--features", features, "--json").stdout)
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
    shown = pmm(*arguments, "--layout", "market1501").stdout
    assert "market1501: 12 queries" in shown
    for way, result in results.items():
        name = "model.onnx" if way == "plain" else rf"model.onnx \+ {way.replace('+', '.')}"
        (line,) = [line for line in shown.splitlines() if re.match(f"│ {name} +│", line)]
        assert f"{100 * result.mAP:.1f}" in line


@pytest.mark.parametrize("suffix", [".png", ".SVG"])
def test_the_cmc_is_drawn(pmm: Callable, tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path, suffix: str) -> None:
    odd = shutil.copy(tiny_onnx, tmp_path / "a$_{b$[x].onnx")  # mathematics to matplotlib, markup to rich
    plot = tmp_path / f"cmc{suffix}"
    ended = pmm("eval", odd, tiny_dataset, "--cmc", plot)
    assert ended.exit_code == 0, ended.stderr
    assert "a$_{b$[x].onnx" in ended.stdout
    if suffix == ".SVG":
        assert ElementTree.parse(plot).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    else:
        with Image.open(plot) as image:
            assert len(image.convert("RGB").getcolors(image.width * image.height)) > 10  # not blank


def test_embed_a_data_set(pmm: Callable, tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.npz"
    ended = pmm("embed", tiny_onnx, tiny_dataset, "-o", out, "--batch", "5", "--device", "cpu", "--json")
    assert ended.exit_code == 0, ended.stderr
    printed = json.loads(ended.stdout)
    assert (printed["rows"], printed["embedding_size"], printed["skipped"]) == (36, 1536, [])
    assert (printed["backend"], printed["source"], printed["written"]) == ("onnxruntime", "market-layout", str(out))
    query = read(tiny_dataset).query
    with np.load(out) as file:
        expected = pmm_edge.embed_files(pmm_edge.load(tiny_onnx, "cpu"), query.paths).embeddings
        np.testing.assert_allclose(file["embeddings"][file["split"] == "query"], expected, rtol=1e-4, atol=1e-4)
        assert [tiny_dataset / name for name in file["paths"][:12]] == query.paths


def test_unreadable_images_are_skipped(pmm: Callable, tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    folder = crops(tmp_path / "crops", tiny_dataset, good=2, bad=23)
    ended = pmm("embed", tiny_onnx, folder, "-o", tmp_path / "e.npz")
    assert ended.exit_code == 0, ended.stderr
    assert "2 × 1,536" in ended.stdout
    assert "23 skipped" in ended.stdout
    assert f"skipped: {folder / '002:x:.jpg'}: " in ended.stderr
    assert ended.stderr.count("skipped: ") == 21
    assert len(np.load(tmp_path / "e.npz")["paths"]) == 2
    none = crops(tmp_path / "none", tiny_dataset, good=0, bad=2)
    ended = pmm("embed", tiny_onnx, none, "-o", tmp_path / "none.npz", "--json")
    assert ended.exit_code == 1
    assert str(none) in ended.stderr
    assert not (tmp_path / "none.npz").exists()


def test_an_edge_box_needs_the_base_dependencies_alone(
    pmm_without: Callable, tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    run = partial(pmm_without, "torch torchvision onnx onnxscript safetensors pyarrow tensorboard")
    ended = run("embed", tiny_onnx, tiny_dataset / "query", "-o", tmp_path / "e.npz")
    assert ended.returncode == 0, ended.stderr
    assert np.load(tmp_path / "e.npz")["embeddings"].shape == (12, 1536)
    ended = run("embed", tiny_onnx, tiny_dataset / "query", "-o", tmp_path / "e.parquet")
    assert ended.returncode == 2
    assert ".[parquet]" in ended.stderr
    options = ("--data", tiny_dataset, "--out", tmp_path / "g", "--top", 3, "--images", 2)
    ended = run("visualize", tiny_onnx, "--what", "galleries", *options)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "g" / "galleries.png").is_file()


def test_visualize_the_newest_run(pmm: Callable, run: Path) -> None:
    ended = pmm("visualize", "--device", "cpu", "--images", 2)
    assert ended.exit_code == 0, ended.stderr
    for kind in ("cams", "galleries", "mixing"):
        with Image.open(run / "pictures" / f"{kind}.png") as image:
            assert len(image.convert("RGB").getcolors(image.width * image.height)) > 1000  # not blank
        assert f"{kind}.png" in ended.stdout
    measured = json.loads((run / "pictures" / "overlap.json").read_text())
    assert f"{measured['mean']:.3f}" in ended.stdout


def test_visualize_any_images(pmm: Callable, run: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    folder = crops(tmp_path / "crops", tiny_dataset, good=2, bad=0)
    ended = pmm("visualize", "--data", folder, "-o", "new/pictures", "--json")
    assert ended.exit_code == 0, ended.stderr
    printed = json.loads(ended.stdout)
    assert printed["files"] == {"cams": "new/pictures/cams.png"}
    assert set(printed["left_out"]) == {"galleries", "mixing"}
    assert printed["overlap"]["images"] == 2
