"""The bench: models beside their reference on the same images, then timed in turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from pmm_edge.bench.claimed_precision import precision_failure
from pmm_edge.bench.diagnosis import IMAGES as DIAGNOSED
from pmm_edge.bench.diagnosis import likely_cause, overflow
from pmm_edge.bench.explain import first_departure
from pmm_edge.bench.figures import BenchReport
from pmm_edge.bench.gates import cosine_failures, length_failure, map_failure
from pmm_edge.bench.images import bench_images
from pmm_edge.bench.invariants import PROBES, breaches, fault_of, held_in_batches
from pmm_edge.bench.parity import compare
from pmm_edge.bench.quiet import machine_state
from pmm_edge.bench.retrieval import evaluate_embeddings
from pmm_edge.bench.significance import few_queries, retrieval_change
from pmm_edge.bench.speed import measure_speed
from pmm_edge.bench.subjects import Options, Run, Subject
from pmm_edge.data.fingerprint import data_sha256
from pmm_edge.errors import ModelError
from pmm_edge.images import evenly
from pmm_edge.progress import Report, silent
from pmm_edge.retrieval import RetrievalResult
from pmm_edge.retrieval.distances import unit_length
from pmm_edge.runtime import embed_files, load
from pmm_edge.runtime.cuda import GpuError


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
            subject.embeddings = embed_files(subject.embedder, run.images.paths, report=report)
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
