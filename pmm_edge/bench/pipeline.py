"""`pmm bench`: find models and images, embed, check invariants, compare with the reference, diagnose, time, write."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from pmm_edge.bench import diagnosis, parity
from pmm_edge.bench.certification import Certification, write_certificates
from pmm_edge.bench.decisions import compare_decisions, failed_decisions
from pmm_edge.bench.html import write_html
from pmm_edge.bench.parity import Subject
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
from pmm_edge.bench.resources import environment, machine_state, measure_energy, noise_warnings
from pmm_edge.bench.tables import markdown
from pmm_edge.bench.timing import measure_cold_start, measure_latency
from pmm_edge.console import Report, printable, silent
from pmm_edge.data.checks import unreadable
from pmm_edge.data.dataset import ReidDataset, data_sha256, queries_with_match
from pmm_edge.errors import DataError, ModelError, PmmError
from pmm_edge.files import check_output, sha256, written_whole
from pmm_edge.images import evenly, read_crops
from pmm_edge.runs import EXPORT_FOLDER, RUNS, data_of, find_checkpoint, resolve_checkpoint, run_of
from pmm_edge.runtime import embed_files, load
from pmm_edge.runtime.certificate import open_model
from pmm_edge.runtime.cuda import GpuError, NotOnThisMachineError
from pmm_edge.runtime.embed_files import cosine_figures, evaluate_dataset
from pmm_edge.runtime.listing import find_images


@dataclass(frozen=True)
class BenchResult:
    """What a bench found and wrote; `files` are bench.json, bench.md and report.html."""

    report: BenchReport
    files: list[Path]
    certificates: Certification


def bench(
    models: str | Path | Sequence[str | Path] | None = None,
    *,
    reference: str | Path | None = None,
    data: str | Path | None = None,
    layout: str | None = None,
    limit: int | None = None,
    device: str | None = None,
    batch_sizes: Sequence[int] = (1, 8),
    gates: Mapping[str, float | None] | None = None,
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
        models: files that `pmm_edge.load` accepts, or run folders; by default the reference's run. A run folder means
            all its exports, without engines that need a GPU or package that is missing here: a warning says why.
        reference: a model or a run folder. By default the checkpoint that the first model was exported from, which is
            searched in the folder and run of the model and in runs/; without `models`, that of the newest run.
        data: a data set (of this `layout`, if it is not recognized), whose queries and gallery are embedded, or a
            folder or list of crops, which shows parity without retrieval; by default the data set of the run.
        limit: embed at most this many images, spread evenly. Retrieval is then not evaluated.
        batch_sizes: batch sizes to time and to compare with batches of one.
        gates: for all models, such as {"min_cosine": 0.99}; by default those of each model's precision.
        parity_only: skip timings, cold start and energy.
        explain: find the node at which a failing ONNX model departs from the reference.
        out: name of bench.json; the other files are written next to it. By default in the run folder of the first
            model, or next to a model that is in none.

    Raises ModelError if a model or the reference cannot be loaded or if they come from different checkpoints,
    NotOnThisMachineError if a named engine cannot run here, DataError if the images cannot be used, OutputError if a
    file cannot be written, and PmmError if a batch size or the limit is less than 1.
    """
    if not batch_sizes or min(batch_sizes) < 1:
        raise PmmError(f"the batch sizes are {list(batch_sizes)}", "Choose 1 or more, such as --batch-sizes 1,8")
    batch_sizes = sorted(set(batch_sizes))
    named = [Path(models)] if isinstance(models, str | Path) else [Path(model) for model in models or ()]
    base = Path(reference) if reference else None
    if base or not named:
        base = resolve_checkpoint(base)
    paths = [] if named or not base else _exports_of(base, base)
    for path in named:
        if path.is_dir():  # without files that are named themselves, or twice
            listed = {one.resolve() for one in (*named, *paths)}
            paths += [file for file in _exports_of(resolve_checkpoint(path), base) if file.resolve() not in listed]
        else:
            paths.append(path)
    out = Path(out) if out else (run_of(paths[0]) or paths[0].parent) / "bench.json"
    check_output(out, [".json"])
    before = machine_state()
    others, missing = list[Subject](), list[BenchWarning]()
    for path in paths:
        try:
            others.append(_load(path, device, gates or {}))
        except NotOnThisMachineError as error:
            if path.resolve() in [one.resolve() for one in named] or (path == paths[-1] and not others):
                raise
            # One of all exports of a run, such as an engine for another machine.
            missing.append(BenchWarning(WarningKind.NOT_MEASURED, str(path), detail=str(error)))
    base = base or _reference_of(others[0])
    source, layout = data_of(base if run_of(base) else paths[0], Path(data) if data else None, layout)
    images = bench_images(source, limit, layout, report)
    rows = evenly(len(images.paths), parity.PROBES)
    first = _load(base, device, gates or {})
    _check_reference(first, others)
    subjects = [first, *others]
    embedders = [subject.embedder for subject in subjects]
    found = BenchReport(
        reference=first.figures,
        models=[subject.figures for subject in others],
        data=str(source),
        data_sha256="",
        images=len(images.paths),
        environment=environment(embedders, before),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        complete=False,
        warnings=missing + images.warnings,
    )
    if find_spec("onnx") is None:
        found.warnings.append(BenchWarning(WarningKind.PRECISION_NOT_CHECKED))
    try:
        found.data_sha256 = data_sha256(images.paths, images.root, report)
        for subject in subjects:
            _embed(subject, images.paths, images.dataset, rows, batch_sizes, report)
        if first.figures.failures:
            found.warnings.append(BenchWarning(WarningKind.REFERENCE_BROKEN, first.figures.path))
        for model in [] if first.figures.failures else others:
            if model.figures.sha256 == first.figures.sha256:
                found.warnings.append(BenchWarning(WarningKind.SAME_FILE, model.figures.path))
            parity.compare(model, first, images.paths, images.dataset)
            _check_decisions(model, first, images.dataset, found, report)
        _diagnose(subjects, rows, found, explain, report)
        if not parity_only:
            _measure_speed(subjects, images.paths, found, batch_sizes, report)
        found.complete = True
    except KeyboardInterrupt:
        pass  # what was measured is the result
    latencies = [latency for subject in subjects for latency in subject.figures.latency]
    found.warnings += noise_warnings(latencies, before) if latencies else []
    found.environment = environment(embedders, before, latencies)
    found.save(out)  # first: it holds the work of minutes, and what follows may fail
    summary, page = out.with_suffix(".md"), out.with_name("report.html")
    page = page if out.name == "bench.json" else out.with_suffix(".html")
    with written_whole(summary) as temporary:
        temporary.write_text(printable(markdown(found), keep="\n"), encoding="utf-8")
    write_html(found, page)
    return BenchResult(found, [out, summary, page], write_certificates(found))


def _exports_of(base: Path, reference: Path | None) -> list[Path]:
    """The exports in the run of a checkpoint or export, without it and the reference; raise ModelError if none."""
    folder = base.parent if base.parent.name == EXPORT_FOLDER else base.parent / EXPORT_FOLDER
    suffixes = (".onnx", ".engine", ".safetensors")
    without = (base.resolve(), reference and reference.resolve())
    paths = sorted(path for path in folder.glob("*") if path.suffix in suffixes and path.resolve() not in without)
    if not paths:
        raise ModelError(f"{folder} has no exported model to compare", "Run pmm export first, or name the models")
    return paths


def _reference_of(model: Subject) -> Path:
    """Find the checkpoint that a model was exported from, or raise ModelError."""
    path, digest = model.embedder.path, model.embedder.spec.checkpoint_sha256
    if found := find_checkpoint(path, digest, _digests):
        return found
    problem = f"the checkpoint that {path} was exported from (SHA-256 {digest}) is neither next to it nor in {RUNS}/"
    remedy = "Pass it with --reference, or, where torch is not installed, an FP32 .onnx export of it"
    raise ModelError(problem if digest else f"{path} does not say which checkpoint it was exported from", remedy)


def _digests(checkpoint: Path) -> Iterator[str | None]:
    """SHA-256 of a file, and the one that it had before `pmm calibrate` rewrote it, if it did."""
    yield sha256(checkpoint)
    with suppress(ModelError, ImportError):
        from pmm_edge.model.checkpoint import load_checkpoint

        yield load_checkpoint(checkpoint).spec.checkpoint_sha256


def _check_reference(reference: Subject, models: Sequence[Subject]) -> None:
    """Raise ModelError if a model was exported from another checkpoint than the reference."""
    base, spec = reference.embedder.path, reference.embedder.spec
    digest = spec.checkpoint_sha256 or (reference.figures.sha256 if base.suffix in (".pt", ".pth") else None)
    for path, own in ((model.embedder.path, model.embedder.spec.checkpoint_sha256) for model in models):
        if digest and own and own != digest:
            found = find_checkpoint(path, own, _digests)
            problem = f"{path} was exported from {found or f'the checkpoint with SHA-256 {own}'}, not from {base}"
            again = "Export it again, or pass that checkpoint with --reference"
            raise ModelError(problem, f"Run pmm bench {path} --reference {found}" if found else again)


@dataclass(frozen=True, eq=False)
class BenchImages:
    """The queries and the gallery of a data set, or other images and why retrieval is not evaluated."""

    root: Path
    paths: list[Path]
    dataset: ReidDataset | None = None
    warnings: list[BenchWarning] = field(default_factory=list)


def bench_images(
    source: Path, limit: int | None = None, layout: str | None = None, report: Report = silent
) -> BenchImages:
    """Find the readable images of a data set, a folder of crops or a text file with one path per line.

    Raises DataError if there are none, `layout` is given for a list, or no query has a match.
    """
    if limit is not None and limit < 1:
        raise PmmError(f"the limit is {limit} images", "Choose 1 or more, such as --limit 100")
    images = find_images(source, layout)
    dataset, paths, root = images.dataset, images.paths, source if source.is_dir() else source.parent
    warnings = [] if dataset else [BenchWarning(WarningKind.NO_IDENTITIES)]
    if dataset:
        root, paths = dataset.root, [*dataset.query.paths, *dataset.gallery.paths]
    if limit and limit < len(paths):
        warnings = [BenchWarning(WarningKind.LIMITED, count=limit, total=len(paths))] if dataset else warnings
        paths, dataset = [paths[row] for row in evenly(len(paths), limit)], None
    # Without those that cannot be read: the models are still compared on the same images.
    bad = {image.path: image for image in unreadable(paths, report=report)}
    warnings += [BenchWarning(WarningKind.UNREADABLE, str(path), detail=image.reason) for path, image in bad.items()]
    if not (kept := [path for path in paths if path not in bad]):
        raise bad[paths[0]].error("Replace the files: none of them can be read")
    if dataset:
        dataset = replace(dataset, query=dataset.query.without(bad), gallery=dataset.gallery.without(bad))
        if not len(queries_with_match(dataset)):
            raise DataError(
                f"no query of {root} has a match in the gallery from another camera",
                "Correct the data set, or name one of its folders to check parity without retrieval",
            )
    return BenchImages(root, kept, dataset, warnings)


def _load(path: Path, device: str | None, gates: Mapping[str, float | None]) -> Subject:
    file = open_model(path, require_certificate=None)
    embedder = load(file, device)
    spec = embedder.spec
    size = file.size, spec.precision, spec.embedding_size, spec.gflops, spec.parameters
    runs_on = embedder.backend, embedder.device
    chosen = parity.gates_for(spec.precision, gates, embedder.float16_sums)
    figures = ModelReport(str(path), file.sha256, *size, *runs_on, chosen, embedder.float16_sums)
    return Subject(embedder, figures)


def _embed(
    subject: Subject,
    paths: Sequence[Path],
    dataset: ReidDataset | None,
    rows: Sequence[int],
    batch_sizes: Sequence[int],
    report: Report,
) -> None:
    """Embed all images, evaluate retrieval, and check the invariants and the declared precision of a model.

    A model that loads but does not run fails; the others are still measured.
    """
    embedder, figures, spec = subject.embedder, subject.figures, subject.embedder.spec
    probes = [paths[row] for row in rows]
    subject.crops = read_crops(probes, spec.input.height, spec.input.width)
    if failure := parity.precision_failure(embedder.path, figures.precision):
        figures.failures.append(failure)
    try:
        subject.embeddings = embed_files(embedder, paths, report=report).embeddings
        if dataset and np.isfinite(subject.embeddings).all():
            subject.retrieval = evaluate_dataset(dataset, subject.embeddings)
            figures.retrieval, figures.cmc = subject.retrieval.figures(), subject.retrieval.cmc.tolist()
            figures.retrieval_cosine = cosine_figures(dataset, subject.embeddings)
        unit = spec.normalized_output
        figures.invariants = parity.check_embeddings(subject.embeddings, paths, rows, subject.crops, unit)
        figures.invariants += parity.check_batches(embedder, subject.crops, probes, batch_sizes, report)
    except (ModelError, GpuError) as error:
        figures.failures.append(Failure(FailureKind.CANNOT_RUN, detail=str(error)))
    for broken in [one for one in figures.invariants if not one.held]:
        figures.failures.append(Failure(FailureKind.INVARIANT, broken.value, broken.tolerance, broken.image, broken))


def _check_decisions(
    model: Subject, reference: Subject, dataset: ReidDataset | None, found: BenchReport, report: Report
) -> None:
    """Compare the matches at the thresholds of the model's spec, if retrieval was compared."""
    figures, calibration, warned = model.figures, model.embedder.spec.calibration, {one.kind for one in found.warnings}
    if not (dataset and figures.retrieval_change and model.embeddings is not None):
        return
    if calibration is None:
        if WarningKind.NO_THRESHOLDS not in warned:
            found.warnings.append(BenchWarning(WarningKind.NO_THRESHOLDS, figures.path))
        return
    with _warning_if_it_fails(found, figures.path):
        expected = parity.expected_embeddings(model, reference)
        figures.decisions = compare_decisions(
            expected, model.embeddings, dataset, calibration, found.data_sha256, report
        )
        figures.failures += failed_decisions(figures.decisions, figures.gates)
        for one in figures.decisions.thresholds if WarningKind.OTHER_RATES not in warned else ():
            low, high = calibration.threshold(one.nominal, one.distance).fmr_interval
            if not low <= one.reference_fmr <= high:
                about = f"{one.distance} distance, calibrated on {calibration.dataset}"
                rates = one.reference_fmr, one.nominal
                found.warnings.append(BenchWarning(WarningKind.OTHER_RATES, figures.path, *rates, detail=about))
                break


def _diagnose(
    subjects: Sequence[Subject], rows: Sequence[int], found: BenchReport, explain: bool, report: Report
) -> None:
    """Look for the cause of each failure, and with `explain` for the node where it begins."""
    base, *models = subjects
    failed = [model for model in models if model.figures.failures and model.figures.parity]
    mistakes = diagnosis.wrong_inputs(base.embedder, base.crops, report) if failed else {}
    for model in failed:
        figures, spec = model.figures, model.embedder.spec
        assert base.embeddings is not None and model.embeddings is not None and figures.parity is not None
        if all(invariant.held for invariant in figures.invariants):
            figures.likely_cause = diagnosis.likely_cause(base.embeddings[rows], model.embeddings[rows], spec, mistakes)
        elif spec.precision == "fp16" and not np.isfinite(model.embeddings).all():
            figures.likely_cause = LikelyCause(Cause.FLOAT16_OVERFLOW)
        if explain:
            with _warning_if_it_fails(found, figures.path):
                worst = Path(figures.parity.whole.worst_image)
                figures.departure = diagnosis.first_departure(model.embedder, base.embedder, worst)


@contextmanager
def _warning_if_it_fails(found: BenchReport, path: str = "") -> Iterator[None]:
    try:
        yield
    except PmmError as error:
        found.warnings.append(BenchWarning(WarningKind.NOT_MEASURED, path, detail=str(error)))


def _measure_speed(
    subjects: Sequence[Subject], paths: Sequence[Path], found: BenchReport, batch_sizes: Sequence[int], report: Report
) -> None:
    """Measure latency, then cold start and energy: an interrupt keeps the most important figures."""
    if subjects[0].embeddings is None:
        return  # all latencies are relative to the reference
    running = [subject for subject in subjects if subject.embeddings is not None]
    embedders, crops = [one.embedder for one in running], [one.crops for one in running]
    with _warning_if_it_fails(found):
        for files in ((), paths):
            for batch in batch_sizes:
                latencies = measure_latency(embedders, crops, batch, report=report, files=files)
                for subject, latency in zip(running, latencies, strict=True):
                    subject.figures.latency.append(latency)
    largest = max(batch_sizes)
    for number, subject in enumerate(running):
        embedder, figures = subject.embedder, subject.figures
        report("cold start and energy", number, len(running), embedder.path.name)
        with _warning_if_it_fails(found, figures.path):
            figures.cold_start = measure_cold_start(embedder.path, embedder.device, largest)
        with _warning_if_it_fails(found, figures.path):
            figures.energy = measure_energy(embedder, np.resize(subject.crops, (largest, *subject.crops.shape[1:])))
    report("cold start and energy", len(running), len(running))
