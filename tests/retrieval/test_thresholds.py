"""Thresholds against all pairs in a table, and against scikit-learn's ROC and DET curves."""

from dataclasses import replace

import numpy as np
import pytest

from pmm_edge.errors import DataError
from pmm_edge.retrieval import pairwise_distances, thresholds
from pmm_edge.retrieval.thresholds import People, find_thresholds


def people(seed, identities=20, distractors=15, ties=False):
    """Embeddings and labels of a small data set: 3 cameras, junk, distractors, and a query that shows nobody."""
    rng = np.random.default_rng(seed)
    query_pids = np.append(np.repeat(np.arange(1, identities + 1), 3), 0)
    gallery_pids = np.concatenate([rng.integers(1, identities + 1, 200), np.zeros(distractors, int), np.full(9, -1)])
    centers = rng.standard_normal((identities + 2, 5))

    def embed(pids):
        values = centers[pids] + 0.5 * rng.standard_normal((len(pids), 5))
        return (np.round(values * 2) + 4 if ties else values).astype(np.float32)

    camids = rng.integers(1, 4, len(query_pids)), rng.integers(1, 4, len(gallery_pids))
    return embed(query_pids), embed(gallery_pids), query_pids, gallery_pids, *camids


def pairs_of(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids, distance):
    """Distances of all genuine and impostor pairs."""
    distances = pairwise_distances(query, gallery, distance)
    counts = (query_camids[:, None] != gallery_camids) & (query_pids[:, None] > 0) & (gallery_pids >= 0)
    same = query_pids[:, None] == gallery_pids
    return distances[counts & same], distances[counts & ~same]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_counts_are_those_of_all_pairs_whatever_the_parts(seed, ties, monkeypatch):
    data = people(seed, ties=ties)
    whole = find_thresholds(*data)
    monkeypatch.setattr("pmm_edge.retrieval.distances._CACHED", 1000)
    monkeypatch.setattr("pmm_edge.retrieval.distances.BLOCK_BYTES", 7 * 224 * 8)
    parts = find_thresholds(*data)
    assert (parts.calibration, parts.refused) == (whole.calibration, whole.refused)
    found = whole.calibration
    assert (found.identities, found.embedding_size) == (20, 5)
    assert whole.refused == {1e-3: 10_000, 1e-4: 100_000}
    for distance in ("euclidean", "cosine"):
        genuine, impostor = pairs_of(*data, distance)
        assert (found.genuine_pairs, found.impostor_pairs) == (len(genuine), len(impostor))
        threshold = found.threshold(1e-2, distance)
        assert threshold.false_matches == np.count_nonzero(impostor <= np.float32(threshold.distance))
        assert threshold.tmr == np.mean(genuine <= np.float32(threshold.distance))
        above = impostor[impostor > np.float32(threshold.distance)].min()
        assert threshold.false_matches <= 0.01 * len(impostor) < np.count_nonzero(impostor <= above)
        assert np.nextafter(np.float32(threshold.distance), np.float32(9)) == above
        histogram = whole.histograms[distance]
        assert (histogram.genuine.sum(), histogram.impostor.sum()) == (len(genuine), len(impostor))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_curves_are_those_of_scikit_learn(distance, ties):
    metrics = pytest.importorskip("sklearn.metrics")
    data = people(5, ties=ties)
    genuine, impostor = pairs_of(*data, distance)
    truth = np.repeat([1, 0], [len(genuine), len(impostor)])
    scores = -np.concatenate([genuine, impostor])
    found = find_thresholds(*data)
    fmr, tmr = found.histograms[distance].rates()
    expected_fmr, expected_tmr, _ = metrics.roc_curve(truth, scores, drop_intermediate=False)
    points, expected = ({*zip(*curve, strict=True)} for curve in ((fmr, tmr), (expected_fmr, expected_tmr)))
    assert points <= expected and len(points) > 0.5 * len(expected), "few bins hold two different distances"
    det_fmr, det_fnmr, _ = metrics.det_curve(truth, scores)
    inner = (fmr > 0) & (fmr < 1) & (tmr < 1)
    missed = {*zip(fmr[inner], (1 - tmr[inner]).round(12), strict=True)}
    assert missed <= {*zip(det_fmr, det_fnmr.round(12), strict=True)}
    eer = np.interp(0, expected_fmr + expected_tmr - 1, expected_fmr)
    np.testing.assert_allclose(getattr(found.calibration, distance).eer, eer, atol=5e-4)
    threshold = found.calibration.threshold(1e-2, distance)
    assert threshold.tmr == expected_tmr[expected_fmr <= 0.01].max()


def test_intervals_are_those_of_a_bootstrap_over_people():
    query, gallery, *labels = data = people(3)
    threshold = find_thresholds(*data).calibration.threshold(1e-2)
    found = People(*labels)
    rows, columns = found.rows, found.columns
    row_pids, column_pids = labels[0][rows], labels[1][columns]
    units = {*zip(row_pids, found.row_unit, strict=True), *zip(column_pids, found.column_unit, strict=True)}
    assert len({unit for _, unit in units}) == len(units) == 20 + 15, "one for each person and for each distractor"
    assert (found.weights[:, :20].sum(axis=1) == 20).all() and (found.weights[:, 20:].sum(axis=1) == 15).all()
    row_weights, column_weights = (found.weights[:, unit].astype(float) for unit in (found.row_unit, found.column_unit))
    match = pairwise_distances(query[rows], gallery[columns]) <= np.float32(threshold.distance)
    other_camera = labels[2][rows][:, None] != labels[3][columns]
    same_person = row_pids[:, None] == column_pids
    impostor, genuine = (other_camera & each for each in (~same_person, same_person))
    false, every = (((row_weights @ pairs) * column_weights).sum(axis=1) for pairs in (match & impostor, impostor))
    true, possible = ((row_weights @ pairs).sum(axis=1) for pairs in (match & genuine, genuine))
    fmr, tmr = false / every, true / possible
    other_people = (
        threshold.false_matches / impostor.sum() * fmr / np.roll(fmr, 1),
        threshold.tmr + tmr - np.roll(tmr, 1),
    )
    for interval, drawn in zip((threshold.fmr_interval, threshold.tmr_interval), other_people, strict=True):
        np.testing.assert_allclose(interval, np.quantile(drawn, (0.025, 0.975)).clip(0, 1), rtol=0.02)


def test_intervals_contain_the_rates_of_other_people():
    inside = []
    for seed in range(20):
        threshold = find_thresholds(*people(100 + seed, identities=40)).calibration.threshold(1e-2)
        genuine, impostor = pairs_of(*people(200 + seed, identities=40), "euclidean")
        for distances, interval in ((impostor, threshold.fmr_interval), (genuine, threshold.tmr_interval)):
            inside.append(interval[0] <= np.mean(distances <= threshold.distance) <= interval[1])
        assert threshold.fmr_interval[0] < 0.01 < threshold.fmr_interval[1]
        assert threshold.tmr_interval[0] < threshold.tmr < threshold.tmr_interval[1]
    assert np.mean(inside) >= 0.85


def test_more_people_than_units_and_nobody_unknown(monkeypatch):
    data = people(7, distractors=0)
    whole = find_thresholds(*data).calibration
    monkeypatch.setattr(thresholds, "MAX_UNITS", 8)
    grouped = find_thresholds(*data).calibration
    same = [replace(found.threshold(1e-2), fmr_interval=(0, 0), tmr_interval=(0, 0)) for found in (whole, grouped)]
    assert same[0] == same[1]
    assert whole.impostor_pairs == grouped.impostor_pairs


def test_wrong_data_is_refused():
    query, gallery, *labels = people(0)
    one_camera = [*labels[:2], np.ones_like(labels[2]), np.ones_like(labels[3])]
    one_person = [np.ones_like(labels[0]), *labels[1:]]
    hole, nowhere = query.copy(), gallery.copy()
    hole[3, 1], nowhere[5] = np.nan, 0
    for reason, arguments in {
        "row 3": (hole, gallery, *labels),
        "length 0": (query, nowhere, *labels),
        "two people": (query, gallery, *one_camera),
        "identities and cameras": (query, gallery, *one_person),
        "1,000": (query[:6], gallery[:40], *(each[:n] for each, n in zip(labels, (6, 40, 6, 40), strict=True))),
        "distance 0": (np.ones_like(query), np.ones_like(gallery), *labels),
    }.items():
        with pytest.raises(DataError, match=reason):
            find_thresholds(*arguments)
