"""What a bench found: for programs as JSON, for people as rows of tables."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pmm_edge.bench.figures import Latency
from pmm_edge.bench.parity import Gates, Parity
from pmm_edge.files import written_whole
from pmm_edge.spec import RetrievalFigures

Rows = list[tuple[str, ...]]

_NONE = "–"


@dataclass(frozen=True)
class ModelReport:
    """One model's figures."""

    path: str
    precision: str
    backend: str
    device: str
    gates: Gates
    parity: Parity | None
    """None for the reference itself, and where the embeddings cannot be compared."""
    retrieval: RetrievalFigures | None
    """None where not all images were embedded, or not to finite numbers."""
    latency: list[Latency]
    failures: list[str]
    """A sentence for each gate that the model fails."""


@dataclass(frozen=True)
class BenchReport:
    """A reference, and the models that were compared with it."""

    reference: ModelReport
    models: list[ModelReport]
    data: str
    images: int
    environment: dict[str, str]
    created: str
    """UTC, ISO 8601."""

    @property
    def failures(self) -> list[str]:
        """A sentence for each gate that failed, with the model's path in front."""
        return [f"{model.path} {failure}" for model in (self.reference, *self.models) for failure in model.failures]

    def to_json(self) -> dict[str, Any]:
        """Plain values; null where a figure is not finite, which JSON cannot say."""
        content: dict[str, Any] = _finite({"passed": not self.failures, **asdict(self)})
        return content

    def save(self, path: Path) -> None:
        """Write `bench.json`, whole.

        Raises:
            OutputError: the file cannot be written.
        """
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(self.to_json(), indent=2) + "\n")


PARITY_COLUMNS = ("model", "cosine\nmin", "cosine\nmean", "largest\ndiff.", "mAP", "Rank-1")


def parity_rows(report: BenchReport) -> Rows:
    """For each model: cosine, largest difference, retrieval with the change against the reference in points."""
    base = report.reference.retrieval
    rows: Rows = [(_name(report.reference, report), *3 * (_NONE,), *_retrieval(base, None))]
    for model in report.models:
        rows.append((_name(model, report), *_closeness(model.parity), *_retrieval(model.retrieval, base)))
    return rows


LATENCY_COLUMNS = ("model", "type", "runs on", "batch", "median\nms", "p90\nms", "ratio")


def latency_rows(report: BenchReport) -> Rows:
    """For each batch size and model: time of a batch, and its share of the reference's."""
    rows: Rows = []
    for number, base in enumerate(report.reference.latency):
        for model in (report.reference, *report.models):
            own = model.latency[number]
            rows.append(
                (
                    _name(model, report),
                    model.precision,
                    f"{model.backend} {model.device}",
                    str(own.batch),
                    f"{own.median_ms:.1f}",
                    f"{own.p90_ms:.1f}",
                    f"{own.median_ms / base.median_ms:.2f}",
                )
            )
    return rows


def _name(model: ModelReport, report: BenchReport) -> str:
    """The file's name, or its path where two models have one name."""
    name = Path(model.path).name
    same = [other for other in (report.reference, *report.models) if Path(other.path).name == name]
    return name if len(same) == 1 else model.path


def _closeness(parity: Parity | None) -> tuple[str, str, str]:
    if parity is None:
        return _NONE, _NONE, _NONE
    return f"{parity.cosine_min:.6f}", f"{parity.cosine_mean:.6f}", f"{parity.largest_difference:.1e}"


def _retrieval(own: RetrievalFigures | None, base: RetrievalFigures | None) -> tuple[str, str]:
    if own is None:
        return _NONE, _NONE
    if base is None:
        return f"{100 * own.mAP:.2f}", f"{100 * own.rank1:.2f}"
    return _changed(own.mAP, base.mAP), _changed(own.rank1, base.rank1)


def _changed(own: float, base: float) -> str:
    return f"{100 * own:.2f} {100 * (own - base):+.2f}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
