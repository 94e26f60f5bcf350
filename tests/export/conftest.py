"""The tiny network in every input form and precision, exported once for all tests."""

from pathlib import Path

import numpy as np
import pytest
from people import write_people

from pmm_edge.export import ExportedFile, ExportResult, export


@pytest.fixture(scope="session")
def crops() -> np.ndarray:
    return np.random.default_rng(4).integers(0, 256, (5, 96, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_people(tmp_path_factory.mktemp("data") / "people", train=72)


@pytest.fixture(scope="session")
def fp32_export(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """FP32 in all three input forms with the DeepStream and Triton bundles."""
    folder = tmp_path_factory.mktemp("fp32")
    bundles = {"deepstream": folder / "tracker", "triton": folder / "models"}
    return export(tiny_checkpoint, out=folder / "model.onnx", input_form="normalized", **bundles)


@pytest.fixture(scope="session")
def fp32(fp32_export: ExportResult) -> dict[str, ExportedFile]:
    """FP32, by input form."""
    return {item.spec.input.form: item for item in fp32_export.files}


@pytest.fixture(scope="session")
def raw_onnx(fp32: dict[str, ExportedFile]) -> Path:
    return fp32["raw"].path


@pytest.fixture(scope="session")
def fp16(tiny_checkpoint: Path, people: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportedFile:
    out = tmp_path_factory.mktemp("fp16") / "model.onnx"
    return export(tiny_checkpoint, out=out, precision="fp16", calibration=people).files[0]


@pytest.fixture(scope="session")
def int8_cpu(tiny_checkpoint: Path, people: Path, tmp_path_factory: pytest.TempPathFactory) -> list[ExportedFile]:
    """INT8 for CPUs in the forms `normalized` and `uint8`, from one network."""
    folder = tmp_path_factory.mktemp("int8_cpu")
    options = {"target": "cpu", "input_form": "normalized", "max_map_drop": 100, "triton": folder / "models"}
    options |= {"precision": "int8", "calibration": people, "calibration_method": "minmax"}
    return export(tiny_checkpoint, out=folder / "model.onnx", **options).files


@pytest.fixture(scope="session")
def int8(
    tiny_checkpoint: Path, people: Path, int8_cpu: list[ExportedFile], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, ExportedFile]:
    """INT8 for each target, of the form `uint8`."""
    out = tmp_path_factory.mktemp("int8_tensorrt") / "model.onnx"
    options = {"precision": "int8", "calibration": people, "calibration_method": "minmax"}
    return {"tensorrt": export(tiny_checkpoint, out=out, **options).files[0], "cpu": int8_cpu[1]}
