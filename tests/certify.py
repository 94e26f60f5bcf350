"""A certificate as the bench writes it, without a bench."""

from dataclasses import replace
from pathlib import Path

import msgspec

import pmm_edge
from pmm_edge.bench.report import Change, Closeness, Gates, Latency, ModelReport, Parity, RetrievalChange
from pmm_edge.files import sha256
from pmm_edge.runtime.certificate import Certificate, certificate_path
from pmm_edge.spec import RetrievalFigures


def model_report(path: Path) -> ModelReport:
    """The report of a model that passed."""
    change, figures = Change(-0.0004, -0.001, 0.0), RetrievalFigures(0.62, 0.462, 0.2, 0.4)
    return ModelReport(
        path=path.name,
        sha256=sha256(path),
        file_bytes=path.stat().st_size,
        precision="fp32",
        embedding_size=8,
        gflops=None,
        parameters=None,
        backend="onnxruntime",
        device="cpu",
        gates=Gates(),
        parity=Parity(Closeness(0.99995, 1.0, 1.0, 1e-6, ""), {}, [1.0] * 101, 1.0, 1.0, ""),
        retrieval=figures,
        retrieval_change=RetrievalChange(change, change, change, 12),
        latency=[Latency(1, "model", False, 50, 7.94, 8.5, 9.0, 0.03, 126.6, 0.3, 0.29, 0.31)],
    )


def certify(model: Path, **changes: object) -> Certificate:
    """Write a certificate of a model."""
    certificate = Certificate(
        model=model.name,
        sha256=sha256(model),
        file_bytes=model.stat().st_size,
        engine_manifest_sha256=None,
        engine_onnx_sha256=None,
        spec=pmm_edge.load(model, "cpu", require_certificate=None).spec,
        reference="best.pt",
        reference_sha256="0" * 64,
        data="tiny",
        data_sha256="1" * 64,
        images=24,
        report=msgspec.to_builtins(model_report(model)),
        environment={"cpu": "AMD EPYC"},
        warnings=[],
        created="2026-11-22T20:00:00+00:00",
        pmm_edge="0.1.0",
    )
    certificate = replace(certificate, **changes)
    certificate.save(certificate_path(model))
    return certificate
