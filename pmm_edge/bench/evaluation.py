"""`pmm eval`: retrieval of any model that loads, as it is, with mirror images, and re-ranked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pmm_edge.bench.charts import check_cmc_plot, save_cmc_plot
from pmm_edge.console import Report, about, percent, silent
from pmm_edge.data.dataset import scan
from pmm_edge.files import check_output
from pmm_edge.retrieval import RetrievalResult
from pmm_edge.runtime import load
from pmm_edge.runtime.embed_files import EmbeddedDataset, embed_dataset


@dataclass(frozen=True, eq=False)
class EvaluationRow:
    """One way of using a model at test time."""

    flip: bool
    """Embeddings are means over each image and its mirror image."""
    rerank: bool
    """Rankings are k-reciprocally re-ranked."""
    result: RetrievalResult

    @property
    def name(self) -> str:
        """`plain`, `flip`, `re-ranking` or `flip + re-ranking`."""
        return " + ".join(["flip"] * self.flip + ["re-ranking"] * self.rerank) or "plain"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Retrieval of a model on a data set."""

    model: str
    data: str
    backend: str
    device: str
    dataset: str
    """Name of the data set."""
    gallery: int
    """Gallery images without junk."""
    rows: list[EvaluationRow]
    """The plain one first."""


def evaluate_model(
    model: Path,
    data: Path,
    layout: str | None = None,
    rerank: bool = False,
    flip: bool = False,
    cmc: Path | None = None,
    features: Path | None = None,
    device: str | None = None,
    report: Report = silent,
) -> Evaluation:
    """Evaluate a model under the Market-1501 protocol.

    Args:
        model: a file for `pmm_edge.load`.
        data: a data set.
        layout: layout of the data set, if it is not recognized.
        rerank: also re-rank.
        flip: also evaluate the mean of the embeddings of each image and its mirror image.
        cmc: plot the CMC into this .png or .svg file.
        features: save the embeddings in this .npz file.
        device: see `pmm_edge.load`.
        report: called as work proceeds.

    Raises:
        DataError: the data set cannot be read, or no query has a match.
        ModelError: the model cannot be loaded.
        OutputError: a file cannot be written.
    """
    if cmc:
        check_cmc_plot(cmc)
    if features:
        check_output(features, [".npz"])
    dataset, embedder = scan(data, layout), load(model, device)
    embedded = embed_dataset(embedder, dataset, flip, report)
    if features:
        embedded.save(features)
    rows = evaluate_embedded(embedded, rerank, report)
    if cmc:
        curves = [
            (
                f"{row.name}: Rank-1 {percent(row.result.rank(1))}, mAP {percent(row.result.mAP)}",
                row.result.cmc.tolist(),
            )
            for row in rows
        ]
        save_cmc_plot(cmc, f"{dataset.name} · {model.name}", curves)
    gallery = len(embedded.dataset.gallery)
    return Evaluation(str(model), str(data), embedder.backend, embedder.device, dataset.name, gallery, rows)


def evaluate_embedded(embedded: EmbeddedDataset, rerank: bool = False, report: Report = silent) -> list[EvaluationRow]:
    """Evaluate embeddings plain and, if present, flipped; with `rerank` also both re-ranked."""
    rows = []
    for reranked in (False, True) if rerank else (False,):
        for flip in (False,) if embedded.flipped is None else (False, True):
            told = about("flip" if flip else "plain", report)
            rows.append(EvaluationRow(flip, reranked, embedded.evaluate(rerank=reranked, flip=flip, report=told)))
    return rows
