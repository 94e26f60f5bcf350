"""`pmm eval`: the retrieval of one model, optionally with mirror images and re-ranking."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from numpy.typing import ArrayLike

from pmm_edge.bench.charts import check_plot, save_cmc_plot
from pmm_edge.console import Report, about, percent, printable, silent
from pmm_edge.data.checks import warn_of_choices
from pmm_edge.data.dataset import ReidDataset, scan, warn_ignored
from pmm_edge.errors import PmmError
from pmm_edge.files import check_output
from pmm_edge.retrieval import RetrievalResult
from pmm_edge.runtime import Embedder, load
from pmm_edge.runtime.embed_files import embed_dataset, evaluate_dataset, pool_dataset, require_tracklets, save_npz
from pmm_edge.runtime.embedder import Embeddings
from pmm_edge.spec import Distance


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The retrieval of one model on one data set, without junk.

    `results` are `plain`, `flip`, `tracklets`, `flip + tracklets`, and each of them with `re-ranking`.
    """

    embedder: Embedder
    dataset: ReidDataset
    results: dict[str, RetrievalResult]
    distance: Distance


def evaluate_model(
    model: Path,
    data: Sequence[Path],
    *,
    layout: str | None = None,
    distance: Distance = "euclidean",
    rerank: bool = False,
    flip: bool = False,
    tracklets: bool = False,
    cmc: Path | None = None,
    features: Path | None = None,
    device: str | None = None,
    report: Report = silent,
) -> list[Evaluation]:
    """Evaluate the retrieval of a model on each data set, under the Market-1501 protocol.

    Images are ranked by Euclidean or by cosine `distance`, which is 1 - cosine. `rerank` adds k-reciprocal re-ranking,
    `flip` the mean embedding of each image and its mirror image, `tracklets` pooled queries and gallery, see
    `pmm_edge.pool`. For one data set, `cmc` is a .png or .svg file for a plot of the CMC, `features` an .npz file with
    the arrays `query_features`, `query_pids`, `query_camids` and `query_names`, the same for `gallery_`, and with
    `flip` `query_features_flip`. All data sets are read before the first one is evaluated. Raises DataError or
    ModelError if a data set or the model cannot be used, OutputError if a file cannot be written, PmmError for a file
    of several data sets.
    """
    if len(data) > 1 and (cmc or features):
        raise PmmError("--cmc and --features write one data set", "Evaluate the data sets one by one")
    datasets = [scan(path, layout, training=False) for path in data]
    for dataset in datasets:
        warn_ignored(dataset.root, dataset.ignored)
        warn_of_choices(dataset)
        if tracklets:
            require_tracklets(dataset)
    if cmc:
        check_plot(cmc)
    if features:
        check_output(features, [".npz"])
    embedder, evaluations = load(model, device), []
    for dataset in (one.without_junk() for one in datasets):
        step = about(dataset.name, report) if len(data) > 1 else report
        embedded = embed_dataset(embedder, dataset, flip, step)
        kinds = {"plain": embedded.embeddings} | ({} if embedded.flipped is None else {"flip": embedded.flipped})
        if features:
            _save_features(features, dataset, kinds)
        rows = {name: (dataset, embeddings) for name, embeddings in kinds.items()}
        if tracklets:
            rows |= {_with("tracklets", name): pool_dataset(dataset, found) for name, found in kinds.items()}
        results = {}
        for reranked in (False, True)[: 1 + rerank]:
            for kind, (ranked, embeddings) in rows.items():
                row = _with("re-ranking", kind) if reranked else kind
                results[row] = evaluate_dataset(ranked, embeddings, reranked, distance, about(kind, step))
        evaluations.append(Evaluation(embedder, dataset, results, distance))
        if cmc:
            curves = {
                f"{name}: Rank-1 {percent(one.rank(1))}, mAP {percent(one.mAP)}": one.cmc.tolist()
                for name, one in results.items()
            }
            save_cmc_plot(cmc, printable(f"{dataset.name} · {model.name} · {distance} distance"), curves)
    return evaluations


def _save_features(path: Path, dataset: ReidDataset, kinds: Mapping[str, Embeddings]) -> None:
    """Save the embeddings of each kind, `plain` or `flip`, for queries and gallery, with their labels and names."""
    arrays: dict[str, ArrayLike] = {}
    query, gallery = slice(len(dataset.query)), slice(len(dataset.query), None)
    for side, split, part in (("query", dataset.query, query), ("gallery", dataset.gallery, gallery)):
        arrays |= {f"{side}_features{'_flip' * (kind == 'flip')}": found[part] for kind, found in kinds.items()}
        arrays |= {f"{side}_pids": split.pids, f"{side}_camids": split.camids}
        arrays[f"{side}_names"] = [one.name for one in split.paths]
    save_npz(path, arrays)


def _with(addition: str, name: str) -> str:
    """Name of a row of results to which something is added."""
    return addition if name == "plain" else f"{name} + {addition}"
