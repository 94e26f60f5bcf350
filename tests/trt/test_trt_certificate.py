"""An engine is certified together with its manifest, which says what it is fed."""

import json
from pathlib import Path

import pytest

import pmm_edge
from pmm_edge.bench.certification import write_certificates
from pmm_edge.bench.report import BenchReport, Change, Closeness, Gates, ModelReport, Parity, RetrievalChange
from pmm_edge.errors import ModelError
from pmm_edge.export.tensorrt import BuiltEngine
from pmm_edge.files import sha256
from pmm_edge.runtime.certificate import certificate_path, check_certificate
from pmm_edge.runtime.manifest import manifest_path
from pmm_edge.spec import RetrievalFigures


def report_of(path: Path, backend: str) -> ModelReport:
    change, closeness = Change(0.0, 0.0, 0.0), Closeness(1.0, 1.0, 1.0, 0.0, 0.0, "a.jpg")
    return ModelReport(
        path=str(path),
        sha256=sha256(path),
        file_bytes=path.stat().st_size,
        precision="fp32",
        embedding_size=8,
        backend=backend,
        device="cuda:0",
        gates=Gates(),
        invariants=[],
        parity=Parity(24, closeness, {}, [1.0] * 101),
        retrieval=RetrievalFigures(0.6, 0.5, 0.2, 0.4),
        cmc=[],
        retrieval_change=RetrievalChange(change, change, change, 12, []),
        latency=[],
        failures=[],
    )


@pytest.fixture
def engine(built: BuiltEngine, onnx: Path) -> Path:
    """A certified engine."""
    reports = report_of(onnx, "onnxruntime"), [report_of(built.path, "tensorrt")]
    written = write_certificates(BenchReport(*reports, "tiny", "0" * 64, 24, {}, "2026-11-22T20:00:00+00:00"))
    assert written.certificates == [certificate_path(built.path)]
    return built.path


def refused(engine: Path, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        pmm_edge.load(engine, require_certificate=True)


def test_a_certified_engine_loads(engine: Path) -> None:
    assert check_certificate(engine).engine_manifest_sha256 == sha256(manifest_path(engine))
    assert pmm_edge.load(engine, require_certificate=True).backend == "tensorrt"


def test_a_changed_engine(engine: Path) -> None:
    engine.write_bytes(engine.read_bytes() + b"\x00")
    refused(engine, "has changed since it was certified")


def test_a_changed_manifest(engine: Path) -> None:
    path = manifest_path(engine)
    content = json.loads(path.read_text())
    content["build_seconds"] += 1
    path.write_text(json.dumps(content))
    pmm_edge.load(engine)  # the manifest alone cannot tell
    refused(engine, r"model\.manifest\.json has changed since model\.engine was certified")
    path.unlink()
    refused(engine, r"has no model\.manifest\.json beside it")


def test_an_onnx_file_exported_again(engine: Path, onnx: Path) -> None:
    onnx.write_bytes(onnx.read_bytes() + b" ")
    refused(engine, r"model\.onnx has changed since model\.engine was built")
