"""Small galleries that split, index and merge after a few hundred rows, and a model that computed their rows."""

from dataclasses import replace

import pytest
from qdrant_client import QdrantClient

from pmm_edge.gallery import EmbeddingModel
from pmm_edge.spec import Calibration, DistanceThresholds, InputSpec, ModelSpec, Threshold

SIZE = 24


def model_of(size: int = SIZE, digest: str = "a", **settings: object) -> EmbeddingModel:
    spec = ModelSpec("pmm", "resnet18", 4, InputSpec(96, 64), size, {})
    return EmbeddingModel(64 * digest, replace(spec, **settings))


def calibrated(distance: float) -> EmbeddingModel:
    """A model whose threshold for a false-match rate of 0.001 is `distance`."""
    found = DistanceThresholds(0.1, (Threshold(1e-3, distance, 1, (0, 0.01), 0.5, (0.4, 0.6)),))
    return model_of(calibration=Calibration("set", "0", 9, 9, 1000, SIZE, found, found))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FLAT_ROWS": 400, "SEGMENT_ROWS": 150, "CHUNK": 64, "TAIL": 100}.items():
        monkeypatch.setattr(f"pmm_edge.gallery.folder.{name}", value)
    monkeypatch.setattr("pmm_edge.gallery.index.RECALL", 2)  # the index is tuned until it compares every row


@pytest.fixture
def client() -> QdrantClient:
    return QdrantClient(":memory:")
