"""`pmm eval`: the retrieval of one model, optionally with mirror images and re-ranking."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from pmm_edge.bench.charts import check_cmc_plot, save_cmc_plot
from pmm_edge.console import Report, about, percent, silent
from pmm_edge.data.dataset import scan
from pmm_edge.files import check_output
from pmm_edge.retrieval import RetrievalResult
from pmm_edge.retrieval.metrics import JUNK_PID
from pmm_edge.runtime import embed_files, load
from pmm_edge.runtime.embed_files import evaluate_dataset, save_npz


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

    `rerank` adds k-reciprocal re-ranking, `flip` the mean embedding of each image and its mirror image. `cmc` is a .png
    or .svg file for a plot of the CMC, `features` an .npz file with the arrays `query_features`, `query_pids`,
    `query_camids` and `query_names`, the same for `gallery_`, and with `flip` `query_features_flip`.

    Raises DataError or ModelError if the data set or the model cannot be used, OutputError if a file cannot be written.
    """
    dataset, embedder = scan(data, layout), load(model, device)
    if cmc:
        check_cmc_plot(cmc)
    if features:
        check_output(features, [".npz"])
    # Without junk, which no metric counts.
    dataset = replace(dataset, gallery=dataset.gallery.select(np.flatnonzero(dataset.gallery.pids != JUNK_PID)))
    query, gallery = dataset.query, dataset.gallery
    embedded = embed_files(embedder, [*query.paths, *gallery.paths], flip=flip, report=report)
    kinds = {False: embedded.embeddings} | ({} if embedded.flipped is None else {True: embedded.flipped})
    if features:
        arrays: dict[str, ArrayLike] = {}
        for side, split, part in (("query", query, slice(len(query))), ("gallery", gallery, slice(len(query), None))):
            arrays |= {f"{side}_features{'_flip' * flipped}": found[part] for flipped, found in kinds.items()}
            arrays |= {f"{side}_pids": split.pids, f"{side}_camids": split.camids}
            arrays[f"{side}_names"] = [path.name for path in split.paths]
        save_npz(features, arrays)
    rows = []
    for reranked in (False, True)[: 1 + rerank]:
        for flipped, embeddings in kinds.items():
            named = about("flip" if flipped else "plain", report)
            rows.append(EvaluationRow(flipped, reranked, evaluate_dataset(dataset, embeddings, reranked, named)))
    if cmc:
        curves = {
            f"{row.name}: Rank-1 {percent(row.result.rank(1))}, mAP {percent(row.result.mAP)}": row.result.cmc.tolist()
            for row in rows
        }
        save_cmc_plot(cmc, f"{dataset.name} · {model.name}", curves)
    return Evaluation(model, data, dataset.name, len(gallery), embedder.backend, embedder.device, rows)
