"""Retrieval of a model on a data set's queries and gallery: as it is, with mirror images, re-ranked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pmm_edge.data.dataset import ReidDataset, Split
from pmm_edge.files import written_whole
from pmm_edge.progress import Report, about, silent
from pmm_edge.retrieval import RetrievalResult, evaluate
from pmm_edge.retrieval.protocol import JUNK_PID
from pmm_edge.runtime import Embedder, embed_files
from pmm_edge.runtime.crops import Pixels
from pmm_edge.runtime.embedder import Embeddings


@dataclass(frozen=True, eq=False)
class Embedded:
    """A data set's queries followed by its gallery, as a model sees them."""

    dataset: ReidDataset
    """Without junk, which no figure counts."""
    plain: Embeddings
    """(queries + gallery images, D)."""
    flip: Embeddings | None = None
    """The same shape: the mean of an image's embedding and its mirror image's."""

    def save(self, path: Path) -> None:
        """Write plain arrays, an .npz file that `numpy.load` opens without pickle.

        `query_features`, `query_pids`, `query_camids` and `query_names` (file names), the same with `gallery_`, and
        where there are mirror images `query_features_flip` and `gallery_features_flip`.

        Raises:
            OutputError: the file cannot be written.
        """
        arrays: dict[str, NDArray[Any]] = {}
        count = len(self.dataset.query)
        for side, split, part in (
            ("query", self.dataset.query, slice(count)),
            ("gallery", self.dataset.gallery, slice(count, None)),
        ):
            arrays[f"{side}_features"] = self.plain[part]
            if self.flip is not None:
                arrays[f"{side}_features_flip"] = self.flip[part]
            arrays |= {f"{side}_pids": split.pids, f"{side}_camids": split.camids}
            arrays[f"{side}_names"] = np.array([file.name for file in split.paths])
        with written_whole(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub takes any of them for allow_pickle


@dataclass(frozen=True, eq=False)
class Row:
    """One way of using a model at test time, and its figures."""

    flip: bool
    rerank: bool
    result: RetrievalResult

    @property
    def name(self) -> str:
        """`plain`, `flip`, `re-ranking` or `flip + re-ranking`."""
        return _name(self.flip, self.rerank)


def embed_dataset(embedder: Embedder, dataset: ReidDataset, flip: bool = False, report: Report = silent) -> Embedded:
    """Embed the queries and the gallery without its junk.

    Args:
        embedder: the model.
        dataset: what it is judged on.
        flip: embed each image's mirror image as well and average the two, at twice the time.
        report: told after each batch how many images are done.

    Raises:
        DataError: an image cannot be read.
    """
    dataset = replace(dataset, gallery=_without_junk(dataset.gallery))
    paths = [*dataset.query.paths, *dataset.gallery.paths]
    plain = embed_files(embedder, paths, report=report)
    if not flip:
        return Embedded(dataset, plain)
    mean = embed_files(_Mirrored(embedder), paths, report=about("mirrored", report))
    mean += plain
    mean /= 2
    return Embedded(dataset, plain, mean)


def judge(embedded: Embedded, rerank: bool = False, report: Report = silent) -> list[Row]:
    """Judge the ranking under the Market-1501 protocol.

    The plain embeddings come first, then those with mirror images where there are any; with `rerank` both once more,
    k-reciprocally re-ranked.

    Raises:
        DataError: the embeddings hold NaN or infinity, or no query has a match.
    """
    rows = []
    for reranked in (False, True) if rerank else (False,):
        for flip, embeddings in ((False, embedded.plain), (True, embedded.flip)):
            if embeddings is not None:
                told = about(_name(flip, rerank=False), report)
                result = evaluate_embeddings(embeddings, embedded.dataset, rerank=reranked, report=told)
                rows.append(Row(flip, reranked, result))
    return rows


def evaluate_embeddings(
    embeddings: Embeddings, dataset: ReidDataset, rerank: bool = False, report: Report = silent
) -> RetrievalResult:
    """Judge embeddings of the queries followed by the gallery, (queries + gallery images, D)."""
    query, gallery = dataset.query, dataset.gallery
    return evaluate(
        embeddings[: len(query)],
        embeddings[len(query) :],
        query.pids,
        gallery.pids,
        query.camids,
        gallery.camids,
        rerank=rerank,
        report=report,
    )


class _Mirrored(Embedder):
    """An embedder that sees every image in a mirror."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__(embedder.spec, embedder.path, embedder.backend, embedder.device)
        self.profile = embedder.profile
        self._embedder = embedder

    def embed_prepared(self, images: Pixels) -> Embeddings:
        # A copy: the back ends do not take the negative strides of a view.
        return self._embedder.embed_prepared(np.ascontiguousarray(images[:, :, ::-1]))


def _without_junk(gallery: Split) -> Split:
    kept = np.flatnonzero(gallery.pids != JUNK_PID)
    return Split([gallery.paths[index] for index in kept], gallery.pids[kept], gallery.camids[kept])


def _name(flip: bool, rerank: bool) -> str:
    return " + ".join(["flip"] * flip + ["re-ranking"] * rerank) or "plain"
