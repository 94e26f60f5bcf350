"""What a bench found, in one sentence."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pmm_edge.bench.figures import BenchReport, ModelReport


@dataclass(frozen=True)
class Verdict:
    """The answer, before any figure."""

    state: Literal["passes", "fails", "partial"]
    sentence: str


def verdict(report: BenchReport) -> Verdict:
    """Whether the models may ship; where not, the first gate that failed and how many more did."""
    if not report.complete:
        return Verdict("partial", f"Interrupted: {_so_far(report)}.")
    if not report.failures:
        return Verdict("passes", f"{_all_models(report)} against {Path(report.reference.path).name}{_shown(report)}.")
    return Verdict("fails", f"{_failing(report)}.")


def named(report: BenchReport) -> list[tuple[str, ModelReport]]:
    """The reference and the models under what tables call them: the file's name, the path where two share one."""
    models = (report.reference, *report.models)
    shared = Counter(Path(model.path).name for model in models)
    found = [Path(model.path).name if shared[Path(model.path).name] == 1 else model.path for model in models]
    unique = [name if found.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(found)]
    return list(zip(unique, models, strict=True))


def _all_models(report: BenchReport) -> str:
    if len(report.models) == 1:
        return f"{Path(report.models[0].path).name} holds its gates"
    return f"All {len(report.models)} models hold their gates"


def _shown(report: BenchReport) -> str:
    """What they were seen to do, in the figure that says most, of the model that moved most."""
    changes = [model.retrieval_change for model in report.models if model.retrieval_change]
    cosines = [model.parity.whole.cosine_min for model in report.models if model.parity]
    if changes:
        moved = 100 * max(abs(change.mAP.difference) for change in changes)
        hits = max(len(change.first_hits) for change in changes)
        most = "at most " if len(changes) > 1 else ""
        return f": mAP moves by {most}{moved:.2f} points, {most}{hits:,} of {changes[0].queries:,} first hits change"
    return f": least cosine {min(cosines):.6f}" if cosines else ""


def _failing(report: BenchReport) -> str:
    (reference, judge), *models = named(report)
    if judge.failures:
        return f"The reference {reference} fails: {judge.failures[0]}"
    failing = [(name, model) for name, model in models if model.failures]
    (name, first), total = failing[0], len(report.failures)
    who = f"{len(failing)} of {len(report.models)} models {'fails' if len(failing) == 1 else 'fail'}"
    more = f" (and {total - 1} more {'failure' if total == 2 else 'failures'})" if total > 1 else ""
    return f"{who}: {name} {first.failures[0]}{more}"


def _so_far(report: BenchReport) -> str:
    if report.failures:
        return f"not everything was measured, and already {_failing(report)[0].lower()}{_failing(report)[1:]}"
    return "not everything was measured; nothing has failed by then"
