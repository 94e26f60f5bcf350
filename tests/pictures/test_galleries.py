"""Galleries show the ranking that the figures are computed from."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pmm_edge
from pmm_edge.data.dataset import Split, read
from pmm_edge.gallery import Hit, SearchResult
from pmm_edge.pictures.galleries import MOST, draw_rankings, draw_search, gallery_grid, rank
from pmm_edge.retrieval import evaluate, pairwise_distances


def split_of(count: int, seed: int, least: int) -> Split:
    random = np.random.default_rng(seed)
    paths = [Path(f"{seed}-{number}.jpg") for number in range(count)]
    return Split(paths, random.integers(least, 6, count), random.integers(1, 4, count))


def test_the_order_is_that_of_retrieval_and_of_the_protocol() -> None:
    query, gallery, random = split_of(20, 0, 1), split_of(90, 1, -1), np.random.default_rng(2)
    # Whole numbers of few values: many distances tie.
    features = [random.integers(0, 3, (count, 3)).astype(np.float32) for count in (20, 90)]
    assert {-1, 0} <= set(gallery.pids.tolist())
    distances = pairwise_distances(*features)
    result = evaluate(*features, query.pids, gallery.pids, query.camids, gallery.camids)
    for number, ranking in enumerate(rank(*features, query, gallery, top=90)):
        same = (gallery.pids == query.pids[number]) & (gallery.camids == query.camids[number])
        allowed = np.flatnonzero((gallery.pids != -1) & ~same)
        order = sorted(allowed, key=lambda at: (distances[number, at], at))
        assert ranking.hits.tolist() == order
        np.testing.assert_allclose(ranking.distances, distances[number, order])
        assert ranking.hits[0] == result.top1[number]
        assert ranking.first_match_rank == result.first_match_rank[number]
        assert ranking.average_precision == pytest.approx(result.average_precision[number])
        assert gallery.pids[ranking.hits[ranking.first_match_rank - 1]] == query.pids[number]
    assert {len(ranking.hits) for ranking in rank(*features, query, gallery, top=4)} == {4}
    few = Split(gallery.paths[:5], np.array([1, 1, 2, 3, 4]), np.array([1, 2, 3, 1, 2]))
    one = Split(query.paths[:1], np.array([1]), np.array([1]))
    assert len(rank(features[0][:1], features[1][:5], one, few, top=10)[0].hits) == 4  # one is of its own camera


def test_any_embedder_is_drawn(tiny_onnx: Path, tiny_dataset: Path) -> None:
    dataset = read(tiny_dataset)
    two = gallery_grid(pmm_edge.load(tiny_onnx, "cpu"), dataset, [0, 7], top=3)
    four = gallery_grid(pmm_edge.load(tiny_onnx, "cpu"), dataset, [0, 7, 8, 9], top=5)
    assert four.width > two.width
    assert four.height > two.height


def test_the_drawing_follows_the_ranking(tiny_dataset: Path) -> None:
    dataset, random = read(tiny_dataset), np.random.default_rng(0)
    good = 100.0 * np.eye(200, dtype=np.float32)  # a person is a direction
    query, gallery = good[dataset.query.pids], good[dataset.gallery.pids]
    noise = random.random((12, 200)).astype(np.float32)
    for features, right, wrong in ((gallery, True, False), (noise - gallery, False, True)):
        found = rank(query, features, dataset.query, dataset.gallery, top=2)
        pixels = np.asarray(draw_rankings(found, dataset.query, dataset.gallery, "name"))
        colors = [bool((pixels == color).all(axis=2).any()) for color in ((10, 125, 51), (200, 16, 46))]
        assert colors == [right, wrong]


def test_a_search_of_any_size_is_drawn(tmp_path: Path) -> None:
    hit = Hit.of(1.0, 7, 3, "lobby", 0.0, "no image")
    one = SearchResult("no image", [hit], 1, "euclidean", None)
    heights = []
    for count in (MOST, 3 * MOST):  # matplotlib draws at most 65,536 pixels
        draw_search([one] * count, tmp_path / "hits.png")
        with Image.open(tmp_path / "hits.png") as picture:
            heights.append(picture.height)
    assert heights[0] == heights[1]
