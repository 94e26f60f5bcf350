"""Exports give the same embeddings in OpenVINO, which shares no code with ONNX Runtime, and on older processors."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino
import pytest

import pmm_edge
from pmm_edge.export import ExportedFile
from pmm_edge.retrieval.distances import cosines

QEMU = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
EMBED = """
import sys, numpy, pmm_edge
numpy.save(sys.argv[3], pmm_edge.load(sys.argv[1], "cpu").embed(numpy.load(sys.argv[2])))
"""


def in_openvino(path: Path, crops: np.ndarray) -> np.ndarray:
    # By default it computes float32 and FP16 graphs in bfloat16 on processors that support it, and rearranges INT8
    # graphs for its own kernels, whose 16-bit sums saturate on processors without VNNI.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "LP_TRANSFORMS_MODE": "OFF", "INFERENCE_NUM_THREADS": 1}
    return openvino.Core().compile_model(path, "CPU", settings)({"images": crops})["embeddings"]


def test_fp32_and_fp16_agree_in_openvino(tiny_onnx: Path, fp16: ExportedFile, crops: np.ndarray) -> None:
    for batch in (crops[:1], crops):
        expected = pmm_edge.load(tiny_onnx, "cpu").embed(batch)
        np.testing.assert_allclose(in_openvino(tiny_onnx, batch), expected, rtol=0, atol=1e-5 * expected.max())
    expected = pmm_edge.load(fp16.path, "cpu").embed(crops)
    assert cosines(in_openvino(fp16.path, crops), expected).min() >= 0.99999


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_int8_is_as_close_to_fp32_in_either_engine(
    target: str, int8: dict[str, ExportedFile], tiny_onnx: Path, crops: np.ndarray
) -> None:
    """The engines round differently between layers, so they differ by about the loss to FP32; more with FP16 scales."""
    path = int8[target].path
    ours, fp32 = (pmm_edge.load(file, "cpu").embed(crops) for file in (path, tiny_onnx))
    theirs = in_openvino(path, crops)
    for first, second in ((theirs, ours), (theirs, fp32), (ours, fp32)):
        assert cosines(first, second).min() >= (0.996 if target == "tensorrt" else 0.998)


@pytest.mark.skipif(platform.machine() != "x86_64" or not QEMU, reason="needs qemu-user-static on x86-64")
def test_a_processor_without_vnni_gives_the_same_embeddings(
    int8_cpu: list[ExportedFile], crops: np.ndarray, tmp_path: Path
) -> None:
    """VNNI sums 8-bit products exactly. The other target's graph is computed in float32, the same everywhere."""
    model, crops = int8_cpu[1].path, crops[:2]
    np.save(tmp_path / "crops.npy", crops)
    command = [sys.executable, "-c", EMBED, model, tmp_path / "crops.npy", tmp_path / "haswell.npy"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    subprocess.run([str(QEMU), "-cpu", "Haswell", *command], env=environment, check=True, timeout=300)
    assert cosines(pmm_edge.load(model, "cpu").embed(crops), np.load(tmp_path / "haswell.npy")).min() >= 0.99999
