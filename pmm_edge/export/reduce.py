"""Make the embedding of a trained network smaller without training: PCA of the embeddings of its training images.

The projection becomes the last linear layer of the network. A ReLU precedes it, so it cannot be folded into the heads.
The reduced network is a checkpoint in a run folder of its own, `RUN/reduced-256/best.pt`, which every command accepts
like any other: it has its own retrieval figures and decision thresholds.

The axes are those of PCA, the eigenvectors of the covariance, largest variance first. The mean is not subtracted from
the embeddings, though. Euclidean distances do not depend on it. Cosines do: without the subtraction they approximate
those of the full embedding, and mAP by cosine is slightly higher on the quickstart's network (docs/reduction.md).
Whitened embeddings are centered, as those of scikit-learn's `PCA(whiten=True)`, which is better by cosine.
"""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pmm_edge import __version__
from pmm_edge.console import Report, about
from pmm_edge.data.checks import warn_of_choices
from pmm_edge.data.dataset import ReidDataset, data_sha256, scan
from pmm_edge.errors import DataError, ModelError, PmmError, PmmWarning
from pmm_edge.files import sha256
from pmm_edge.images import evenly, warn_skipped
from pmm_edge.model import Checkpoint, load_checkpoint, save_checkpoint
from pmm_edge.retrieval.metrics import DISTRACTOR_PID
from pmm_edge.runs import BEST, REDUCED, AboutRun, data_of, run_of, write_about_run
from pmm_edge.runtime.embed_files import (
    cosine_figures,
    dataset_thresholds,
    embed_dataset,
    embed_files,
    evaluate_dataset,
)
from pmm_edge.runtime.embedder import Embeddings
from pmm_edge.runtime.torch_backend import TorchEmbedder
from pmm_edge.spec import Calibration, Reduction

MAX_IMAGES = 20_000
"""Training images to embed, spread evenly. More do not change the axes, and the covariance needs few."""


def reduced_path(checkpoint: Path, size: int, whiten: bool) -> Path:
    """Where the reduced checkpoint is written: `reduced-256/best.pt` next to best.pt, `reduced-256-last` to last.pt."""
    name = "" if checkpoint.name == BEST else f"-{checkpoint.stem}"
    return checkpoint.parent / f"{REDUCED}{size}{'-whitened' * whiten}{name}" / BEST


def reduce_checkpoint(
    path: Path, full: Checkpoint, size: int, whiten: bool, data: Path | None, layout: str | None, report: Report
) -> Checkpoint:
    """Write the checkpoint of `full`, which `path` contains, with embeddings of `size` values to `reduced_path`.

    The training split of `data`, by default the run's data set, sets the projection; query and gallery give the
    retrieval figures and decision thresholds. A reduced checkpoint that was made from the same checkpoint and data set
    is kept, with thresholds that `pmm calibrate` may have written into it.

    Raises ModelError if the checkpoint is reduced already, PmmError if the size is out of range, DataError if the data
    set cannot be used.
    """
    spec, out = full.spec, reduced_path(path, size, whiten)
    if spec.reduction:
        problem = f"the embedding of {path} was reduced already, from {spec.reduction.from_size} values"
        raise ModelError(problem, "Name the checkpoint with the full embedding")
    if not 1 <= size < spec.embedding_size:
        problem = f"the embedding has {spec.embedding_size} values and cannot be reduced to {size}"
        raise PmmError(problem, f"Choose --embedding-size from 1 to {spec.embedding_size - 1}")
    if data is None and run_of(path) is None:
        problem = f"{path} is not in a run folder, so its data set is unknown"
        raise DataError(problem, "Name one with --calibration")
    source, layout = data_of(path, data, layout)
    dataset = scan(source, layout)
    warn_of_choices(dataset)
    people = np.flatnonzero(dataset.train.pids > DISTRACTOR_PID)
    paths = [dataset.train.paths[people[place]] for place in evenly(len(people), MAX_IMAGES)]
    _check_number(len(paths), size, source)
    origin, fingerprint = spec.checkpoint_sha256 or sha256(path), dataset.fingerprint()
    as_run = AboutRun(out.parent.name, str(source.resolve()), __version__, layout)
    if kept := _kept(out, (size, whiten, origin, fingerprint)):
        write_about_run(out.parent, as_run)  # the data set may have moved
        return kept

    embedder, judged = TorchEmbedder(full.network(), spec, path), dataset.without_junk()
    trained = embed_files(embedder, paths, skip_bad=True, report=about("training images", report))
    warn_skipped(trained.skipped, "the reduction")
    _check_number(len(trained.embeddings), size, source)
    if not np.isfinite(trained.embeddings).all():
        raise ModelError(f"{path} produces NaN or infinity", "Train again with a lower learning rate")
    projection, variance = principal_projection(trained.embeddings, size, whiten)
    before = embed_dataset(embedder, judged, report=about("query and gallery", report)).embeddings
    with torch.no_grad():
        after = projection(torch.from_numpy(before)).numpy()
    reduction = Reduction(
        checkpoint_sha256=origin,
        from_size=spec.embedding_size,
        stages=spec.stages,
        whitened=whiten,
        images=len(trained.embeddings),
        dataset=dataset.name,
        data_sha256=fingerprint,
        variance=variance,
        before=evaluate_dataset(judged, before).figures(),
        after=evaluate_dataset(judged, after).figures(),
        before_cosine=cosine_figures(judged, before),
        after_cosine=cosine_figures(judged, after),
    )
    reduced = replace(
        spec,
        embedding_size=size,
        stages={},
        dataset=dataset.name,
        retrieval=reduction.after,
        retrieval_cosine=reduction.after_cosine,
        calibration=_thresholds(dataset, after, report),
        checkpoint_sha256=None,  # of the full network, if it was calibrated
        reduction=reduction,
    )
    layer = {f"projection.{name}": tensor for name, tensor in projection.state_dict().items()}
    # First the file that makes the folder a run: a checkpoint alone would be taken for one of the full network's run.
    write_about_run(out.parent, as_run)
    save_checkpoint(out, found := Checkpoint(reduced, full.weights | layer))
    return found


def _check_number(images: int, size: int, source: Path) -> None:
    """Raise DataError if so few images have fewer than `size` axes."""
    if images <= size:
        problem = f"{source} has {images} training images, which give at most {images - 1} axes"
        raise DataError(problem, f"Choose --embedding-size {images - 1} or less, or another set with --calibration")


def _kept(path: Path, wanted: tuple[int, bool, str, str]) -> Checkpoint | None:
    """The reduced checkpoint that exists, if it has this size and whitening and is of this checkpoint and data set."""
    try:
        found = load_checkpoint(path)
    except ModelError:  # missing, damaged, or of another version
        return None
    how, size = found.spec.reduction, found.spec.embedding_size
    is_wanted = how and (size, how.whitened, how.checkpoint_sha256, how.data_sha256) == wanted
    return found if is_wanted else None


def _thresholds(dataset: ReidDataset, embeddings: Embeddings, report: Report) -> Calibration | None:
    digest = data_sha256([*dataset.query.paths, *dataset.gallery.paths], dataset.root, report)
    try:
        return dataset_thresholds(dataset.without_junk(), embeddings, digest, report).calibration
    except DataError as error:
        warnings.warn(f"no decision thresholds: {error}", PmmWarning, stacklevel=2)
        return None


def principal_projection(embeddings: Embeddings, size: int, whiten: bool = False) -> tuple[nn.Linear, float]:
    """Return the linear layer from (N, D) to the first `size` principal components, and their share of the variance.

    Its rows are orthonormal; the largest value of each is positive, so that the signs are deterministic. With `whiten`,
    the mean is subtracted and each component divided by its standard deviation. Computed in float64. Raises ModelError
    if the embeddings are all equal, or vary in fewer than `size` directions and are to be whitened.
    """
    rows = embeddings.astype(np.float64)
    mean = rows.mean(axis=0)
    rows -= mean
    ascending, columns = np.linalg.eigh(rows.T @ rows / (len(rows) - 1))
    variances, axes = ascending[::-1].clip(0), columns.T[::-1]
    total = float(variances.sum())
    directions = int((variances > 1e-10 * variances[0]).sum())
    if not directions:
        raise ModelError("the network gives all training images the same embedding", "Train it for longer")
    if whiten and directions < size:
        problem = f"the embeddings vary in {directions} directions only, and {size} are to be whitened"
        raise ModelError(problem, f"Choose --embedding-size {directions} or less, or omit --whiten")
    share, axes = float(variances[:size].sum()) / total, axes[:size]
    largest = axes[np.arange(size), np.abs(axes).argmax(axis=1)]
    axes = axes * np.sign(largest)[:, None]
    weight, bias = axes, np.zeros(size)
    if whiten:
        weight = axes / np.sqrt(variances[:size])[:, None]
        bias = -weight @ mean
    layer = nn.Linear(rows.shape[1], size)
    layer.weight, layer.bias = (nn.Parameter(torch.from_numpy(rows.astype(np.float32))) for rows in (weight, bias))
    return layer, min(share, 1.0)
