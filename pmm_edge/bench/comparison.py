"""The bench: models beside their reference on the same images, then timed in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from pmm_edge.bench.diagnosis import IMAGES as DIAGNOSED
from pmm_edge.bench.diagnosis import likely_cause, overflow
from pmm_edge.bench.environment import environment
from pmm_edge.bench.explain import first_departure
from pmm_edge.bench.figures import (
    BenchReport,
    Departure,
    Gates,
    Invariant,
    Latency,
    ModelReport,
    Parity,
    RetrievalChange,
)
from pmm_edge.bench.gates import AskedGates, cosine_failures, length_failure, map_failure
from pmm_edge.bench.images import BenchImages, bench_images, data_sha256
from pmm_edge.bench.invariants import breaches, fault_of, held_in_batches, spread_probes
from pmm_edge.bench.latency import measure_latency
from pmm_edge.bench.parity import compare
from pmm_edge.bench.retrieval import evaluate_embeddings
from pmm_edge.bench.significance import few_queries, retrieval_change
from pmm_edge.errors import ModelError, PmmError
from pmm_edge.files import sha256
from pmm_edge.images import read_crop
from pmm_edge.progress import Report, silent
from pmm_edge.retrieval import RetrievalResult
from pmm_edge.runtime import Embedder, embed_files, load
from pmm_edge.runtime.crops import Pixels
from pmm_edge.runtime.embedder import Embeddings
from pmm_edge.spec import RetrievalFigures


@dataclass(frozen=True)
class Options:
    """What is asked of a bench.

    Raises:
        PmmError: a batch size or a number of clients below 1.
    """

    batches: tuple[int, ...] = (1, 8)
    """Sizes to time, and to hold against a batch of one."""
    gates: AskedGates = field(default_factory=AskedGates)
    limit: int | None = None
    """Compare this many images, spread evenly; retrieval is judged on all images or not at all."""
    device: str | None = None
    """For all models; see `pmm_edge.load`."""
    layout: str | None = None
    """Of the data set, where it is not recognised by itself."""
    explain: bool = False
    """Find the layer where a failing ONNX model departs."""
    speed: bool = True
    """Measure latency, start, memory and energy; False proves parity alone."""
    clients: int | None = None
    """Measure a stream of single crops from this many clients at once as well."""

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1:
            raise PmmError("batch sizes must be 1 or more", "Choose such as --batch 1,8")
        if self.clients is not None and self.clients < 1:
            raise PmmError(f"{self.clients} clients send nothing", "Choose 1 or more, such as --concurrency 8")


def bench(
    models: Sequence[Path], reference: Path, data: Path, options: Options | None = None, report: Report = silent
) -> BenchReport:
    """Compare models with their reference, then time all of them in turns.

    A model that fails a gate is no error: what failed is in the report's `failures`. Interrupted (Ctrl-C) once the
    models are loaded, it returns what was measured by then, with `complete` False.

    Args:
        models: files that `pmm_edge.load` loads.
        reference: usually the checkpoint that they were exported from.
        data: a data set, whose queries and gallery are embedded, or any folder of crops, which shows parity alone.
        options: None for the defaults.
        report: told how far each step is.

    Raises:
        ModelError: a model or the reference cannot be loaded; nothing is measured then.
        DataError: the images cannot be used.
        KeyboardInterrupt: before anything could be measured.
    """
    options = options or Options()
    images = bench_images(data, options.limit, options.layout)
    subjects = [_Subject(load(path, options.device), options.gates) for path in (reference, *models)]
    run = _Run(subjects, images, options)
    try:
        for measure in (_embed, _hold_invariants, _judge, _find_causes, *((_time,) if options.speed else ())):
            measure(run, report)
        run.complete = True
    except KeyboardInterrupt:
        pass  # what was measured by now is the result
    return run.report()


class _Subject:
    """A model under comparison, and what is known of it so far."""

    def __init__(self, embedder: Embedder, asked: AskedGates) -> None:
        self.embedder = embedder
        self.sha256 = sha256(embedder.path)
        self.gates: Gates = asked.of(embedder.spec.precision)
        self.embeddings: Embeddings | None = None
        self.found: RetrievalResult | None = None
        self.invariants: list[Invariant] = []
        self.failures: list[str] = []
        self.parity: Parity | None = None
        self.change: RetrievalChange | None = None
        self.likely_cause: str | None = None
        self.departure: Departure | None = None
        self.latency: list[Latency] = []

    @property
    def retrieval(self) -> RetrievalFigures | None:
        found = self.found
        return RetrievalFigures(found.rank(1), found.mAP, found.mINP, found.mAP_at_50) if found else None

    def report(self) -> ModelReport:
        model = self.embedder
        return ModelReport(
            path=str(model.path),
            sha256=self.sha256,
            file_bytes=model.path.stat().st_size,
            precision=model.spec.precision,
            embedding_size=model.spec.embedding_size,
            backend=model.backend,
            device=model.device,
            gates=self.gates,
            invariants=self.invariants,
            parity=self.parity,
            retrieval=self.retrieval,
            cmc=[float(share) for share in self.found.cmc] if self.found else [],
            retrieval_change=self.change,
            latency=self.latency,
            failures=self.failures,
            likely_cause=self.likely_cause,
            departure=self.departure,
        )


class _Run:
    """One bench while it runs."""

    def __init__(self, subjects: list[_Subject], images: BenchImages, options: Options) -> None:
        self.base, *self.others = subjects
        self.all = subjects
        self.images, self.options = images, options
        self.data_sha256 = ""
        self.warnings = [images.why_no_retrieval] if images.why_no_retrieval else []
        self.complete = False

    def crops(self, subject: _Subject, rows: Sequence[int]) -> Pixels:
        """Some of the images at a model's size, (N, height, width, 3) uint8."""
        size = subject.embedder.spec.input
        return np.stack([read_crop(self.images.paths[row], size.height, size.width) for row in rows])

    def report(self) -> BenchReport:
        return BenchReport(
            reference=self.base.report(),
            models=[other.report() for other in self.others],
            data=str(self.images.source),
            data_sha256=self.data_sha256,
            images=len(self.images.paths),
            environment=environment(),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            complete=self.complete,
            warnings=self.warnings,
        )


def _embed(run: _Run, report: Report) -> None:
    """Embed all images with each model; retrieval where it can be judged."""
    run.data_sha256 = data_sha256(run.images, report)
    for subject in run.all:
        subject.embeddings = embed_files(subject.embedder, run.images.paths, report=report)
        if run.images.dataset and np.isfinite(subject.embeddings).all():
            subject.found = evaluate_embeddings(subject.embeddings, run.images.dataset)


def _hold_invariants(run: _Run, report: Report) -> None:
    paths = run.images.paths
    rows = spread_probes(paths)
    probes = [paths[row] for row in rows]
    for subject in run.all:
        assert subject.embeddings is not None
        in_batches = held_in_batches(subject.embedder, run.crops(subject, rows), probes, run.options.batches, report)
        subject.invariants = [*fault_of(subject.embeddings, paths), *in_batches]
        subject.failures = breaches(subject.invariants)


def _judge(run: _Run, report: Report) -> None:
    """Hold each model against the reference, unless that is broken itself."""
    if run.base.failures:
        run.warnings.append(f"the reference {run.base.embedder.path} is broken itself: no model was judged against it")
        return
    for number, model in enumerate(run.others):
        report("comparing with the reference", number, len(run.others), model.embedder.path.name)
        _compare(model, run.base, run.images)
    report("comparing with the reference", len(run.others), len(run.others))
    changes = [model.change for model in run.others if model.change]
    if changes and (warning := few_queries(changes)):
        run.warnings.append(warning)


def _compare(model: _Subject, base: _Subject, images: BenchImages) -> None:
    ours, theirs = model.embedder.spec, base.embedder.spec
    if ours.embedding_size != theirs.embedding_size:
        model.failures.append(
            f"gives embeddings of {ours.embedding_size} numbers, the reference of {theirs.embedding_size}"
        )
        return
    assert model.embeddings is not None and base.embeddings is not None
    expected, actual, expected_found = base.embeddings, model.embeddings, base.found
    if ours.normalized_output != theirs.normalized_output:  # one says that it is of length 1: judged by directions
        expected, actual = unit_length(expected), unit_length(actual)
        expected_found = evaluate_embeddings(expected, images.dataset) if images.dataset else None
    stages = ours.stages if ours.stages == theirs.stages else None
    model.parity = compare(expected, actual, images.paths, stages)
    failures = cosine_failures(model.parity.whole, model.gates)
    if length := length_failure(expected, actual):
        failures.append(length)
    if expected_found and model.found and images.dataset:
        model.change = retrieval_change(expected_found, model.found, images.dataset)
        drop = map_failure(expected_found.mAP, model.found.mAP, model.change, model.gates)
        failures += [drop] if drop else []
    model.failures += failures


def _find_causes(run: _Run, report: Report) -> None:
    """For each model that fails: the known mistake that explains it, and with `explain` the layer."""
    for model in run.others:
        if model.failures and model.parity is not None:
            model.likely_cause = _cause(run, model, report)
            if run.options.explain:
                _explain(run, model, report)


def _cause(run: _Run, model: _Subject, report: Report) -> str | None:
    base, spec = run.base, model.embedder.spec
    assert model.embeddings is not None and base.embeddings is not None
    if any(not invariant.held for invariant in model.invariants):  # a broken engine: what it is fed explains nothing
        return overflow(spec, model.embeddings)
    rows = spread_probes(run.images.paths, DIAGNOSED)
    right, candidate = base.embeddings[rows], model.embeddings[rows]
    found = likely_cause(base.embedder, right, candidate, spec, run.crops(base, rows), report)
    return found or _other_checkpoint(model, base)


def _explain(run: _Run, model: _Subject, report: Report) -> None:
    assert model.parity is not None
    worst = [str(path) for path in run.images.paths].index(model.parity.whole.worst_image)
    report("looking for the layer", 0, 1, model.embedder.path.name)
    try:
        model.departure = first_departure(model.embedder, run.base.embedder, run.crops(model, [worst]))
    except ModelError as error:
        run.warnings.append(str(error))
    report("looking for the layer", 1, 1, model.embedder.path.name)


def _time(run: _Run, report: Report) -> None:
    """Latency of each batch size, all models in turns."""
    embedders = [subject.embedder for subject in run.all]
    rows = range(min(max(run.options.batches), len(run.images.paths)))
    crops = [run.crops(subject, rows) for subject in run.all]
    for batch in run.options.batches:
        for subject, latency in zip(run.all, measure_latency(embedders, crops, batch, report=report), strict=True):
            subject.latency.append(latency)


def unit_length(embeddings: Embeddings) -> Embeddings:
    """Embeddings (N, D) over their L2 norm; all zeros stay so."""
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings / np.maximum(norms, 1e-12)


def _other_checkpoint(model: _Subject, reference: _Subject) -> str | None:
    origin = model.embedder.spec.checkpoint_sha256
    if origin in (None, reference.embedder.spec.checkpoint_sha256 or reference.sha256):
        return None
    return "it was exported from another checkpoint than the reference"
