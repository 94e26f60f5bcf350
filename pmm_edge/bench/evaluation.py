"""`pmm eval`: the retrieval of one model, with mirror images and re-ranking on request."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pmm_edge.bench.charts import check_cmc_plot, save_cmc_plot
from pmm_edge.console import Report, about, percent, silent
from pmm_edge.data.dataset import scan
from pmm_edge.files import check_output
from pmm_edge.retrieval import RetrievalResult
from pmm_edge.runtime import load
from pmm_edge.runtime.embed_files import embed_dataset


@dataclass(frozen=True, eq=False)
class EvaluationRow:
    """One way to use a model at test time, and its figures."""

    flip: bool
    """Whether the embedding of an image is the mean of its own and its mirror image's."""
    rerank: bool
    result: RetrievalResult

    @property
    def name(self) -> str:
        """`plain`, `flip`, `re-ranking` or `flip + re-ranking`."""
        return " + ".join(["flip"] * self.flip + ["re-ranking"] * self.rerank) or "plain"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The retrieval of one model on one data set."""

    model: Path
    data: Path
    dataset: str
    """Name of the data set."""
    gallery: int
    """Number of gallery images, without junk."""
    backend: str
    device: str
    rows: list[EvaluationRow]
    """The plain embeddings first."""


def evaluate_model(
    model: Path,
    data: Path,
    *,
    layout: str | None = None,
    rerank: bool = False,
    flip: bool = False,
    cmc: Path | None = None,
    features: Path | None = None,
    device: str | None = None,
    report: Report = silent,
) -> Evaluation:
    """Evaluate retrieval under the Market-1501 protocol.

    Args:
        model: see `pmm_edge.load`.
        data: folder of a data set.
        layout: layout of the data set, if it is not recognized.
        rerank: also evaluate k-reciprocal re-ranking.
        flip: also evaluate the mean embedding of each image and its mirror image.
        cmc: .png or .svg file for a plot of the CMC.
        features: .npz file for the embeddings; see `EmbeddedDataset.save`.
        device: see `pmm_edge.load`.
        report: receives progress.

    Raises:
        DataError: the data set cannot be used, or embeddings contain NaN or infinity.
        ModelError: the model cannot be loaded.
        OutputError: a file cannot be written.
    """
    dataset, embedder = scan(data, layout), load(model, device)
    if cmc:
        check_cmc_plot(cmc)
    if features:
        check_output(features, [".npz"])
    embedded = embed_dataset(embedder, dataset, flip, report)
    if features:
        embedded.save(features)
    rows = []
    for reranked in (False, True)[: 1 + rerank]:
        for flipped in (False, True)[: 1 + flip]:
            named = about("flip" if flipped else "plain", report)
            rows.append(EvaluationRow(flipped, reranked, embedded.evaluate(reranked, flip=flipped, report=named)))
    if cmc:
        labels = [f"{r.name}: Rank-1 {percent(r.result.rank(1))}, mAP {percent(r.result.mAP)}" for r in rows]
        curves = [(label, row.result.cmc.tolist()) for label, row in zip(labels, rows, strict=True)]
        save_cmc_plot(cmc, f"{dataset.name} · {model.name}", curves)
    gallery = len(embedded.dataset.gallery)
    return Evaluation(model, data, dataset.name, gallery, embedder.backend, embedder.device, rows)
