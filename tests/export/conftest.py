"""The tiny network in lower precisions, exported once for all tests that look at it."""

from pathlib import Path

import pytest
from people import write_people

from pmm_edge.export import Exported, Fp16, Int8, export_onnx


@pytest.fixture(scope="session")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_people(tmp_path_factory.mktemp("data") / "people", train=72)


@pytest.fixture(scope="session")
def int8(tiny_checkpoint: Path, people: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    folder = tmp_path_factory.mktemp("int8")
    return {
        target: export_onnx(tiny_checkpoint, folder / f"{target}.onnx", precision=Int8(people, target, method="minmax"))
        for target in ("tensorrt", "cpu")
    }


@pytest.fixture(scope="session")
def fp16(tiny_checkpoint: Path, people: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_onnx(tiny_checkpoint, tmp_path_factory.mktemp("fp16") / "model.onnx", precision=Fp16(people))
