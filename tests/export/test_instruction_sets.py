"""INT8 for CPUs gives the same embeddings with and without instructions that sum 8-bit products exactly (VNNI)."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pmm_edge
from pmm_edge.export import ExportedFile
from pmm_edge.export.quantize import round_weights
from pmm_edge.retrieval.distances import cosines

QEMU = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
EMBED = """
import sys
import numpy as np
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 3
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
np.save(sys.argv[3], session.run(None, {"images": np.load(sys.argv[2])})[0])
"""


@pytest.mark.parametrize("safe_pairs", [False, True])
def test_weights_round_to_their_neighbors_and_keep_each_channels_sum(safe_pairs: bool) -> None:
    weights = np.random.default_rng(0).normal(size=(5, 7, 3, 3)).astype(np.float32)
    weights[2] = 0
    rounded, scale = round_weights(weights, safe_pairs)
    errors = rounded - weights / scale[:, None, None, None]
    assert np.abs(errors).max() < 1
    assert np.abs(errors.reshape(5, -1).sum(axis=1)).max() <= 0.5 + 1e-3
    assert not rounded[2].any()
    if not safe_pairs:
        assert (np.abs(rounded).reshape(5, -1).max(axis=1) == [127, 127, 0, 127, 127]).all()


@pytest.mark.skipif(platform.machine() != "x86_64" or not QEMU, reason="needs qemu-user-static on x86-64")
def test_a_processor_without_vnni_gives_the_same_embeddings(int8_cpu: list[ExportedFile], tmp_path: Path) -> None:
    """ONNX Runtime computes the layers of the other target's graph in float32, which is the same everywhere."""
    model = int8_cpu[1].path
    crops = np.random.default_rng(4).integers(0, 256, (2, 96, 64, 3), dtype=np.uint8)
    np.save(tmp_path / "crops.npy", crops)
    command = [sys.executable, "-c", EMBED, model, tmp_path / "crops.npy", tmp_path / "haswell.npy"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    subprocess.run([str(QEMU), "-cpu", "Haswell", *command], env=environment, check=True, timeout=300)
    here, haswell = pmm_edge.load(model, "cpu").embed(crops), np.load(tmp_path / "haswell.npy")
    assert cosines(here, haswell).min() >= 0.99999
