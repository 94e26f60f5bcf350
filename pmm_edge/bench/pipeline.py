"""What a bench compares on: the queries and gallery of a data set, or the crops of any folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from pmm_edge.bench.diagnosis import IMAGES as DIAGNOSED
from pmm_edge.bench.diagnosis import first_departure, likely_cause, overflow
from pmm_edge.bench.environment import MachineState, environment, machine_state, machine_warnings
from pmm_edge.bench.invariants import PROBES, breaches, fault_of, held_in_batches, precision_failure
from pmm_edge.bench.parity import compare, evaluate_embeddings, few_queries, retrieval_change
from pmm_edge.bench.report import (
    AskedGates,
    BenchReport,
    ColdStart,
    Compute,
    Departure,
    Energy,
    Gates,
    Invariant,
    Latency,
    ModelReport,
    Parity,
    RetrievalChange,
    Stream,
    cosine_failures,
    length_failure,
    map_failure,
)
from pmm_edge.bench.resources import compute_of, measure_energy
from pmm_edge.bench.timing import measure_cold_start, measure_end_to_end, measure_latency, without_cuda_graphs
from pmm_edge.console import Report, silent
from pmm_edge.data.dataset import ReidDataset, data_sha256, queries_with_match, read
from pmm_edge.data.layouts import is_dataset
from pmm_edge.errors import DataError, ModelError, PmmError
from pmm_edge.files import sha256
from pmm_edge.images import Pixels, evenly, read_crops
from pmm_edge.retrieval import RetrievalResult
from pmm_edge.retrieval.distances import unit_length
from pmm_edge.runtime import Embedder, embed_files, load
from pmm_edge.runtime.cuda import GpuError
from pmm_edge.runtime.embed_files import find_images
from pmm_edge.runtime.embedder import Embeddings
from pmm_edge.spec import RetrievalFigures


@dataclass(frozen=True, eq=False)
class BenchImages:
    """Image files in the order in which they are embedded."""

    source: Path
    root: Path
    """What the images' names are relative to."""
    paths: list[Path]
    dataset: ReidDataset | None
    """Where retrieval can be judged: the paths are its queries followed by its gallery."""
    why_no_retrieval: str | None
    """One line, where it cannot."""


def bench_images(source: Path, limit: int | None = None, layout: str | None = None) -> BenchImages:
    """Find the images; none is opened.

    Args:
        source: a data set, any other folder of crops (searched with what it holds), or a text file with their paths.
        limit: take this many, spread evenly.
        layout: of the data set, where it is not recognised by itself.

    Raises:
        DataError: nothing is there, a layout is named for a list, or no query of the data set has a match.
        PmmError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise PmmError(f"a limit of {limit} leaves no images", "Choose 1 or more, such as --limit 100")
    if not source.exists():
        raise DataError(f"{source} does not exist", "Name a data set or a folder of crops")
    if not source.is_dir() or not (layout or is_dataset(source)):
        paths = find_images(source, layout).paths
        why = f"{source} is no data set with identities: parity without retrieval"
        return BenchImages(source, source if source.is_dir() else source.parent, _spread(paths, limit), None, why)
    dataset = read(source, layout)
    if not len(queries_with_match(dataset)):  # before anything is measured
        raise DataError(
            f"no query of {dataset.root} has a match in its gallery from another camera",
            "Put its images back together, or name one of its folders for parity without retrieval",
        )
    everything = [*dataset.query.paths, *dataset.gallery.paths]
    paths = _spread(everything, limit)
    if len(paths) < len(everything):
        why = f"{len(paths):,} of {len(everything):,} images: retrieval is judged on all of them or not at all"
        return BenchImages(source, dataset.root, paths, None, why)
    return BenchImages(source, dataset.root, paths, dataset, None)


def _spread(paths: Sequence[Path], limit: int | None) -> list[Path]:
    return list(paths) if limit is None else [paths[row] for row in evenly(len(paths), limit)]


@dataclass(frozen=True)
class Options:
    """What is asked of a bench.

    Raises:
        PmmError: a batch size below 1.
    """

    batches: tuple[int, ...] = (1, 8)
    """Sizes to time, and to hold against a batch of one, in their order; one that is named twice counts once."""
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

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1:
            raise PmmError("batch sizes must be 1 or more", "Choose such as --batch 1,8")
        object.__setattr__(self, "batches", tuple(dict.fromkeys(self.batches)))


class Subject:
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
        self.stream: Stream | None = None
        self.cold_start: ColdStart | None = None
        self.compute: Compute | None = None
        self.energy: Energy | None = None

    @property
    def name(self) -> str:
        return self.embedder.path.name

    @property
    def retrieval(self) -> RetrievalFigures | None:
        return self.found.figures() if self.found else None

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
            latency=sorted(self.latency, key=lambda one: (one.scope != "model", one.cuda_graph, one.batch)),
            failures=self.failures,
            likely_cause=self.likely_cause,
            departure=self.departure,
            stream=self.stream,
            cold_start=self.cold_start,
            compute=self.compute,
            energy=self.energy,
        )


class Run:
    """One bench while it runs."""

    def __init__(self, subjects: list[Subject], images: BenchImages, options: Options, before: MachineState) -> None:
        self.base, *self.others = subjects
        self.before = before
        self.all = subjects
        self.images, self.options = images, options
        self.data_sha256 = ""
        self.warnings = [images.why_no_retrieval] if images.why_no_retrieval else []
        self.complete = False

    @property
    def sound(self) -> list[Subject]:
        """The models that run at all."""
        return [subject for subject in self.all if subject.embeddings is not None]

    def crops(self, subject: Subject, rows: Sequence[int]) -> Pixels:
        """Some of the images at a model's size, (N, height, width, 3) uint8."""
        size = subject.embedder.spec.input
        return read_crops([self.images.paths[row] for row in rows], size.height, size.width)

    def first_rows(self, count: int) -> range:
        """The first images, at most so many."""
        return range(min(count, len(self.images.paths)))

    def report(self) -> BenchReport:
        return BenchReport(
            reference=self.base.report(),
            models=[other.report() for other in self.others],
            data=str(self.images.source),
            data_sha256=self.data_sha256,
            images=len(self.images.paths),
            environment=environment(
                [one.embedder for one in self.all], self.before, [t for s in self.all for t in s.latency]
            ),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            complete=self.complete,
            warnings=self.warnings,
        )


def measure_speed(run: Run, report: Report) -> None:
    """Measure what is worth most first, for an interrupt keeps what there is.

    What one model cannot be measured on is a warning, and nothing that ends the bench.
    """
    if run.base not in run.sound:
        return  # every ratio is to the reference
    try:
        with _or_warning(run):
            _latencies(run, report)
    finally:
        timed = [latency for subject in run.sound for latency in subject.latency]
        run.warnings += machine_warnings(timed, run.before)
    batch = max(run.options.batches)
    for number, subject in enumerate(run.sound):
        report("start, memory, energy", number, len(run.sound), subject.name)
        with _or_warning(run):
            subject.compute = compute_of(subject.embedder.spec, subject.latency, subject.embedder.device)
        with _or_warning(run):
            subject.cold_start = measure_cold_start(subject.embedder.path, subject.embedder.loads_with, batch)
        with _or_warning(run):
            subject.energy = measure_energy(subject.embedder, run.crops(subject, run.first_rows(batch)))
    report("start, memory, energy", len(run.sound), len(run.sound))


@contextmanager
def _or_warning(run: Run) -> Iterator[None]:
    try:
        yield
    except PmmError as error:
        run.warnings.append(str(error))


def _latencies(run: Run, report: Report) -> None:
    """Each batch size, all models in turns; of engines with CUDA graphs, those without as well."""
    embedders = [(subject, subject.embedder) for subject in run.sound]
    for subject in run.sound:
        plain = without_cuda_graphs(subject.embedder)
        if plain:
            embedders.append((subject, plain))
    crops = [run.crops(subject, run.first_rows(max(run.options.batches))) for subject, _ in embedders]
    engines = [embedder for _, embedder in embedders]
    for batch in run.options.batches:
        found = measure_latency(engines, crops, batch, report=report)
        for (subject, _), latency in zip(embedders, found, strict=True):
            subject.latency.append(latency)
    own = [subject.embedder for subject in run.sound]
    for batch in run.options.batches:
        found = measure_end_to_end(own, run.images.paths, batch, report=report)
        for subject, latency in zip(run.sound, found, strict=True):
            subject.latency.append(latency)


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
    return bench_run(models, reference, data, options, report).report()


def bench_run(
    models: Sequence[Path], reference: Path, data: Path, options: Options | None = None, report: Report = silent
) -> Run:
    """As `bench`, with the embeddings still at hand, for pictures of them."""
    options, before = options or Options(), machine_state()
    images = bench_images(data, options.limit, options.layout)
    subjects = [Subject(load(path, options.device), options.gates) for path in (reference, *models)]
    run = Run(subjects, images, options, before)
    try:
        proof = (_embed, _hold_claims, _hold_invariants, _judge, _find_causes)
        for measure in (*proof, measure_speed) if options.speed else proof:
            measure(run, report)
        run.complete = True
    except KeyboardInterrupt:
        pass  # what was measured by now is the result
    return run


def _embed(run: Run, report: Report) -> None:
    """Embed all images with each model; retrieval where it can be judged."""
    run.data_sha256 = data_sha256(run.images.paths, run.images.root, report)
    for subject in run.all:
        with _broken_if_it_cannot_run(subject):
            subject.embeddings = embed_files(subject.embedder, run.images.paths, report=report).embeddings
        if subject.embeddings is None:
            continue
        if run.images.dataset and np.isfinite(subject.embeddings).all():
            subject.found = evaluate_embeddings(subject.embeddings, run.images.dataset)


def _hold_claims(run: Run, report: Report) -> None:
    """Hold what a model says of itself against what it is: its gates follow from the precision that it claims."""
    try:
        for subject in run.all:
            if failure := precision_failure(subject.embedder.path, subject.embedder.spec.precision):
                subject.failures.append(failure)
    except ModuleNotFoundError:
        run.warnings.append(
            "that the models are of the precision that they claim was not checked, for want of the onnx package:"
            " pip install 'pmm-edge[train]'"
        )


def _hold_invariants(run: Run, report: Report) -> None:
    paths = run.images.paths
    rows = evenly(len(paths), PROBES)
    probes = [paths[row] for row in rows]
    for subject in run.sound:
        assert subject.embeddings is not None
        subject.invariants = fault_of(subject.embeddings, paths, subject.embedder.spec.normalized_output)
        with _broken_if_it_cannot_run(subject):
            crops = run.crops(subject, rows)
            subject.invariants += held_in_batches(subject.embedder, crops, probes, run.options.batches, report)
        subject.failures += breaches(subject.invariants)


@contextmanager
def _broken_if_it_cannot_run(subject: Subject) -> Iterator[None]:
    """A model that loads and does not run fails, and the others are measured all the same."""
    try:
        yield
    except (ModelError, GpuError) as error:
        subject.failures.append(f"cannot be run: {error}")


def _judge(run: Run, report: Report) -> None:
    """Hold each model against the reference, unless that is broken itself."""
    if run.base.failures:
        run.warnings.append(f"the reference {run.base.embedder.path} is broken itself: no model was judged against it")
        return
    for number, model in enumerate(run.others):
        report("comparing with the reference", number, len(run.others), model.name)
        if model.sha256 == run.base.sha256:
            run.warnings.append(f"{model.name} is the reference itself: that they agree proves nothing")
        if model.embeddings is not None:
            _compare(model, run)
    report("comparing with the reference", len(run.others), len(run.others))
    changes = [model.change for model in run.others if model.change]
    gates = [model.gates for model in run.others if model.change]
    if changes and (warning := few_queries(changes, gates)):
        run.warnings.append(warning)


def _compare(model: Subject, run: Run) -> None:
    base, images = run.base, run.images
    ours, theirs = model.embedder.spec, base.embedder.spec
    if ours.embedding_size != theirs.embedding_size:
        model.failures.append(
            f"gives embeddings of {ours.embedding_size} numbers, the reference of {theirs.embedding_size}"
        )
        return
    assert model.embeddings is not None and base.embeddings is not None
    expected, actual, expected_found, found = base.embeddings, model.embeddings, base.found, model.found
    if ours.normalized_output != theirs.normalized_output:  # one says that it is of length 1: judged by directions
        expected, actual = unit_length(expected), unit_length(actual)
        if images.dataset and expected_found and found:
            expected_found, found = (evaluate_embeddings(one, images.dataset) for one in (expected, actual))
        run.warnings.append(_held_by_directions(model, base, expected_found))
    stages = ours.stages if ours.stages == theirs.stages else None
    model.parity = compare(expected, actual, images.paths, stages)
    # Each failure as soon as it is known: an interrupt leaves no parity without its verdict.
    model.failures += cosine_failures(model.parity.whole, model.gates)
    if length := length_failure(model.parity, model.gates):
        model.failures.append(length)
    if expected_found and found and images.dataset:
        change = retrieval_change(expected_found, found, images.dataset)
        model.change = replace(change, reference=expected_found.figures())
        if drop := map_failure(expected_found.mAP, found.mAP, model.change, model.gates):
            model.failures.append(drop)


def _held_by_directions(model: Subject, base: Subject, judged: RetrievalResult | None) -> str:
    """What a reader must know where one of the two gives embeddings of length 1 and the other does not."""
    unit, free = (model, base) if model.embedder.spec.normalized_output else (base, model)
    figures = ""
    if judged and base.found:
        figures = f": its mAP is {100 * judged.mAP:.2f} that way, {100 * base.found.mAP:.2f} as it is"
    return (
        f"{unit.name} gives embeddings of length 1 and {free.name} does not: {model.name} was held against"
        f" {base.name} with both at length 1{figures}"
    )


def _find_causes(run: Run, report: Report) -> None:
    """For each model that fails: the known mistake that explains it, and with `explain` the layer."""
    for model in run.others:
        if model.failures and model.parity is not None:
            model.likely_cause = _cause(run, model, report)
            if run.options.explain:
                _explain(run, model, report)


def _cause(run: Run, model: Subject, report: Report) -> str | None:
    base, spec = run.base, model.embedder.spec
    assert model.embeddings is not None and base.embeddings is not None
    if any(not invariant.held for invariant in model.invariants):  # a broken engine: what it is fed explains nothing
        return overflow(spec, model.embeddings)
    rows = evenly(len(run.images.paths), DIAGNOSED)
    right, candidate = base.embeddings[rows], model.embeddings[rows]
    found = likely_cause(base.embedder, right, candidate, spec, run.crops(base, rows), report)
    return found or _other_checkpoint(model, base)


def _explain(run: Run, model: Subject, report: Report) -> None:
    assert model.parity is not None
    worst = [str(path) for path in run.images.paths].index(model.parity.whole.worst_image)
    report("looking for the layer", 0, 1, model.name)
    try:
        model.departure = first_departure(model.embedder, run.base.embedder, run.crops(model, [worst]))
    except ModelError as error:
        run.warnings.append(str(error))
    report("looking for the layer", 1, 1, model.name)


def _other_checkpoint(model: Subject, reference: Subject) -> str | None:
    origin = model.embedder.spec.checkpoint_sha256
    if origin in (None, reference.embedder.spec.checkpoint_sha256 or reference.sha256):
        return None
    return "it was exported from another checkpoint than the reference"
