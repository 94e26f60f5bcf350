"""`pmm eval` judges any model that loads, and names what it cannot use."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from pmm_edge.bench.evaluation import evaluate_model


def test_figures_of_every_kind_of_model(
    pmm: Callable, tiny_onnx: Path, tiny_checkpoint: Path, tiny_dataset: Path
) -> None:
    expected = evaluate_model(tiny_checkpoint, tiny_dataset, device="cpu").rows[0].result
    for model, backend in ((tiny_onnx, "onnxruntime"), (tiny_checkpoint, "torch")):
        printed = json.loads(pmm("eval", model, tiny_dataset, "--device", "cpu", "--json").stdout)
        assert printed["backend"] == backend
        assert (printed["queries"], printed["gallery"]) == (12, 12)
        assert printed["figures"] == pytest.approx(
            {
                "Rank-1": expected.rank(1),
                "Rank-5": expected.rank(5),
                "Rank-10": expected.rank(10),
                "mAP": expected.mAP,
                "mINP": expected.mINP,
                "mAP@50": expected.mAP_at_50,
            }
        )
    table = pmm("eval", tiny_onnx, tiny_dataset).stdout
    assert "mAP@50" in table
    assert f"{100 * expected.mAP:.1f}" in table


def refused(pmm: Callable, *arguments: object) -> str:
    ended = pmm("eval", *arguments)
    assert ended.exit_code == 2
    assert ended.stdout == ""
    return ended.stderr.strip().splitlines()[-1]


def test_data_that_cannot_be_used(pmm: Callable, tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    assert f"{tmp_path / 'none'} is not a folder" in refused(pmm, tiny_onnx, tmp_path / "none")
    assert "is not a data set" in refused(pmm, tiny_onnx, tmp_path)
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        (tmp_path / "empty" / folder).mkdir(parents=True)
    assert "contains no images" in refused(pmm, tiny_onnx, tmp_path / "empty")
    broken = shutil.copytree(tiny_dataset, tmp_path / "broken")
    image = next((broken / "query").iterdir())
    image.write_bytes(image.read_bytes()[:400])
    assert f"cannot read image {image}" in refused(pmm, tiny_onnx, broken)


def test_models_that_cannot_be_used(pmm: Callable, tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    assert "missing.onnx does not exist" in refused(pmm, tmp_path / "missing.onnx", tiny_dataset)
    assert "model.engine does not exist. Build it here" in refused(pmm, tmp_path / "model.engine", tiny_dataset)
    assert "unknown device 'npu'" in refused(pmm, tiny_onnx, tiny_dataset, "--device", "npu")


def test_every_row_is_printed(pmm: Callable, tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    rows = evaluate_model(tiny_onnx, tiny_dataset, rerank=True, flip=True, device="cpu").rows
    expected = {row.name: row.result for row in rows}
    features = tmp_path / "new" / "features.npz"
    asked = ("eval", tiny_onnx, tiny_dataset, "--device", "cpu", "--rerank", "--flip")
    printed = json.loads(pmm(*asked, "--features", features, "--json").stdout)
    assert {row["name"]: row["figures"]["mAP"] for row in printed["rows"]} == pytest.approx(
        {name: result.mAP for name, result in expected.items()}
    )
    assert [(row["flip"], row["rerank"]) for row in printed["rows"]] == [
        (False, False),
        (True, False),
        (False, True),
        (True, True),
    ]
    assert printed["figures"] == printed["rows"][0]["figures"]
    with np.load(features) as saved:
        assert saved["query_features"].shape == (12, 1536)

    shown = pmm(*asked)
    for name, result in expected.items():
        row = next(
            line
            for line in shown.stdout.splitlines()
            if f"model.onnx{'' if name == 'plain' else f' + {name}'} " in line
        )
        assert f"{100 * result.mAP:.1f}" in row
    assert "cuts each ranking at 50" in shown.stderr


@pytest.mark.parametrize("suffix", [".png", ".SVG"])
def test_the_cmc_is_drawn(pmm: Callable, tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path, suffix: str) -> None:
    odd = shutil.copy(tiny_onnx, tmp_path / "a$_{b$[x].onnx")  # mathematics to matplotlib, markup to rich
    plot = tmp_path / f"cmc{suffix}"
    ended = pmm("eval", odd, tiny_dataset, "--rerank", "--cmc", plot)
    assert ended.exit_code == 0
    assert "a$_{b$[x].onnx + re-ranking" in ended.stdout
    if suffix == ".SVG":
        assert ElementTree.parse(plot).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    else:
        with Image.open(plot) as image:
            assert image.format == "PNG"
            assert min(image.size) >= 600
            assert len(image.convert("RGB").getcolors(image.width * image.height)) > 10  # not blank
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_the_layout_is_passed_on(pmm: Callable, tiny_onnx: Path, tiny_dataset: Path) -> None:
    assert "tiny: 12 queries" in pmm("eval", tiny_onnx, tiny_dataset, "--layout", "market-layout").stdout
    assert "market1501: 12 queries" in pmm("eval", tiny_onnx, tiny_dataset, "--layout", "market1501").stdout
    assert "Did you mean 'market1501'?" in refused(pmm, tiny_onnx, tiny_dataset, "--layout", "market150")


def test_files_that_cannot_be_written(
    pmm: Callable, tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unused(*_: object, **__: object) -> None:
        raise AssertionError("embedded for minutes before the file was looked at")

    monkeypatch.setattr("pmm_edge.bench.evaluation.embed_dataset", unused)
    blocker = tmp_path / "file"
    blocker.write_text("")
    (tmp_path / "folder.npz").mkdir()
    for option, path, reason in (
        ("--cmc", tmp_path / "cmc.jpg", "its name must end in .png or .svg"),
        ("--cmc", tmp_path / "cmc", "its name must end in .png or .svg"),
        ("--cmc", blocker / "cmc.png", f"{blocker} is a file"),
        ("--cmc", blocker / "deeper" / "cmc.svg", f"{blocker} is a file"),
        ("--features", tmp_path / "features.npy", "its name must end in .npz"),
        ("--features", tmp_path / "folder.npz", "is a folder"),
    ):
        assert f"cannot write {path}: " in (line := refused(pmm, tiny_onnx, tiny_dataset, option, path))
        assert reason in line
    monkeypatch.setattr("pmm_edge.bench.charts.find_spec", lambda name: None)
    line = refused(pmm, tiny_onnx, tiny_dataset, "--cmc", tmp_path / "cmc.png")
    assert "matplotlib is missing. pip install 'pmm-edge[train]'" in line
