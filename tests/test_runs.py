"""A model's run says which data set it belongs to, and in which layout that is read."""

from pathlib import Path

import pytest

from pmm_edge.errors import DataError, ModelError
from pmm_edge.runs import AboutRun, data_of, new_run_folder


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
    assert data_of(tmp_path / "model.onnx", tmp_path, "msmt17") == (tmp_path, "msmt17")
    with pytest.raises(ModelError, match=r"model\.onnx does not exist"):
        data_of(tmp_path / "model.onnx")
    (tmp_path / "model.onnx").touch()
    with pytest.raises(DataError, match="--data"):
        data_of(tmp_path / "model.onnx")
