"""Exports in OpenVINO, an engine that shares no code with ONNX Runtime: the graphs mean the same to both."""

from pathlib import Path

import numpy as np
import openvino
import pytest
from numpy.typing import NDArray

import pmm_edge
from pmm_edge.export import Exported

CROPS = np.random.default_rng(4).integers(0, 256, (4, 96, 64, 3), dtype=np.uint8)


def in_openvino(path: Path, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
    # Left alone it computes float32 in bfloat16 on processors that have it, and FP16 graphs as well.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    return openvino.Core().compile_model(path, "CPU", settings)({"images": crops})["embeddings"]


def least_cosine(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(((first * second).sum(axis=1) / lengths).min())


@pytest.mark.parametrize("batch", [1, 4])
def test_fp32_is_the_same(tiny_onnx: Path, batch: int) -> None:
    crops = CROPS[:batch]
    actual, expected = in_openvino(tiny_onnx, crops), pmm_edge.load(tiny_onnx, "cpu").embed(crops)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * expected.max())


def test_fp16_is_the_same(fp16: Exported) -> None:
    expected = pmm_edge.load(fp16.path, "cpu").embed(CROPS)
    assert least_cosine(in_openvino(fp16.path, CROPS), expected) >= 0.99999


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_int8_is_as_close_to_fp32_in_either_engine(target: str, int8: dict[str, Exported], tiny_onnx: Path) -> None:
    """Each rounds between the layers in its own way, so they differ by about what each loses to FP32: here 0.0007."""
    path = int8[target].path
    ours, fp32 = (pmm_edge.load(file, "cpu").embed(CROPS) for file in (path, tiny_onnx))
    theirs = in_openvino(path, CROPS)
    assert least_cosine(theirs, ours) >= 0.998
    assert least_cosine(theirs, fp32) >= 0.998
    assert least_cosine(ours, fp32) >= 0.998
