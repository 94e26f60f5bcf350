"""Retrieval figures of a model on a data set's queries and gallery."""

from __future__ import annotations

from pmm_edge.data.dataset import ReidDataset
from pmm_edge.progress import Report, silent
from pmm_edge.retrieval import RetrievalResult, evaluate
from pmm_edge.runtime import Embedder, embed_files
from pmm_edge.runtime.embedder import Embeddings


def evaluate_model(embedder: Embedder, dataset: ReidDataset, report: Report = silent) -> RetrievalResult:
    """Embed the queries and the gallery, and judge the ranking under the Market-1501 protocol.

    Raises:
        DataError: an image cannot be read, or the embeddings hold NaN or infinity.
    """
    paths = [*dataset.query.paths, *dataset.gallery.paths]
    return evaluate_embeddings(embed_files(embedder, paths, report=report), dataset)


def evaluate_embeddings(embeddings: Embeddings, dataset: ReidDataset) -> RetrievalResult:
    """Judge embeddings of the queries followed by the gallery, (queries + gallery images, D)."""
    query, gallery = dataset.query, dataset.gallery
    return evaluate(
        embeddings[: len(query)],
        embeddings[len(query) :],
        query.pids,
        gallery.pids,
        query.camids,
        gallery.camids,
    )
