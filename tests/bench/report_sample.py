"""A report that looks like a real one, for tests: a fixture, none of its figures was measured.

A reference and three models: an FP32 export that passes, an FP16 and an INT8 one that pass their own gates, and one
whose input is BGR and fails. The data set is real: small JPEG files under a folder that the caller gives.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from pmm_edge.bench.report import (
    BenchReport,
    Change,
    Clocks,
    Closeness,
    ColdStart,
    Compute,
    Departure,
    Energy,
    FirstHit,
    Gates,
    Invariant,
    InvariantName,
    Latency,
    ModelReport,
    Parity,
    RetrievalChange,
    Scope,
    Stream,
)
from pmm_edge.spec import RetrievalFigures

_INVARIANTS: tuple[InvariantName, ...] = ("finite", "distinct", "repeatable", "equal rows", "batch size", "neighbours")
_RUNS = 80


def write_images(folder: Path, count: int = 6) -> list[str]:
    """Paths of new JPEG files in the folder, one of a name that no page may take for HTML."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["<img src=x onerror=alert(1)>.jpg", *(f"{number:04d}_c1s1_000001_00.jpg" for number in range(1, count))]
    for number, name in enumerate(names):
        Image.new("RGB", (64, 128), (40 * number, 90, 200 - 30 * number)).save(folder / name)
    return [str(folder / name) for name in names]


def sample_report(folder: Path) -> BenchReport:
    """The report, its images written into `folder`."""
    images = write_images(folder)
    reference = replace(
        _model("best.pt", "fp32", 0, 1.0),
        sha256="a" * 64,
        backend="torch",
        parity=None,
        retrieval_change=None,
        latency=_latencies(22.7, 1.0),
    )
    bgr = _model("model-bgr.onnx", "fp32", 5e-2, 0.33, mAP=0.391)
    failures = [
        f"cosine 0.712345 is 0.29 below the least allowed 0.9999, on {images[0]} (mean 0.950000)",
        "mAP 39.10 is 7.60 points below the reference's 46.70, 0.1 are allowed",
    ]
    return BenchReport(
        reference=reference,
        models=[
            _model("model.onnx", "fp32", 1e-12, 0.33),
            _model("model-fp16.onnx", "fp16", 2e-6, 0.36, mAP=0.4669, hits=_hits(images, 2)),
            _model("model-int8-cpu.onnx", "int8", 2e-3, 0.14, mAP=0.4641, hits=_hits(images, 40)),
            replace(
                bgr,
                failures=failures,
                likely_cause="the input is BGR",
                departure=Departure(
                    "/conv1/Conv", "Conv", "x", 0.81, 1.0, "It begins at /conv1/Conv, the first layer."
                ),
            ),
        ],
        data=str(folder),
        data_sha256="d" * 64,
        images=2450,
        environment={"processor": "AMD EPYC", "cores": "2", "python": "3.11.7", "onnxruntime": "1.31.1"},
        created="2026-11-22T18:39:08+00:00",
        warnings=["the machine is busy: medians of one model differ by 8 % between turns"],
    )


def passing_report(folder: Path) -> BenchReport:
    """The same without the model that fails."""
    report = sample_report(folder)
    return replace(report, models=report.models[:-1], warnings=[])


def _model(
    name: str,
    precision: str,
    departure: float,
    ratio: float,
    mAP: float = 0.467,  # noqa: N803  the field's own spelling
    hits: list[FirstHit] | None = None,
) -> ModelReport:
    change = Change(mAP - 0.467, mAP - 0.467 - 0.002, mAP - 0.467 + 0.002)
    return ModelReport(
        path=f"runs/quick/export/{name}",
        sha256=name.encode().hex().ljust(64, "0")[:64],
        file_bytes=round(50e6 * {"fp16": 0.5, "int8": 0.26}.get(precision, 1)),
        precision=precision,
        embedding_size=1536,
        backend="onnxruntime",
        device="cpu",
        gates={"fp16": Gates(0.999, 0.1, 0.9999), "int8": Gates(0.9, 0.5, 0.99)}.get(precision, Gates()),
        invariants=[
            Invariant(invariant, True, "compared on 24 images, largest difference 0") for invariant in _INVARIANTS
        ],
        parity=_parity(departure),
        retrieval=RetrievalFigures(0.6354, mAP, 0.1546, mAP - 0.02),
        cmc=[float(share) for share in 1 - 0.3646 * np.exp(-np.arange(50) / 12) + (mAP - 0.467)],
        retrieval_change=RetrievalChange(change, change, change, 458, hits or []),
        latency=_latencies(22.7 * ratio, ratio),
        failures=[],
        stream=Stream(4, 8, 800, 120 / ratio, 25.0 * ratio, 31.0 * ratio, 44.0 * ratio, 3.6),
        cold_start=ColdStart(1450.0 * ratio, 410.0, 8),
        compute=Compute(1.36, 13_500_000, 130.0, 0.41 / ratio),
        energy=Energy(0.21 * ratio, 31.0, "RAPL", 1, 2.0),
    )


def _parity(departure: float) -> Parity:
    cosines = 1 - departure * 10 ** (0.8 - 1.6 * np.linspace(0, 1, 101))
    whole = Closeness(
        float(cosines[0]), float(cosines[1]), float(cosines.mean()), 10 * departure, departure, "query/worst.jpg"
    )
    quantiles = [float(cosine) for cosine in cosines]
    return Parity(2450, whole, {"I": whole, "II": whole, "III": whole}, quantiles, 1.0, 1.0)


def _latencies(first: float, ratio: float) -> list[Latency]:
    scopes: tuple[Scope, ...] = ("model", "end to end")
    return [
        _latency(batch, scope, first * batch**0.8 + (0 if scope == "model" else 1.2 * batch), ratio)
        for scope in scopes
        for batch in (1, 8, 32)
    ]


def _latency(batch: int, scope: Scope, median: float, ratio: float) -> Latency:
    spread = 0.0 if ratio == 1 else 0.01
    return Latency(
        batch=batch,
        scope=scope,
        cuda_graph=False,
        runs=_RUNS,
        median_ms=median,
        p90_ms=1.18 * median,
        p99_ms=1.4 * median,
        variation=0.06,
        images_per_second=1000 * batch / median,
        ratio=ratio,
        ratio_low=ratio - spread,
        ratio_high=ratio + spread,
        cpu_clocks=Clocks(3100, 3400),
    )


def _hits(images: list[str], count: int) -> list[FirstHit]:
    """Changed first hits: wrong ones first, then those that became right."""
    return [
        FirstHit(images[number % len(images)], images[1], number % 3 != 2, images[2], number >= count // 2)
        for number in range(count)
    ]
