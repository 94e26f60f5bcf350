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
from pmm_edge.pictures.galleries import draw_rankings, part, rank
from pmm_edge.runtime.embedder import Embeddings

IMAGES, QUERIES, ANCHORS, MATCHES = 6, 4, 4, 8
_WHAT = "drawing pictures"


def network_pictures(
    reference: Path,
    images: Sequence[Path],
    dataset: ReidDataset | None,
    embeddings: Embeddings | None,
    device: str | None = None,
    report: Report = silent,
) -> list[Picture]:
    """Draw what reference and images allow: Grad-CAM and mixing need a checkpoint, rankings need identities.

    A picture that fails is left out, and an interrupt (Ctrl-C) keeps the pictures drawn so far: the measurements of
    the bench are worth more than a picture.

    Args:
        reference: the reference model.
        images: the files that were embedded.
        dataset: the data set that the files come from; None if retrieval was not evaluated.
        embeddings: the reference's, queries first, then the gallery.
        device: as for `pmm_edge.load`.
        report: progress.
    """
    is_checkpoint = reference.suffix in (".pt", ".pth")

    def attention() -> Image.Image:
        from pmm_edge.pictures.attention import cam_grid

        return cam_grid(reference, [images[row] for row in evenly(len(images), IMAGES)], device=device)

    def rankings() -> Image.Image:
        assert dataset is not None and embeddings is not None
        answered = queries_with_match(dataset)
        chosen = answered[evenly(len(answered), QUERIES)]
        gallery = embeddings[len(dataset.query) :]
        found = rank(embeddings[chosen], gallery, part(dataset.query, chosen), dataset.gallery, MATCHES)
        return draw_rankings(found, f"{reference.name}, {dataset.name}")

    def mixing() -> Image.Image:
        from pmm_edge.pictures.mixing_grid import mixing_grid

        assert dataset is not None
        return mixing_grid(reference, dataset.train, count=ANCHORS, device=device)

    planned: list[tuple[bool, str, str, Callable[[], Image.Image]]] = [
        (
            is_checkpoint,
            "Attention",
            "Grad-CAM of each stage for the class that it predicts, scaled per map. In a good model each stage looks"
            " at a different part of the person, not at the background.",
            attention,
        ),
        (
            dataset is not None and embeddings is not None,
            "Rankings",
            "Queries and their nearest gallery images. Solid green frame and check mark: same person. Dashed red frame"
            " and cross: different person.",
            rankings,
        ),
        (
            is_checkpoint and dataset is not None and len(dataset.train) > 0,
            "Mixing",
            "What stages II and III see in training: the blocks that the previous stage found most salient are"
            " replaced by blocks of another person.",
            mixing,
        ),
    ]
    drawn = []
    for number, (possible, title, caption, draw) in enumerate(planned):
        report(_WHAT, number, len(planned), title.lower())
        try:
            if possible:
                drawn.append(Picture(title, caption, draw()))
        except (PmmError, RuntimeError):  # another network that mixes nothing; PyTorch is out of memory
            continue
        except KeyboardInterrupt:
            break
    report(_WHAT, len(planned), len(planned))
    return drawn
