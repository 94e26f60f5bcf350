"""A report with made-up figures for tests: one reference, three models that pass, one that fails."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from pmm_edge.bench.report import (
    BenchReport,
    BenchWarning,
    Cause,
    Change,
    ChangedPair,
    Clocks,
    Closeness,
    ColdStart,
    Decision,
    Decisions,
    Departure,
    Energy,
    Environment,
    Failure,
    FailureKind,
    Gates,
    Invariant,
    InvariantName,
    Latency,
    LikelyCause,
    ModelReport,
    Parity,
    RetrievalChange,
    Scope,
    WarningKind,
)
from pmm_edge.spec import Precision, RetrievalFigures

_GATES = {"fp16": Gates(0.999, 0.1, 0.9999), "int8": Gates(0.9, 0.5, 0.99)}
_SIZE = {"fp32": 1.0, "fp16": 0.5, "int8": 0.26}


def sample_report(folder: Path) -> BenchReport:
    """Return the report; `folder` is its data set."""
    reference = _model("best.pt", "fp32", 0, 1.0)
    reference.backend, reference.parity, reference.retrieval_change, reference.decisions = "torch", None, None, None
    broken = _model("model-bgr.onnx", "fp32", 5e-2, 0.33, mAP=0.391)
    assert broken.retrieval_change is not None
    broken.failures = [
        Failure(FailureKind.COSINE, 0.712345, 0.9999, "<img src=x onerror=alert(1)>.jpg"),
        Failure(FailureKind.MAP_DROP, 7.6, 0.1, change=broken.retrieval_change.mAP),
    ]
    broken.likely_cause = LikelyCause(Cause.BGR, 0.9998)
    broken.departure = Departure("/conv1/Conv", "Conv", "conv1", 0.81, 1.0, False, "float32", (-3.0, 4.0), (-2.0, 5.0))
    return BenchReport(
        reference=reference,
        models=[
            _model("model.onnx", "fp32", 1e-12, 0.33),
            _model("model-fp16.onnx", "fp16", 2e-6, 0.36, mAP=0.4669),
            _model("model-int8-cpu.onnx", "int8", 2e-3, 0.14, mAP=0.4641),
            broken,
        ],
        data=str(folder),
        data_sha256="d" * 64,
        images=2450,
        environment=Environment("AMD EPYC", 2, 2.0, "avx512_vnni", "Linux", "3.11.7", {"onnxruntime": "1.31.1"}),
        created="2026-11-22T18:39:08+00:00",
        warnings=[BenchWarning(WarningKind.BUSY, value=3.2, limit=1.0)],
    )


def passing_report(folder: Path) -> BenchReport:
    """Return the same without the model that fails."""
    report = sample_report(folder)
    return replace(report, models=report.models[:-1], warnings=[])


def _model(
    name: str,
    precision: Precision,
    departure: float,
    ratio: float,
    mAP: float = 0.467,  # noqa: N803  the field's own spelling
) -> ModelReport:
    change = Change(mAP - 0.467, mAP - 0.467 - 0.002, mAP - 0.467 + 0.002)
    scopes: tuple[Scope, ...] = ("model", "end to end")
    return ModelReport(
        path=f"runs/quick/export/{name}",
        sha256=name.encode().hex().ljust(64, "0")[:64],
        file_bytes=round(50e6 * _SIZE[precision]),
        precision=precision,
        embedding_size=1536,
        gflops=1.36,
        parameters=13_500_000,
        backend="onnxruntime",
        device="cpu",
        gates=_GATES.get(precision, Gates()),
        invariants=[Invariant(invariant, True, 0.0, 1e-5, batch=8, row=0) for invariant in InvariantName],
        parity=_parity(departure),
        retrieval=RetrievalFigures(0.6354, mAP, 0.1546, mAP - 0.02),
        retrieval_cosine=RetrievalFigures(0.62, mAP - 0.01, 0.15, mAP - 0.03),
        cmc=[float(share) for share in 1 - 0.3646 * np.exp(-np.arange(50) / 12) + (mAP - 0.467)],
        retrieval_change=RetrievalChange(change, change, change, 458),
        decisions=_decisions(departure),
        latency=[_latency(batch, scope, ratio) for scope in scopes for batch in (1, 8, 32)],
        cold_start=ColdStart(1450.0 * ratio, 410.0, 8),
        energy=Energy(0.21 * ratio, 31.0, "INA3221", 1, 2.0),
    )


def _decisions(departure: float) -> Decisions:
    pair = ChangedPair("query/a.jpg", "gallery/b.jpg", False, 14.35, 14.27)
    change, factor = Change(-0.0011, -0.0037, 0.0013), 1 + departure
    equal = Decision("cosine", 0.17, 1e-4, 1e-4, 1e-4, 1.0, 1.0, 1.0, 0.236, Change(0, 0, 0), 0, [])
    moved = Decision("euclidean", 14.31, 1e-3, 1e-3, 1e-3, factor, 0.97, 1.02, 0.269, change, 74, [pair])
    return Decisions("synthetic", True, 5298, 676_154, [moved, equal])


def _parity(departure: float) -> Parity:
    cosines = [float(cosine) for cosine in 1 - departure * 10 ** (0.8 - 1.6 * np.linspace(0, 1, 101))]
    whole = Closeness(cosines[0], cosines[1], sum(cosines) / 101, departure, "query/worst.jpg")
    return Parity(whole, {"I": whole, "II": whole, "III": whole}, cosines, 1.0, 1.0, "query/worst.jpg")


def _latency(batch: int, scope: Scope, ratio: float) -> Latency:
    median = 22.7 * ratio * batch**0.8 + (0 if scope == "model" else 1.2 * batch)
    spread = 0.0 if ratio == 1 else 0.01
    times = median, 1.18 * median, 1.4 * median, 0.06, 1000 * batch / median
    return Latency(
        batch, scope, False, 80, *times, ratio, ratio - spread, ratio + spread, cpu_clocks=Clocks(3100, 3400)
    )
