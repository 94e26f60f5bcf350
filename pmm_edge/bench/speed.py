"""All that a bench times: latency in turns, start, operations, energy, a stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pmm_edge.bench.cold_start import measure_cold_start
from pmm_edge.bench.compute import compute_of
from pmm_edge.bench.energy import measure_energy
from pmm_edge.bench.latency import measure_end_to_end, measure_latency, without_cuda_graphs
from pmm_edge.bench.quiet import machine_warnings
from pmm_edge.bench.stream import measure_stream
from pmm_edge.bench.subjects import Run, Subject
from pmm_edge.errors import PmmError
from pmm_edge.progress import Report, about


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
    if run.options.clients:
        for subject in run.sound:
            with _or_warning(run):
                _stream(run, subject, run.options.clients, report)


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


def _stream(run: Run, subject: Subject, clients: int, report: Report) -> None:
    crops = run.crops(subject, run.first_rows(clients))
    subject.stream = measure_stream(subject.embedder, crops, clients, report=about(subject.name, report))
