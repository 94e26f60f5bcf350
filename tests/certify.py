"""A certificate as the bench would write it, without a bench."""

from dataclasses import replace
from pathlib import Path

import pmm_edge
from pmm_edge.files import sha256
from pmm_edge.runtime.certificate import (
    Certificate,
    CertifiedChange,
    CertifiedLatency,
    CertifiedParity,
    CertifiedRetrieval,
    HeldGates,
    certificate_path,
)
from pmm_edge.spec import RetrievalFigures


def certify(model: Path, **changes: object) -> Certificate:
    """Write a certificate of a model as it lies there."""
    figures, change = RetrievalFigures(0.62, 0.462, 0.2, 0.4), CertifiedChange(-0.0004, -0.001, 0.0)
    certificate = Certificate(
        model=model.name,
        sha256=sha256(model),
        file_bytes=model.stat().st_size,
        engine_manifest_sha256=None,
        engine_onnx_sha256=None,
        spec=pmm_edge.load(model, "cpu").spec,
        reference="best.pt",
        reference_sha256="0" * 64,
        data="tiny",
        data_sha256="1" * 64,
        images=24,
        gates=HeldGates(0.9999, 0.1, 0.0, 1.001),
        parity=CertifiedParity(0.99995, 1.0, 1.0, 1e-5, 1e-6, 0.99999, 1.00001),
        retrieval=CertifiedRetrieval(figures, figures, change, change, change, 12, 0),
        latency=[CertifiedLatency(1, "model", False, 7.94, 8.5, 126.6)],
        backend="onnxruntime",
        device="cpu",
        machine={"processor": "AMD EPYC"},
        warnings=[],
        created="2026-11-22T20:00:00+00:00",
        pmm_edge="0.1.0",
    )
    certificate = replace(certificate, **changes)
    certificate.save(certificate_path(model))
    return certificate
