"""The stage of `benchmarks/gpu_check.py` that builds engines, with the doubles of TensorRT and a GPU."""

from argparse import Namespace
from pathlib import Path

import double
import pytest

from pmm_edge.export import tensorrt
from pmm_edge.runtime.manifest import PrecisionCount


def test_engines_are_built_compared_and_timed(
    gpu: double.FakeGpu, onnx: Path, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import gpu_stages

    monkeypatch.setattr(gpu_stages, "TRTEXEC_FOLDER", str(tmp_path))
    trtexec = tmp_path / "trtexec"
    trtexec.write_text("#!/bin/sh\necho '[I] GPU Compute Time: min = 1 ms, mean = 2 ms, median = 1.25 ms, p = 3 ms'\n")
    trtexec.chmod(0o755)
    monkeypatch.setattr(gpu_stages, "_checkpoint", lambda check: (onnx, tiny_dataset))
    monkeypatch.setattr(gpu_stages, "_export", lambda *_: onnx)
    monkeypatch.setattr(tensorrt, "read_precision", lambda *_: PrecisionCount({"FP32": 9}, {"FP32": 3, "FP16": 1}))
    step = Namespace(backbone="colors", height=96, width=64, batch=8)
    check = gpu_stages.Check("e", tmp_path, Namespace(**{**vars(gpu_stages.SMALL), "step": step}), 60, 1)
    gpu_stages.RUN["e"](check)
    figures = {(one["row"], one["figure"]): one["value"] for one in check.found["figures"]}
    assert figures["TensorRT FP16", "products"] == "3 FP32, 1 FP16"
    assert figures["TensorRT FP32", "smallest cosine"] > 0.9999
    assert figures["TensorRT INT8, batch 2", "median, ms"] > 0
    assert figures["TensorRT FP32, batch 1", "GPU compute, median, ms"] == 1.25
    assert not check.found["errors"] and not check.found["skipped"]


def test_without_tensorrt_the_stage_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import gpu_stages

    check = gpu_stages.Check("e", tmp_path, gpu_stages.SMALL, 60, 1)
    gpu_stages.RUN["e"](check)
    assert len(check.found["skipped"]) == 1 and not check.found["figures"]
