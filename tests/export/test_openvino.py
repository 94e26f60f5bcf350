"""Exports in OpenVINO, an engine that shares no code with ONNX Runtime, give the same embeddings."""

from pathlib import Path

import numpy as np
import openvino
import pytest
from numpy.typing import NDArray

import pmm_edge
from pmm_edge.export import ExportedFile
from pmm_edge.retrieval.distances import cosines

CROPS = np.random.default_rng(4).integers(0, 256, (4, 96, 64, 3), dtype=np.uint8)


def in_openvino(path: Path, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
    # By default it computes float32 and FP16 graphs in bfloat16 on processors that support it, and rearranges INT8
    # graphs for its own kernels, whose 16-bit sums saturate on processors without VNNI.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "LP_TRANSFORMS_MODE": "OFF", "INFERENCE_NUM_THREADS": 1}
    return openvino.Core().compile_model(path, "CPU", settings)({"images": crops})["embeddings"]


@pytest.mark.parametrize("batch", [1, 4])
def test_fp32_agrees(tiny_onnx: Path, batch: int) -> None:
    crops = CROPS[:batch]
    actual, expected = in_openvino(tiny_onnx, crops), pmm_edge.load(tiny_onnx, "cpu").embed(crops)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * expected.max())


def test_fp16_agrees(fp16: ExportedFile) -> None:
    expected = pmm_edge.load(fp16.path, "cpu").embed(CROPS)
    assert cosines(in_openvino(fp16.path, CROPS), expected).min() >= 0.99999


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_int8_is_as_close_to_fp32_in_either_engine(target: str, int8: dict[str, ExportedFile], tiny_onnx: Path) -> None:
    """The engines round differently between layers, so they differ by about the loss to FP32: here 0.0007."""
    path = int8[target].path
    ours, fp32 = (pmm_edge.load(file, "cpu").embed(CROPS) for file in (path, tiny_onnx))
    theirs = in_openvino(path, CROPS)
    for first, second in ((theirs, ours), (theirs, fp32), (ours, fp32)):
        assert cosines(first, second).min() >= 0.998
