"""Ranked galleries: a query and its nearest gallery images, right and wrong."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pmm_edge.console import Report, silent
from pmm_edge.data.dataset import ReidDataset, Split
from pmm_edge.files import written_whole
from pmm_edge.gallery.gallery import SearchResult
from pmm_edge.images import BadImage, read_crop, try_crop, warn_skipped
from pmm_edge.pictures.grid import Cell, grid
from pmm_edge.retrieval import evaluate_distances, pairwise_distances
from pmm_edge.retrieval.metrics import DISTRACTOR_PID, check_labels
from pmm_edge.runtime import Embedder, embed_files
from pmm_edge.runtime.embedder import Embeddings

TOP = 10
MOST = 100
"""Maximum number of rows of a picture, and of hits in a row; the size of what matplotlib draws is limited."""
PHOTO = (208, 104)
"""Height and width of the pictures in pixels."""


class Ranking(NamedTuple):
    """The gallery images nearest to one query under the Market-1501 protocol."""

    hits: NDArray[np.intp]
    """(K,) rows of the gallery, nearest first."""
    distances: NDArray[np.float32]
    first_match_rank: int
    """From 1; 0 if the gallery has no match."""
    average_precision: float
    """In 0..1 over the whole ranking; NaN if the gallery has no match."""


def gallery_grid(
    embedder: Embedder,
    dataset: ReidDataset,
    queries: Sequence[int] | NDArray[np.intp],
    *,
    top: int = TOP,
    report: Report = silent,
) -> Image.Image:
    """Embed some queries, given as indices into `dataset.query`, and the gallery; draw the `top` images of each query.

    Unreadable images are skipped with a warning. Raises DataError if no query is left that has a match in the gallery.
    """
    query, gallery = dataset.query.select(queries), dataset.without_junk().gallery
    embedded = embed_files(embedder, [*query.paths, *gallery.paths], skip_bad=True, report=report)
    warn_skipped(embedded.skipped, "the picture")
    bad, embeddings = {image.path for image in embedded.skipped}, embedded.embeddings
    query, gallery = query.without(bad), gallery.without(bad)
    if not len(query) or not len(gallery):
        raise embedded.skipped[0].error("Replace it: no query, or nothing in the gallery, is left to draw")
    found = rank(embeddings[: len(query)], embeddings[len(query) :], query, gallery, top)
    return draw_rankings(found, query, gallery, f"{embedder.path.name} on {dataset.name}")


def rank(
    query_features: Embeddings, gallery_features: Embeddings, query: Split, gallery: Split, top: int = TOP
) -> list[Ranking]:
    """Rank the gallery for each query, as `pmm_edge.evaluate` does; ties keep the order of the gallery.

    The features are (Q, D) and (G, D), with rows as in `query` and `gallery`. Raises DataError if a feature is NaN or
    infinite, or no query has a match in the gallery.
    """
    distances = pairwise_distances(query_features, gallery_features)
    labels = (query.pids, gallery.pids, query.camids, gallery.camids)
    result = evaluate_distances(distances, *labels)
    checked = check_labels(labels, distances.shape)
    rankings = []
    for number, first_match_rank in enumerate(result.first_match_rank.tolist()):
        row = distances[number, checked.kept]
        _, excluded = checked.matches(number)  # same identity and camera
        row[excluded] = np.inf
        order = np.argsort(row, kind="stable")[: min(top, len(row) - len(excluded))]
        precision = float(result.average_precision[number])
        rankings.append(Ranking(checked.kept[order], row[order], first_match_rank, precision))
    return rankings


def draw_rankings(rankings: Sequence[Ranking], query: Split, gallery: Split, name: str) -> Image.Image:
    """Draw one row per query: the query, then its hits, nearest first. `name` of model and data set is for the title.

    Raises DataError if an image cannot be read.
    """
    rows = []
    for number, ranking in enumerate(rankings):
        judged = "no match"
        if ranking.first_match_rank:
            judged = f"AP {100 * ranking.average_precision:.0f} %\n1st match: {ranking.first_match_rank:,}"
        rows.append([_cell(query, number, judged)])
        for hit, distance in zip(ranking.hits, ranking.distances, strict=True):
            right = bool(gallery.pids[hit] == query.pids[number])
            rows[-1].append(_cell(gallery, hit, f"{distance:#.3g}".rstrip("."), right))
    return grid(
        rows,
        ["query", *map(str, range(1, max(map(len, rows))))],
        title=f"{name}: nearest gallery images",
        note="Solid frame and tick: same person. Dashed frame and cross: another person. Below each hit: identity,"
        " camera and Euclidean distance; below each query: average precision and rank of the first match. Images of the"
        " query's identity and camera are excluded, as in the Market-1501 protocol.",
        wide_before=[1],
    )


def draw_search(results: Sequence[SearchResult], out: Path) -> None:
    """Draw one or more queries and their hits, up to `MOST` of each; gray stands for what is not a readable image."""
    rows = []
    for one in results[:MOST]:
        rows.append([Cell(_photo(one.query), one.verdict)])
        for hit in one.hits[:MOST]:
            who = "unknown" if hit.pid is None else f"pid {hit.pid}"
            camera = hit.camera and f" · {'c' * hit.camera.isdecimal()}{hit.camera}"
            rows[-1].append(
                Cell(_photo(hit.source), f"{who}{camera}\n{hit.distance:#.3g}".rstrip("."), hit.same_person)
            )
    picture = grid(
        rows,
        ["query", *map(str, range(1, max(map(len, rows))))],
        title="nearest rows of the gallery",
        note="Solid frame and tick: within the threshold. Dashed frame and cross: not. Below each hit: identity, camera"
        f" and {results[0].distance} distance.",
        wide_before=[1],
    )
    with written_whole(out) as temporary:
        picture.save(temporary, "PNG" if out.suffix.lower() == ".png" else "JPEG")


def _photo(source: str) -> Image.Image:
    crop = try_crop(Path(source), *PHOTO)
    return Image.new("RGB", PHOTO[::-1], "lightgray") if isinstance(crop, BadImage) else Image.fromarray(crop)


def _cell(split: Split, row: int, judged: str, right: bool | None = None) -> Cell:
    who = "distractor" if split.pids[row] == DISTRACTOR_PID else f"pid {split.pids[row]}"
    return Cell(Image.fromarray(read_crop(split.paths[row], *PHOTO)), f"{who} · c{split.camids[row]}\n{judged}", right)
