"""The bench: models beside their reference on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from pmm_edge.bench.environment import environment
from pmm_edge.bench.figures import Latency
from pmm_edge.bench.latency import measure_latency
from pmm_edge.bench.parity import Gates, Parity, compare, cosine_failure, fault_of, gates_of, map_failure
from pmm_edge.bench.report import BenchReport, ModelReport
from pmm_edge.bench.retrieval import evaluate_embeddings
from pmm_edge.data.dataset import ReidDataset, scan
from pmm_edge.errors import PmmError
from pmm_edge.files import sha256
from pmm_edge.images import read_crop
from pmm_edge.progress import Report, silent
from pmm_edge.runtime import Embedder, embed_files, load
from pmm_edge.runtime.embedder import Embeddings
from pmm_edge.spec import RetrievalFigures

BATCHES = (1, 8)


def bench(
    models: Sequence[Path],
    reference: Path,
    data: Path,
    batches: Sequence[int] = BATCHES,
    gates: Gates | None = None,
    limit: int | None = None,
    device: str | None = None,
    report: Report = silent,
) -> BenchReport:
    """Compare models with their reference on a data set's queries and gallery, then time all of them in turns.

    A model that fails a gate is no error: what failed is in the report's `failures`.

    Args:
        models: files that `pmm_edge.load` loads.
        reference: usually the checkpoint that they were exported from.
        data: a folder in the layout of Market-1501.
        batches: batch sizes to time.
        gates: what the models must hold; None for the defaults of each model's precision.
        limit: compare this many images, spread evenly; retrieval is judged on all images or not at all.
        device: for all of them.

    Raises:
        ModelError: a model or the reference cannot be loaded.
        DataError: the data set cannot be used.
    """
    if not batches or min((*batches, 1 if limit is None else limit)) < 1:
        raise PmmError("batch sizes and the limit must be 1 or more", "Choose such as --batch 1,8 and --limit 100")
    dataset = scan(data)
    paths = _spread([*dataset.query.paths, *dataset.gallery.paths], limit)
    judged = dataset if len(paths) == len(dataset.query) + len(dataset.gallery) else None
    embedders = [load(path, device) for path in (reference, *models)]
    subjects = [_Subject(embedder, embed_files(embedder, paths, report=report), judged) for embedder in embedders]
    latencies = _latencies(embedders, paths[: max(batches)], batches, report)
    base, *others = subjects
    fault = fault_of(base.embeddings, paths)
    return BenchReport(
        reference=base.report(base.gates(gates), None, [fault] if fault else [], latencies[0]),
        models=[
            other.report(own, *_judge(other, base, paths, own, usable=fault is None), latency)
            for other, own, latency in zip(others, [other.gates(gates) for other in others], latencies[1:], strict=True)
        ],
        data=str(data),
        images=len(paths),
        environment=environment(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


class _Subject:
    """A model under comparison, what it gave, and how that retrieves."""

    def __init__(self, embedder: Embedder, embeddings: Embeddings, dataset: ReidDataset | None) -> None:
        self.embedder, self.embeddings, self.dataset = embedder, embeddings, dataset
        self.retrieval: RetrievalFigures | None = None
        if dataset and np.isfinite(embeddings).all():
            found = evaluate_embeddings(embeddings, dataset)
            self.retrieval = RetrievalFigures(found.rank(1), found.mAP, found.mINP, found.mAP_at_50)

    def normalized(self) -> _Subject:
        """The same model with embeddings of length 1."""
        norms = np.linalg.norm(self.embeddings, axis=1, keepdims=True)
        return _Subject(self.embedder, self.embeddings / np.maximum(norms, 1e-12), self.dataset)

    def gates(self, asked: Gates | None) -> Gates:
        """What the model must hold: what was asked for, else the defaults of its precision."""
        return gates_of(self.embedder.spec.precision, asked)

    def report(self, gates: Gates, parity: Parity | None, failures: list[str], latency: list[Latency]) -> ModelReport:
        model = self.embedder
        return ModelReport(
            path=str(model.path),
            precision=model.spec.precision,
            backend=model.backend,
            device=model.device,
            gates=gates,
            parity=parity,
            retrieval=self.retrieval,
            latency=latency,
            failures=failures,
        )


def _judge(
    model: _Subject, base: _Subject, paths: Sequence[Path], gates: Gates, usable: bool
) -> tuple[Parity | None, list[str]]:
    """A model's parity and a sentence for each gate it fails; no parity where the reference is not `usable`."""
    fault = fault_of(model.embeddings, paths)
    if not usable:
        return None, [fault] if fault else []
    sizes = model.embeddings.shape[1], base.embeddings.shape[1]
    if sizes[0] != sizes[1]:
        return None, [f"gives embeddings of {sizes[0]} numbers, the reference of {sizes[1]}"]
    if model.embedder.spec.normalized_output and not base.embedder.spec.normalized_output:
        base = base.normalized()
    parity = compare(base.embeddings, model.embeddings, paths)
    found = [fault, cosine_failure(parity, gates)]
    if base.retrieval and model.retrieval:
        found.append(map_failure(base.retrieval, model.retrieval, gates))
    failures = [failure for failure in found if failure]
    if failures and not _same_origin(model.embedder, base.embedder):
        failures.append("was exported from another checkpoint than the reference")
    return parity, failures


def _same_origin(model: Embedder, reference: Embedder) -> bool:
    origin = model.spec.checkpoint_sha256
    return origin is None or origin == (reference.spec.checkpoint_sha256 or sha256(reference.path))


def _latencies(
    embedders: Sequence[Embedder], paths: Sequence[Path], batches: Sequence[int], report: Report
) -> list[list[Latency]]:
    """For each embedder its latency at each batch size."""
    sizes = [(embedder.spec.input.height, embedder.spec.input.width) for embedder in embedders]
    images = [np.stack([read_crop(path, *size) for path in paths]) for size in sizes]
    by_batch = [measure_latency(embedders, images, batch, report=report) for batch in batches]
    return [list(own) for own in zip(*by_batch, strict=True)]


def _spread(paths: list[Path], limit: int | None) -> list[Path]:
    if limit is None or limit >= len(paths):
        return paths
    return [paths[number * len(paths) // limit] for number in range(limit)]
