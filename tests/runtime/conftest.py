"""The tiny network, loaded once for all tests of the runtime."""

from pathlib import Path

import pytest

import pmm_edge
from pmm_edge.runtime import Embedder


@pytest.fixture(scope="session")
def onnx(tiny_onnx: Path) -> Embedder:
    return pmm_edge.load(tiny_onnx, "cpu")


@pytest.fixture(scope="session")
def torch(tiny_checkpoint: Path) -> Embedder:
    return pmm_edge.load(tiny_checkpoint, "cpu")
