"""`pmm eval` judges any model that loads, and names what it cannot use."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import pmm_edge
from pmm_edge.bench import evaluate_model
from pmm_edge.data.dataset import scan


def test_figures_of_every_kind_of_model(
    pmm: Callable, tiny_onnx: Path, tiny_checkpoint: Path, tiny_dataset: Path
) -> None:
    expected = evaluate_model(pmm_edge.load(tiny_checkpoint, "cpu"), scan(tiny_dataset))
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
    assert f"{tmp_path / 'none'} is no folder" in refused(pmm, tiny_onnx, tmp_path / "none")
    assert "is not in the layout of Market-1501" in refused(pmm, tiny_onnx, tmp_path)
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        (tmp_path / "empty" / folder).mkdir(parents=True)
    assert "holds no images" in refused(pmm, tiny_onnx, tmp_path / "empty")
    broken = shutil.copytree(tiny_dataset, tmp_path / "broken")
    image = next((broken / "query").iterdir())
    image.write_bytes(image.read_bytes()[:400])
    assert f"cannot read image {image}" in refused(pmm, tiny_onnx, broken)


def test_models_that_cannot_be_used(pmm: Callable, tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    assert "missing.onnx does not exist" in refused(pmm, tmp_path / "missing.onnx", tiny_dataset)
    assert "Load the .onnx" in refused(pmm, tmp_path / "model.engine", tiny_dataset)
    assert "device 'npu' is unknown" in refused(pmm, tiny_onnx, tiny_dataset, "--device", "npu")
