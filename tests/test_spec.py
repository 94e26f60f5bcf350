"""The spec carries decision thresholds unchanged, reads files without them, and refuses those of another network."""

import json
import math
from dataclasses import replace

import pytest

from pmm_edge.errors import ModelError
from pmm_edge.spec import Calibration, DistanceThresholds, InputSpec, ModelSpec, Threshold

FOUND = DistanceThresholds(0.1, (Threshold(1e-2, 0.5, 90, (0.005, 0.02), 0.9, (0.8, 0.95)),))
CALIBRATION = Calibration("people", "f" * 64, 20, 300, 9000, 6, FOUND, FOUND)
SPEC = ModelSpec("pmm", "resnet18", 4, InputSpec(96, 64), 6, {"I": (0, 6)}, calibration=CALIBRATION)


def test_thresholds_travel_and_older_specs_are_read():
    assert ModelSpec.from_json(SPEC.to_json()) == SPEC
    older = json.loads(SPEC.to_json())
    del older["calibration"]
    assert ModelSpec.from_json(json.dumps(older)) == replace(SPEC, calibration=None)


def test_a_threshold_is_found_by_its_rate():
    assert CALIBRATION.threshold(0.01, "cosine") == FOUND.thresholds[0]
    with pytest.raises(ModelError, match=r"0\.01"):
        CALIBRATION.threshold(1e-3)


def test_thresholds_of_another_embedding_size_are_refused():
    with pytest.raises(ValueError, match="6 values"):
        replace(SPEC, embedding_size=8)
    content = json.loads(SPEC.to_json())
    content["embedding_size"] = 7
    with pytest.raises(ModelError):
        ModelSpec.from_json(json.dumps(content))


def test_euclidean_distances_of_unit_vectors_follow_from_the_cosine():
    (scaled,) = CALIBRATION.of_unit_length().euclidean.thresholds
    assert scaled == replace(FOUND.thresholds[0], distance=math.sqrt(2 * 0.5))
