"""A graph is of the precision that it says, or the bench says which it is."""

from pathlib import Path

import broken
import numpy as np
import pytest

from pmm_edge.bench.invariants import precision_failure


@pytest.fixture(scope="module")
def graphs(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same network in each precision."""
    folder = tmp_path_factory.mktemp("precisions")
    noise = np.random.default_rng(0).integers(0, 256, (4, 96, 64, 3), dtype=np.uint8)
    return {
        "fp32": tiny_onnx,
        "fp16": broken.fp16(tiny_onnx, folder / "fp16.onnx"),
        "int8": broken.int8(tiny_onnx, folder / "int8.onnx", "tensorrt", noise),
    }


@pytest.mark.parametrize("claimed", ["fp32", "fp16", "int8"])
def test_only_the_precision_that_a_graph_has_is_believed(claimed: str, graphs: dict[str, Path]) -> None:
    for own, path in graphs.items():
        failure = precision_failure(path, claimed)
        expected = None if own == claimed else f"says that it is {claimed}, and its weights are 100 % {own}"
        assert failure == expected


def test_a_checkpoint_is_not_asked(tiny_checkpoint: Path) -> None:
    assert precision_failure(tiny_checkpoint, "int8") is None
