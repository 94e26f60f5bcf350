"""Pictures of the reference for the report: where its stages look, what it finds, what its training mixed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image

from pmm_edge.bench.html import Picture
from pmm_edge.bench.pipeline import Run
from pmm_edge.console import Report, silent
from pmm_edge.data.dataset import queries_with_match
from pmm_edge.errors import PmmError
from pmm_edge.images import evenly
from pmm_edge.pictures.attention import UnsuitableError
from pmm_edge.pictures.galleries import draw_rankings, part, ranked

IMAGES, QUERIES, ANCHORS, HITS = 6, 4, 4, 8


def network_pictures(run: Run, report: Report = silent) -> list[Picture]:
    """Draw what the reference and the images allow: Grad-CAM and mixing of checkpoints, rankings of data sets.

    Interrupted (Ctrl-C), it returns what is drawn by then: the figures of the bench are worth more.
    """
    made: tuple[tuple[str, str, Callable[[], Image.Image]], ...] = (
        (
            "Attention",
            "Where each stage finds evidence for the class that it predicts (Grad-CAM, each map scaled by itself)."
            " Good: bright on the person, and on another part of it in each stage.",
            lambda: _attention(run),
        ),
        (
            "Rankings",
            "Queries and the gallery images nearest to them. A solid green frame and a tick: the same person;"
            " a dashed red frame and a cross: somebody else.",
            lambda: _rankings(run),
        ),
        (
            "Mixing",
            "What training showed stages II and III: the blocks that the stage before found most salient, replaced by"
            " those of another person.",
            lambda: _mixing(run),
        ),
    )
    pictures = []
    for number, (title, caption, draw) in enumerate(made):
        report("drawing what the network sees", number, len(made), title.lower())
        try:
            pictures.append(Picture(title, caption, draw()))
        except (PmmError, RuntimeError):
            # An export has no heads, a folder of crops no identities, another network mixes nothing; torch is out of
            # memory: no picture is worth the figures.
            continue
        except KeyboardInterrupt:
            break
    report("drawing what the network sees", len(made), len(made))
    return pictures


def _attention(run: Run) -> Image.Image:
    path = _checkpoint(run)
    from pmm_edge.pictures.attention import cam_grid

    paths = run.images.paths
    return cam_grid(path, [paths[row] for row in evenly(len(paths), IMAGES)], device=run.options.device)


def _rankings(run: Run) -> Image.Image:
    dataset, embeddings = run.images.dataset, run.base.embeddings
    if dataset is None or embeddings is None:
        raise UnsuitableError(f"{run.images.source} has no identities to rank")
    answered = queries_with_match(dataset)
    chosen = answered[evenly(len(answered), QUERIES)]
    gallery = embeddings[len(dataset.query) :]
    rankings = ranked(embeddings[chosen], gallery, part(dataset.query, chosen), dataset.gallery, HITS)
    return draw_rankings(rankings, f"{run.base.name}, {dataset.name}")


def _mixing(run: Run) -> Image.Image:
    path = _checkpoint(run)
    from pmm_edge.pictures.mixing_grid import mixing_grid

    if run.images.dataset is None or not len(run.images.dataset.train):
        raise UnsuitableError(f"{run.images.source} has no training split")
    return mixing_grid(path, run.images.dataset.train, count=ANCHORS, device=run.options.device)


def _checkpoint(run: Run) -> Path:
    """The reference, which only PyTorch runs with its heads: exports have none, and may be here without torch."""
    if run.base.embedder.path.suffix not in (".pt", ".pth"):
        raise UnsuitableError(f"{run.base.embedder.path} is an export")
    return run.base.embedder.path
