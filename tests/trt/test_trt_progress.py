"""TensorRT's nested phases as one bar, and Ctrl-C that ends a build."""

from pathlib import Path

import double
import pytest

from pmm_edge.export.tensorrt import build_engine


def test_nested_phases_are_one_bar_in_percent(gpu: double.FakeGpu, onnx: Path) -> None:
    heard: list[tuple[str, int, int, str]] = []
    build_engine(onnx, onnx.with_suffix(".engine"), report=lambda *told: heard.append((*told, "")[:4]))
    assert heard == [
        ("model.engine: Building", 0, 100, ""),
        ("model.engine: Building", 0, 100, "Timing"),
        ("model.engine: Building", 12, 100, "Timing"),
        ("model.engine: Building", 25, 100, "Timing"),
        ("model.engine: Building", 37, 100, "Timing"),
        ("model.engine: Building", 50, 100, ""),
        ("model.engine: Building", 100, 100, ""),
    ]


def test_an_interrupt_cancels_the_build_and_arrives(gpu: double.FakeGpu, onnx: Path) -> None:
    def report(what: str, done: int, total: int, detail: str = "") -> None:
        if done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(onnx, onnx.with_suffix(".engine"), report=report)
    assert [path.name for path in onnx.parent.iterdir()] == ["model.onnx"]
