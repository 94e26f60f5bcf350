"""`pmm embed` writes rows that can be joined to their images, and says what it left out."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import pmm_edge
from pmm_edge.data.dataset import read


def test_a_data_set(pmm: Callable, tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.npz"
    ended = pmm("embed", tiny_onnx, tiny_dataset, "-o", out, "--batch", "5", "--device", "cpu", "--json")
    assert ended.exit_code == 0, ended.stderr
    printed = json.loads(ended.stdout)
    assert (printed["rows"], printed["embedding_size"], printed["skipped"]) == (36, 1536, [])
    assert (printed["backend"], printed["source"]) == ("onnxruntime", "market-layout")
    with np.load(out) as file:
        query = read(tiny_dataset).query
        expected = pmm_edge.runtime.embed_files(pmm_edge.load(tiny_onnx, "cpu"), query.paths).embeddings
        np.testing.assert_allclose(file["embeddings"][file["split"] == "query"], expected, rtol=1e-4, atol=1e-4)
        assert [tiny_dataset / name for name in file["paths"][:12]] == query.paths


def bad_folder(root: Path, tiny_dataset: Path, good: int, bad: int) -> Path:
    root.mkdir()
    image = next((tiny_dataset / "query").iterdir()).read_bytes()
    for number in range(good + bad):
        (root / f"{number:03d}:x:.jpg").write_bytes(image if number < good else image[:300])
    return root


def test_bad_images_are_skipped_and_counted(pmm: Callable, tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    folder = bad_folder(tmp_path / "crops", tiny_dataset, good=2, bad=23)
    ended = pmm("embed", tiny_onnx, folder, "-o", tmp_path / "e.npz")
    assert ended.exit_code == 0, ended.stderr
    assert "2 × 1,536 float32 of folder, 23 skipped" in ended.stdout
    assert f"skipped: {folder / '002:x:.jpg'}: " in ended.stderr
    assert ended.stderr.count("skipped: ") == 21
    assert "and 3 more; --json names them all" in ended.stderr
    assert "images/s end to end in onnxruntime" in ended.stderr
    assert len(np.load(tmp_path / "e.npz")["paths"]) == 2


def test_no_readable_image_is_exit_code_1_and_no_file(
    pmm: Callable, tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    folder = bad_folder(tmp_path / "crops", tiny_dataset, good=0, bad=2)
    ended = pmm("embed", tiny_onnx, folder, "-o", tmp_path / "e.npz", "--json")
    assert ended.exit_code == 1
    assert str(folder) in ended.stderr
    assert not (tmp_path / "e.npz").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "e.csv"], "must end in .npz or .parquet"),
        (["--batch", "0"], "a batch of 0 images"),
        (["--layout", "market"], "unknown layout market"),
    ],
)
def test_bad_values(
    arguments: list[str],
    message: str,
    pmm: Callable,
    tiny_onnx: Path,
    tiny_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = pmm("embed", tiny_onnx, tiny_dataset, *arguments)
    assert ended.exit_code == 2
    assert message in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_told_before_anything_is_embedded(
    pmm: Callable, tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("pmm_edge.runtime.load", None)
    ended = pmm("embed", tiny_onnx, tiny_dataset, "-o", tmp_path / "file" / "x.npz")
    assert ended.exit_code == 2
    assert f"cannot write {tmp_path / 'file' / 'x.npz'}: {tmp_path / 'file'} is a file" in ended.stderr


def test_an_edge_box_embeds_with_the_base_dependencies_alone(
    tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    script = """
import sys
for absent in ("torch", "torchvision", "onnx", "onnxscript", "safetensors", "pyarrow", "matplotlib", "tensorboard"):
    sys.modules[absent] = None
from pmm_edge.cli import main
main()
"""
    command = [sys.executable, "-c", script, "embed", tiny_onnx, tiny_dataset / "query", "-o"]
    ended = subprocess.run([*command, tmp_path / "e.npz"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert np.load(tmp_path / "e.npz")["embeddings"].shape == (12, 1536)
    ended = subprocess.run([*command, tmp_path / "e.parquet"], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "requires pyarrow, which is not installed. pip install 'pmm-edge[parquet]'" in ended.stderr
