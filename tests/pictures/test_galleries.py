"""Galleries show the ranking that the figures are computed from."""

from pathlib import Path

import numpy as np
import pytest

import pmm_edge
from pmm_edge.data.dataset import Split, read
from pmm_edge.pictures.galleries import draw_rankings, gallery_grid, rank
from pmm_edge.retrieval import euclidean_distances, evaluate


def split_of(count: int, seed: int, least: int) -> Split:
    random = np.random.default_rng(seed)
    return Split(
        [Path(f"{seed}-{i}.jpg") for i in range(count)], random.integers(least, 6, count), random.integers(1, 4, count)
    )


@pytest.fixture
def features() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(2)
    # Whole numbers of few values: many distances tie.
    return random.integers(0, 3, (20, 3)).astype(np.float32), random.integers(0, 3, (90, 3)).astype(np.float32)


def test_the_order_is_that_of_retrieval_and_of_the_protocol(features: tuple[np.ndarray, np.ndarray]) -> None:
    query, gallery = split_of(20, 0, 1), split_of(90, 1, -1)
    assert {-1, 0} <= set(gallery.pids.tolist())
    distances = euclidean_distances(*features)
    result = evaluate(*features, query.pids, gallery.pids, query.camids, gallery.camids)
    for number, ranking in enumerate(rank(*features, query, gallery, top=90)):
        same = (gallery.pids == query.pids[number]) & (gallery.camids == query.camids[number])
        allowed = np.flatnonzero((gallery.pids != -1) & ~same)
        order = sorted(allowed, key=lambda at: (distances[number, at], at))
        assert [hit.path for hit in ranking.hits] == [gallery.paths[at] for at in order]
        assert [hit.distance for hit in ranking.hits] == pytest.approx([float(distances[number, at]) for at in order])
        assert [hit.pid == ranking.pid for hit in ranking.hits] == [
            gallery.pids[at] == query.pids[number] for at in order
        ]
        assert ranking.hits[0].path == gallery.paths[result.top1[number]]
        assert ranking.first_match_rank == result.first_match_rank[number]
        assert ranking.average_precision == pytest.approx(result.average_precision[number])
        assert ranking.hits[ranking.first_match_rank - 1].pid == ranking.pid


def test_as_many_hits_as_asked_for_and_as_there_are(features: tuple[np.ndarray, np.ndarray]) -> None:
    query, gallery = split_of(20, 0, 1), split_of(90, 1, 1)
    assert {len(ranking.hits) for ranking in rank(*features, query, gallery, top=4)} == {4}
    few = Split(gallery.paths[:5], np.array([1, 1, 2, 3, 4]), np.array([1, 2, 3, 1, 2]))
    one = Split(query.paths[:1], np.array([1]), np.array([1]))
    assert len(rank(features[0][:1], features[1][:5], one, few, top=10)[0].hits) == 4  # its own camera's left out


def test_any_embedder_is_drawn(tiny_onnx: Path, tiny_dataset: Path) -> None:
    dataset = read(tiny_dataset)
    two = gallery_grid(pmm_edge.load(tiny_onnx, "cpu"), dataset, [0, 7], top=3)
    four = gallery_grid(pmm_edge.load(tiny_onnx, "cpu"), dataset, [0, 7, 8, 9], top=5)
    assert four.width > two.width
    assert four.height > two.height


def test_the_drawing_follows_the_ranking(tiny_dataset: Path) -> None:
    dataset = read(tiny_dataset)
    random = np.random.default_rng(0)
    good = 100.0 * np.eye(200, dtype=np.float32)  # a person is a direction
    query, gallery = good[dataset.query.pids], good[dataset.gallery.pids]
    noise = random.random((12, 200)).astype(np.float32)
    right = draw_rankings(rank(query, gallery, dataset.query, dataset.gallery, top=2), "right")
    wrong = draw_rankings(rank(query, -gallery + noise, dataset.query, dataset.gallery, top=2), "wrong")
    assert count(right, (10, 125, 51)) > 0
    assert count(right, (200, 16, 46)) == 0
    assert count(wrong, (10, 125, 51)) == 0
    assert count(wrong, (200, 16, 46)) > 0


def count(image, color: tuple[int, int, int]) -> int:
    return int((np.asarray(image) == color).all(axis=2).sum())
