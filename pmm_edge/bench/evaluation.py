"""`pmm eval`: the retrieval of one model, optionally with mirror images and re-ranking."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    model: Path | Embedder,
    data: Path,
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
) -> Evaluation:
    """Evaluate retrieval under the Market-1501 protocol.

    Images are ranked by Euclidean or by cosine `distance`, which is 1 - cosine. `rerank` adds k-reciprocal re-ranking,
    `flip` the mean embedding of each image and its mirror image, `tracklets` pooled queries and gallery, see
    `pmm_edge.pool`. `cmc` is a .png or .svg file for a plot of the CMC, `features` an .npz file with the arrays
    `query_features`, `query_pids`, `query_camids` and `query_names`, the same for `gallery_`, and with `flip`
    `query_features_flip`. Raises DataError or ModelError if the data set or the model cannot be used, OutputError if a
    file cannot be written.
    """
    dataset = scan(data, layout, training=False)
    embedder, name = (model, model.path.name) if isinstance(model, Embedder) else (load(model, device), model.name)
    warn_ignored(data, dataset.ignored)
    warn_of_choices(dataset)
    if tracklets:
        require_tracklets(dataset)
    if cmc:
        check_plot(cmc)
    if features:
        check_output(features, [".npz"])
    dataset = dataset.without_junk()
    query, gallery = dataset.query, dataset.gallery
    embedded = embed_dataset(embedder, dataset, flip, report)
    kinds = {"plain": embedded.embeddings} | ({} if embedded.flipped is None else {"flip": embedded.flipped})
    if features:
        arrays: dict[str, ArrayLike] = {}
        for side, split, part in (("query", query, slice(len(query))), ("gallery", gallery, slice(len(query), None))):
            arrays |= {f"{side}_features{'_flip' * (kind == 'flip')}": found[part] for kind, found in kinds.items()}
            arrays |= {f"{side}_pids": split.pids, f"{side}_camids": split.camids}
            arrays[f"{side}_names"] = [path.name for path in split.paths]
        save_npz(features, arrays)
    rows = {name: (dataset, embeddings) for name, embeddings in kinds.items()}
    if tracklets:
        rows |= {_with("tracklets", name): pool_dataset(dataset, found) for name, found in kinds.items()}
    results = {}
    for reranked in (False, True)[: 1 + rerank]:
        for kind, (ranked, embeddings) in rows.items():
            row = _with("re-ranking", kind) if reranked else kind
            results[row] = evaluate_dataset(ranked, embeddings, reranked, distance, about(kind, report))
    if cmc:
        curves = {
            f"{name}: Rank-1 {percent(one.rank(1))}, mAP {percent(one.mAP)}": one.cmc.tolist()
            for name, one in results.items()
        }
        save_cmc_plot(cmc, printable(f"{dataset.name} · {name} · {distance} distance"), curves)
    return Evaluation(embedder, dataset, results, distance)


def _with(addition: str, name: str) -> str:
    """Name of a row of results to which something is added."""
    return addition if name == "plain" else f"{name} + {addition}"


def evaluate_across(
    model: Path, data: Sequence[Path], *, layout: str | None = None, device: str | None = None, **options: Any
) -> list[Evaluation]:
    """Evaluate a model on data sets as `evaluate_model` does, with its other `options`.

    All data sets are read before the first one is evaluated. Raises PmmError if there are several and a file to write.
    """
    if len(data) == 1:
        return [evaluate_model(model, data[0], layout=layout, device=device, **options)]
    if options.get("cmc") or options.get("features"):
        raise PmmError("--cmc and --features write one data set", "Evaluate the data sets one by one")
    for path in data:
        dataset = scan(path, layout, training=False)
        if options.get("tracklets"):
            require_tracklets(dataset)
    embedder, report = load(model, device), options.pop("report", silent)
    return [evaluate_model(embedder, path, layout=layout, report=about(path.name, report), **options) for path in data]
