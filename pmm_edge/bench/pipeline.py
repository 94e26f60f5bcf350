"""`pmm bench`: compare exported models with their reference, then time all of them.

The file reads from top to bottom: find models and images, embed, check invariants, compare, diagnose, time, write.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from pmm_edge.bench import diagnosis, parity
from pmm_edge.bench.certification import Certification, write_certificates
from pmm_edge.bench.environment import MachineState, environment, machine_state, noise_warnings
from pmm_edge.bench.html import write_html
from pmm_edge.bench.invariants import PROBES, broken, check_batches, check_embeddings, precision_failure
from pmm_edge.bench.parity import GateOverrides
from pmm_edge.bench.report import (
    BenchReport,
    BenchWarning,
    Cause,
    Failure,
    FailureKind,
    LikelyCause,
    ModelReport,
    WarningKind,
)
from pmm_edge.bench.resources import measure_energy
from pmm_edge.bench.tables import markdown
from pmm_edge.bench.timing import measure_cold_start, measure_end_to_end, measure_latency, without_cuda_graphs
from pmm_edge.console import Report, silent
from pmm_edge.data.dataset import ReidDataset, data_sha256, is_dataset, queries_with_match, read
from pmm_edge.errors import DataError, ModelError, PmmError
from pmm_edge.files import check_output, sha256, written_whole
from pmm_edge.images import Pixels, evenly, read_crops
from pmm_edge.retrieval import RetrievalResult
from pmm_edge.retrieval.distances import unit_length
from pmm_edge.runs import BEST, EXPORT_FOLDER, data_of, resolve_checkpoint, run_of
from pmm_edge.runtime import Embedder, embed_files, load
from pmm_edge.runtime.cuda import GpuError
from pmm_edge.runtime.embed_files import evaluate_dataset, find_images
from pmm_edge.runtime.embedder import Embeddings

MODEL_SUFFIXES = (".onnx", ".engine", ".safetensors")


@dataclass(frozen=True)
class BenchResult:
    """What a bench found and wrote; `files` are bench.json, bench.md and report.html."""

    report: BenchReport
    files: list[Path]
    certificates: Certification


@dataclass
class Subject:
    """A model while it is measured; `embeddings` are (images, D), None where the model cannot run."""

    embedder: Embedder
    figures: ModelReport
    embeddings: Embeddings | None = None
    retrieval: RetrievalResult | None = None


def bench(
    models: str | Path | Sequence[str | Path] | None = None,
    *,
    reference: str | Path | None = None,
    data: str | Path | None = None,
    layout: str | None = None,
    limit: int | None = None,
    device: str | None = None,
    batch_sizes: Sequence[int] = (1, 8),
    gates: GateOverrides | None = None,
    parity_only: bool = False,
    explain: bool = False,
    out: str | Path | None = None,
    report: Report = silent,
) -> BenchResult:
    """Compare models with their reference, time them, and write bench.json, bench.md, report.html and certificates.

    A model that fails a gate raises no error; see `result.report.failures`. An interrupt (Ctrl-C) after the models are
    loaded keeps what was measured: `result.report.complete` is then False.

        result = pmm_edge.bench("model.onnx", reference="best.pt", data="market1501")
        result.report.passed
        result.report.models[0].parity.whole.cosine_min

    Args:
        models: files that `pmm_edge.load` accepts; by default all exports of the reference's run.
        reference: the model to compare with, or a run folder; by default best.pt of the models' run or the newest run.
        data: a data set, whose queries and gallery are embedded, or a folder or list of crops, which shows parity
            without retrieval; by default the data set of the run.
        layout: layout of the data set, if it is not recognized.
        limit: embed at most this many images, spread evenly. Retrieval is then not evaluated.
        device: see `pmm_edge.load`.
        batch_sizes: batch sizes to time and to compare with batches of one.
        gates: gates for all models; by default those of each model's precision.
        parity_only: skip timings, cold start and energy.
        explain: find the node at which a failing ONNX model departs from the reference.
        out: name of bench.json; the other files are written next to it. By default in the run folder.
        report: called as work proceeds.

    Raises:
        ModelError: a model or the reference cannot be loaded; nothing was measured.
        DataError: the images cannot be used.
        OutputError: a file cannot be written.
        PmmError: a batch size or limit is less than 1.
        KeyboardInterrupt: interrupted before the models were loaded.
    """
    if not batch_sizes or min(batch_sizes) < 1:
        raise PmmError(f"the batch sizes are {list(batch_sizes)}", "Choose 1 or more, such as --batch-sizes 1,8")
    batch_sizes, gates = tuple(dict.fromkeys(batch_sizes)), gates or GateOverrides()
    base, paths = _find_models(models, reference)
    source, layout = data_of(base, Path(data) if data else None, layout)
    out = Path(out) if out else (run_of(base) or Path()) / "bench.json"
    check_output(out, [".json"])
    images = bench_images(source, limit, layout)
    before = machine_state()
    subjects = [_load(path, device, gates) for path in (base, *paths)]
    found = BenchReport(
        reference=subjects[0].figures,
        models=[subject.figures for subject in subjects[1:]],
        data=str(source),
        data_sha256="",
        images=len(images.paths),
        environment=environment([subject.embedder for subject in subjects], before),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        complete=False,
        warnings=[images.warning] if images.warning else [],
    )
    try:
        found.data_sha256 = data_sha256(images.paths, images.root, report)
        _embed(subjects, images, report)
        _check_invariants(subjects, images, found, batch_sizes, report)
        _compare_with_reference(subjects, images, found)
        _diagnose(subjects, images, found, explain, report)
        if not parity_only:
            _measure_speed(subjects, images, found, batch_sizes, before, report)
        found.complete = True
    except KeyboardInterrupt:
        pass  # what was measured is the result
    latencies = [latency for subject in subjects for latency in subject.figures.latency]
    found.environment = environment([subject.embedder for subject in subjects], before, latencies)
    return _write(found, out)


# Models and images


def _find_models(
    models: str | Path | Sequence[str | Path] | None, reference: str | Path | None
) -> tuple[Path, list[Path]]:
    """Return the reference and the models to compare with it."""
    paths = [Path(models)] if isinstance(models, str | Path) else [Path(model) for model in models or ()]
    own = run_of(paths[0]) if paths and reference is None else None
    base = own / BEST if own else resolve_checkpoint(Path(reference) if reference else None)
    if not paths:
        folder = base.parent if base.parent.name == EXPORT_FOLDER else base.parent / EXPORT_FOLDER
        paths = sorted(path for path in folder.glob("*") if path.suffix in MODEL_SUFFIXES and path != base)
        if not paths:
            raise ModelError(f"{folder} has no exported model", "Run pmm export first, or name the models")
    return base, paths


def _load(path: Path, device: str | None, gates: GateOverrides) -> Subject:
    embedder = load(path, device)
    spec = embedder.spec
    figures = ModelReport(
        path=str(path),
        sha256=sha256(path),
        file_bytes=path.stat().st_size,
        precision=spec.precision,
        embedding_size=spec.embedding_size,
        gflops=spec.gflops,
        parameters=spec.parameters,
        backend=embedder.backend,
        device=embedder.device,
        gates=gates.gates(spec.precision),
    )
    return Subject(embedder, figures)


@dataclass(frozen=True, eq=False)
class BenchImages:
    """Image files, in the order in which they are embedded, under a root folder.

    They are the queries and the gallery of `dataset`, or `warning` says why retrieval is not evaluated.
    """

    root: Path
    paths: list[Path]
    dataset: ReidDataset | None
    warning: BenchWarning | None

    def crops(self, embedder: Embedder, rows: Sequence[int]) -> Pixels:
        """Return some of the images in the model's size, (N, height, width, 3) uint8."""
        size = embedder.spec.input
        return read_crops([self.paths[row] for row in rows], size.height, size.width)


def bench_images(source: Path, limit: int | None = None, layout: str | None = None) -> BenchImages:
    """Find the images of a data set, a folder of crops or a text file with one path per line; none is opened.

    With `limit`, use at most this many, spread evenly. Raises DataError if there is nothing, `layout` is given for a
    list, or no query has a match.
    """
    if limit is not None and limit < 1:
        raise PmmError(f"the limit is {limit} images", "Choose 1 or more, such as --limit 100")
    if not source.exists():
        raise DataError(f"{source} does not exist", "Name a data set or a folder of crops")
    if not source.is_dir() or not (layout or is_dataset(source)):
        paths, root = find_images(source, layout).paths, source if source.is_dir() else source.parent
        paths = [paths[row] for row in evenly(len(paths), limit or len(paths))]
        return BenchImages(root, paths, None, BenchWarning(WarningKind.NO_IDENTITIES))
    dataset = read(source, layout)
    if not len(queries_with_match(dataset)):
        raise DataError(
            f"no query of {dataset.root} has a match in the gallery from another camera",
            "Correct the data set, or name one of its folders to check parity without retrieval",
        )
    paths = [*dataset.query.paths, *dataset.gallery.paths]
    if limit is None or limit >= len(paths):
        return BenchImages(dataset.root, paths, dataset, None)
    warning = BenchWarning(WarningKind.LIMITED, count=limit, total=len(paths))
    return BenchImages(dataset.root, [paths[row] for row in evenly(len(paths), limit)], None, warning)


# Embeddings and invariants


@contextmanager
def _failure_if_it_cannot_run(subject: Subject) -> Iterator[None]:
    """A model that loads but does not run fails; the others are still measured."""
    try:
        yield
    except (ModelError, GpuError) as error:
        subject.figures.failures.append(Failure(FailureKind.CANNOT_RUN, detail=str(error)))


def _embed(subjects: Sequence[Subject], images: BenchImages, report: Report) -> None:
    """Embed all images with each model, and evaluate retrieval."""
    for subject in subjects:
        with _failure_if_it_cannot_run(subject):
            subject.embeddings = embed_files(subject.embedder, images.paths, report=report).embeddings
            if images.dataset and np.isfinite(subject.embeddings).all():
                subject.retrieval = evaluate_dataset(images.dataset, subject.embeddings)
                subject.figures.retrieval = subject.retrieval.figures()
                subject.figures.cmc = [float(share) for share in subject.retrieval.cmc]


def _check_invariants(
    subjects: Sequence[Subject], images: BenchImages, found: BenchReport, batch_sizes: Sequence[int], report: Report
) -> None:
    """Check the declared precision, which gates follow from, and the invariants."""
    try:
        for subject in subjects:
            if failure := precision_failure(subject.embedder.path, subject.figures.precision):
                subject.figures.failures.append(failure)
    except ModuleNotFoundError:
        found.warnings.append(BenchWarning(WarningKind.PRECISION_NOT_CHECKED))
    rows = evenly(len(images.paths), PROBES)
    probes = [images.paths[row] for row in rows]
    for subject in subjects:
        if subject.embeddings is None:
            continue
        embedder, figures = subject.embedder, subject.figures
        figures.invariants = check_embeddings(subject.embeddings, images.paths, embedder.spec.normalized_output)
        with _failure_if_it_cannot_run(subject):
            figures.invariants += check_batches(embedder, images.crops(embedder, rows), probes, batch_sizes, report)
        figures.failures += broken(figures.invariants)


# Parity and retrieval


def _compare_with_reference(subjects: Sequence[Subject], images: BenchImages, found: BenchReport) -> None:
    """Compare each model with the reference, unless the reference fails its own checks."""
    base, *models = subjects
    if base.figures.failures:
        found.warnings.append(BenchWarning(WarningKind.REFERENCE_BROKEN, base.figures.path))
        return
    for model in models:
        if model.figures.sha256 == base.figures.sha256:
            found.warnings.append(BenchWarning(WarningKind.SAME_FILE, model.figures.path))
        if model.embeddings is not None:
            _compare(model, base, images, found)


def _compare(model: Subject, base: Subject, images: BenchImages, found: BenchReport) -> None:
    ours, theirs, figures = model.embedder.spec, base.embedder.spec, model.figures
    if ours.embedding_size != theirs.embedding_size:
        figures.failures.append(Failure(FailureKind.EMBEDDING_SIZE, ours.embedding_size, theirs.embedding_size))
        return
    assert base.embeddings is not None and model.embeddings is not None
    expected, actual = base.embeddings, model.embeddings
    expected_result, result = base.retrieval, model.retrieval
    if ours.normalized_output and not theirs.normalized_output:
        expected = unit_length(expected)  # such a model ranks by cosine: compare it with the reference's directions
        if images.dataset and expected_result:
            expected_result = evaluate_dataset(images.dataset, expected)
    stages = ours.stages if ours.stages == theirs.stages else None
    figures.parity = parity.compare(expected, actual, images.paths, stages)
    figures.failures += parity.parity_failures(figures.parity, figures.gates)
    if expected_result and result:
        figures.retrieval_change = parity.retrieval_change(expected_result, result)
        if failure := parity.map_failure(figures.retrieval_change, figures.gates):
            figures.failures.append(failure)


# Diagnosis


def _diagnose(
    subjects: Sequence[Subject], images: BenchImages, found: BenchReport, explain: bool, report: Report
) -> None:
    """Look for the cause of each failure, and with `explain` for the node where it begins."""
    base, *models = subjects
    rows = evenly(len(images.paths), diagnosis.IMAGES)
    mistakes: list[diagnosis.Mistake] = []
    checkpoints = {None, base.embedder.spec.checkpoint_sha256 or base.figures.sha256}
    for model in models:
        figures, spec = model.figures, model.embedder.spec
        if not figures.failures or figures.parity is None:
            continue
        assert base.embeddings is not None and model.embeddings is not None
        if all(invariant.held for invariant in figures.invariants):
            mistakes = mistakes or diagnosis.wrong_inputs(base.embedder, images.crops(base.embedder, rows), report)
            figures.likely_cause = diagnosis.likely_cause(base.embeddings[rows], model.embeddings[rows], spec, mistakes)
            if figures.likely_cause is None and spec.checkpoint_sha256 not in checkpoints:
                figures.likely_cause = LikelyCause(Cause.OTHER_CHECKPOINT)
        elif spec.precision == "fp16" and not np.isfinite(model.embeddings).all():
            figures.likely_cause = LikelyCause(Cause.FLOAT16_OVERFLOW)
        if explain:
            worst = images.paths.index(Path(figures.parity.whole.worst_image))
            with _warning_if_it_fails(found, figures.path):
                crop = images.crops(model.embedder, [worst])
                figures.departure = diagnosis.first_departure(model.embedder, base.embedder, crop)


# Speed


@contextmanager
def _warning_if_it_fails(found: BenchReport, path: str = "") -> Iterator[None]:
    try:
        yield
    except PmmError as error:
        found.warnings.append(BenchWarning(WarningKind.NOT_MEASURED, path, detail=str(error)))


def _measure_speed(
    subjects: Sequence[Subject],
    images: BenchImages,
    found: BenchReport,
    batch_sizes: Sequence[int],
    before: MachineState,
    report: Report,
) -> None:
    """Measure latency, then cold start and energy: an interrupt keeps the most important figures."""
    if subjects[0].embeddings is None:
        return  # all latencies are relative to the reference
    running = [subject for subject in subjects if subject.embeddings is not None]
    rows = range(min(max(batch_sizes), len(images.paths)))
    try:
        with _warning_if_it_fails(found):
            _measure_latencies(running, images, rows, batch_sizes, report)
    finally:
        for subject in running:
            subject.figures.latency.sort(key=lambda one: (one.scope != "model", one.cuda_graph, one.batch))
        found.warnings += noise_warnings([one for subject in running for one in subject.figures.latency], before)
    for number, subject in enumerate(running):
        embedder, figures = subject.embedder, subject.figures
        report("cold start and energy", number, len(running), embedder.path.name)
        with _warning_if_it_fails(found, figures.path):
            figures.cold_start = measure_cold_start(embedder.path, embedder.device, max(batch_sizes))
        with _warning_if_it_fails(found, figures.path):
            figures.energy = measure_energy(embedder, images.crops(embedder, rows))
    report("cold start and energy", len(running), len(running))


def _measure_latencies(
    running: Sequence[Subject], images: BenchImages, rows: Sequence[int], batch_sizes: Sequence[int], report: Report
) -> None:
    """Time all models in turns for each batch size; engines with CUDA graphs also without."""
    timed = [(subject.figures, subject.embedder) for subject in running]
    end_to_end, sources = list(timed), images.paths
    timed += [(subject.figures, plain) for subject in running if (plain := without_cuda_graphs(subject.embedder))]
    crops = [images.crops(embedder, rows) for _, embedder in timed]
    for batch in batch_sizes:
        latencies = measure_latency([embedder for _, embedder in timed], crops, batch, report=report)
        for (figures, _), latency in zip(timed, latencies, strict=True):
            figures.latency.append(latency)
    for batch in batch_sizes:
        latencies = measure_end_to_end([embedder for _, embedder in end_to_end], sources, batch, report=report)
        for (figures, _), latency in zip(end_to_end, latencies, strict=True):
            figures.latency.append(latency)


# Files


def _write(found: BenchReport, out: Path) -> BenchResult:
    found.save(out)  # first: it holds the work of minutes, and what follows may fail
    summary = out.with_suffix(".md")
    with written_whole(summary) as temporary:
        temporary.write_bytes(markdown(found).encode("utf-8", "replace"))  # file names may not be valid UTF-8
    page = out.with_name("report.html") if out.name == "bench.json" else out.with_suffix(".html")
    write_html(found, page)
    return BenchResult(found, [out, summary, page], write_certificates(found))
