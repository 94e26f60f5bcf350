"""Ranked galleries: a query, and what a model finds nearest to it, right and wrong hits told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pmm_edge.console import Report, silent
from pmm_edge.data.dataset import DISTRACTOR_PID, ReidDataset, Split
from pmm_edge.images import read_crop
from pmm_edge.pictures.grid import Cell, grid
from pmm_edge.retrieval import euclidean_distances, evaluate_distances
from pmm_edge.retrieval.metrics import JUNK_PID, check_labels
from pmm_edge.runtime import Embedder, embed_files
from pmm_edge.runtime.embedder import Embeddings

TOP = 10
_PHOTO = (208, 104)
"""Height and width of the pictures, whatever the network's input."""


@dataclass(frozen=True)
class Shown:
    """An image of a data set and who is on it."""

    path: Path
    pid: int
    camid: int


@dataclass(frozen=True)
class Hit:
    """A gallery image at its rank."""

    image: Shown
    distance: float
    right: bool


@dataclass(frozen=True)
class Ranking:
    """A query and the first images of its ranking, by the Market-1501 protocol."""

    query: Shown
    hits: tuple[Hit, ...]
    first_match_rank: int
    """From 1; 0 where the gallery has no match."""
    average_precision: float
    """In 0..1 over the whole ranking; NaN where the gallery has no match."""


def gallery_grid(
    embedder: Embedder,
    dataset: ReidDataset,
    queries: Sequence[int] | NDArray[np.intp],
    *,
    top: int = TOP,
    report: Report = silent,
) -> Image.Image:
    """Embed some queries and the whole gallery, and draw what is ranked first.

    Args:
        embedder: any model that loads; `.onnx` needs no torch.
        queries: indices into `dataset.query`, a row each.
        top: hits shown for each.

    Raises:
        DataError: an image cannot be read, or none of the queries has a match in the gallery.
    """
    query, gallery = (
        part(dataset.query, queries),
        part(dataset.gallery, np.flatnonzero(dataset.gallery.pids != JUNK_PID)),
    )
    embeddings = embed_files(embedder, [*query.paths, *gallery.paths], report=report).embeddings
    found = ranked(embeddings[: len(query)], embeddings[len(query) :], query, gallery, top)
    return draw_rankings(found, f"{embedder.path.name} on {dataset.name}")


def ranked(
    query_features: Embeddings, gallery_features: Embeddings, query: Split, gallery: Split, top: int = TOP
) -> list[Ranking]:
    """Rank the gallery for each query, as `pmm_edge.retrieval.evaluate` does.

    Gallery images of the query's own identity and camera are left out, junk too; equal distances rank in the
    gallery's order.

    Args:
        query_features, gallery_features: (Q, D) and (G, D), rows as in `query` and `gallery`.

    Raises:
        DataError: NaN or infinity, or no query has a match in the gallery.
    """
    distances = euclidean_distances(query_features, gallery_features)
    labels = (query.pids, gallery.pids, query.camids, gallery.camids)
    result = evaluate_distances(distances, *labels)
    checked = check_labels(*labels, distances.shape)
    kept = checked.kept
    rankings = []
    for number in range(len(query)):
        row = distances[number, kept]
        _, left_out = checked.matches(number)
        row[left_out] = np.inf
        order = np.argsort(row, kind="stable")[: min(top, len(row) - len(left_out))]
        hits = [
            Hit(_shown(gallery, kept[at]), float(row[at]), bool(gallery.pids[kept[at]] == query.pids[number]))
            for at in order
        ]
        first, precision = int(result.first_match_rank[number]), float(result.average_precision[number])
        rankings.append(Ranking(_shown(query, number), tuple(hits), first, precision))
    return rankings


def draw_rankings(rankings: Sequence[Ranking], name: str) -> Image.Image:
    """Draw a row for each query: the query, then its hits, nearest first.

    Args:
        name: of the model and the data set, for the title.

    Raises:
        DataError: an image cannot be read.
    """
    rows = [[_query(ranking), *map(_hit, ranking.hits)] for ranking in rankings]
    most = max(len(ranking.hits) for ranking in rankings)
    return grid(
        rows,
        ["query", *(f"{rank}" for rank in range(1, most + 1))],
        title=f"{name}: what it finds nearest to each query",
        notes=[
            "Solid frame and tick: the same person. Dashed frame and cross: somebody else. Under a hit its Euclidean"
            " distance, who it is and which camera saw it; under a query its average precision and the rank of its"
            " first right hit. Images of the query's own person and camera are left out, as the Market-1501 protocol"
            " asks."
        ],
        wide_before=[1],
    )


def part(split: Split, indices: Sequence[int] | NDArray[np.intp]) -> Split:
    """Some images of a split."""
    rows = np.asarray(indices, dtype=np.intp)
    return Split([split.paths[row] for row in rows], split.pids[rows], split.camids[rows])


def _shown(split: Split, row: int | np.intp) -> Shown:
    return Shown(split.paths[row], int(split.pids[row]), int(split.camids[row]))


def _query(ranking: Ranking) -> Cell:
    judged = "no match"
    if ranking.first_match_rank:
        judged = f"AP {100 * ranking.average_precision:.0f} %\n1st right: {ranking.first_match_rank:,}"
    return Cell(_photo(ranking.query.path), f"{_who(ranking.query)}\n{judged}")


def _hit(hit: Hit) -> Cell:
    distance = f"{hit.distance:#.3g}".rstrip(".")  # 17.0 beside 16.4
    return Cell(_photo(hit.image.path), f"{distance}\n{_who(hit.image)}", hit.right)


def _who(image: Shown) -> str:
    return f"{'distractor' if image.pid == DISTRACTOR_PID else f'pid {image.pid}'} · c{image.camid}"


def _photo(path: Path) -> Image.Image:
    return Image.fromarray(read_crop(path, *_PHOTO))
