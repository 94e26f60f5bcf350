"""Pictures of the reference for the report: attention, rankings, mixing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from pmm_edge.bench.html import Picture
from pmm_edge.console import Report, silent
from pmm_edge.data.dataset import ReidDataset, queries_with_match
from pmm_edge.errors import PmmError
from pmm_edge.images import evenly
from pmm_edge.pictures.galleries import draw_rankings, rank
from pmm_edge.runtime.embedder import Embeddings

IMAGES, QUERIES, ANCHORS, MATCHES = 6, 4, 4, 8
_CAPTIONS = {
    "Attention": "Grad-CAM of each stage for the class that it predicts, scaled per map. In a good model each stage"
    " looks at a different part of the person, not at the background.",
    "Rankings": "Queries and their nearest gallery images. Solid green frame and check mark: same person. Dashed red"
    " frame and cross: different person.",
    "Mixing": "What stages II and III see in training: the blocks that the previous stage found most salient are"
    " replaced by blocks of another person.",
}


def network_pictures(
    reference: Path,
    images: Sequence[Path],
    dataset: ReidDataset | None,
    embeddings: Embeddings | None,
    device: str | None = None,
    report: Report = silent,
) -> list[Picture]:
    """Draw Grad-CAM and mixing of a checkpoint, and rankings of a data set.

    `images` are the files that were embedded. With `dataset` they are its queries followed by its gallery, in the order
    of `embeddings`. A picture that fails is left out, and an interrupt (Ctrl-C) keeps those drawn so far: the
    measurements of the bench are worth more than a picture.
    """
    planned: dict[str, Callable[[], Image.Image]] = {}
    if reference.suffix in (".pt", ".pth"):  # exports have no heads
        from pmm_edge.pictures.attention import attention_of, cam_grid
        from pmm_edge.pictures.mixing_grid import mixing_grid

        shown = [images[row] for row in evenly(len(images), IMAGES)]
        planned["Attention"] = lambda: cam_grid(attention_of(reference, shown, device=device), range(len(shown)))
    if dataset and embeddings is not None:
        chosen = (answered := queries_with_match(dataset))[evenly(len(answered), QUERIES)]
        query, gallery = dataset.query.select(chosen), dataset.gallery
        own, theirs = embeddings[chosen], embeddings[len(dataset.query) :]
        planned["Rankings"] = lambda: draw_rankings(
            rank(own, theirs, query, gallery, MATCHES), query, gallery, f"{reference.name}, {dataset.name}"
        )
    if dataset and len(dataset.train) and "Attention" in planned:
        planned["Mixing"] = lambda: mixing_grid(reference, dataset.train, count=ANCHORS, device=device)
    drawn = []
    for number, (title, draw) in enumerate(planned.items()):
        report("drawing pictures", number, len(planned), title.lower())
        try:
            drawn.append(Picture(title, _CAPTIONS[title], draw()))
        except (PmmError, RuntimeError):  # a network that mixes nothing; PyTorch is out of memory
            continue
        except KeyboardInterrupt:
            break
    report("drawing pictures", len(planned), len(planned))
    return drawn
