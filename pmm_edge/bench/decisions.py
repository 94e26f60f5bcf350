"""Decisions: which pairs of images a model calls the same person at the thresholds of its spec (docs/parity.md)."""

import math
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from pmm_edge.bench.report import Change, ChangedPair, Decision, Decisions, Failure, FailureKind, Gates
from pmm_edge.console import Report, silent
from pmm_edge.data.dataset import ReidDataset
from pmm_edge.retrieval.distances import both_distances, positive_lengths
from pmm_edge.retrieval.thresholds import People
from pmm_edge.runtime.embedder import Embeddings
from pmm_edge.spec import Calibration, Distance, Threshold

LISTED = 3
"""Number of changed pairs that a report names for each threshold."""


class _Matches:
    """Pairs that the reference (index 0) and the model (index 1) match at one threshold."""

    def __init__(self, threshold: Threshold, people: People, dataset: ReidDataset) -> None:
        self.threshold, self.people, self.dataset = threshold, people, dataset
        self.impostors = np.zeros((2, people.known, people.units), np.int64)
        self.genuine = np.zeros((2, people.known), np.int64)
        self.changed = 0
        self.worst: list[tuple[float, ChangedPair]] = []

    def add(
        self, row: NDArray[np.intp], column: NDArray[np.intp], genuine: NDArray[np.bool_], pair: NDArray[np.float32]
    ) -> None:
        """Add pairs, (N,) each, with their distances (2, N)."""
        people, matched = self.people, pair <= np.float32(self.threshold.distance)
        for side in (0, 1):
            same, other = matched[side] & genuine, matched[side] & ~genuine
            np.add.at(self.impostors[side], (people.row_unit[row[other]], people.column_unit[column[other]]), 1)
            np.add.at(self.genuine[side], people.row_unit[row[same]], 1)
        changed = np.flatnonzero(matched[0] != matched[1])
        self.changed += len(changed)
        # Worst are pairs for which both distances are far from the threshold.
        margin = np.abs(pair[:, changed] - self.threshold.distance).min(axis=0)
        for index in np.argsort(-margin, kind="stable")[:LISTED]:
            place = changed[index]
            query = str(self.dataset.query.paths[people.rows[row[place]]])
            image = str(self.dataset.gallery.paths[people.columns[column[place]]])
            found = ChangedPair(query, image, bool(genuine[place]), float(pair[0, place]), float(pair[1, place]))
            self.worst.append((float(margin[index]), found))
        self.worst = sorted(self.worst, key=lambda entry: -entry[0])[:LISTED]

    def decision(self, distance: Distance) -> Decision:
        """Return rates and their intervals."""
        people, threshold = self.people, self.threshold
        before, now = map(int, self.impostors.sum(axis=(1, 2)))
        # Half a pair is added, so that the ratio is defined for a model without false matches. Draws in which neither
        # model has any are no evidence.
        drawn = np.stack([people.drawn(side) for side in self.impostors])
        drawn = drawn[:, drawn.any(axis=0)] + 0.5
        low, high = np.quantile(drawn[1] / drawn[0], (0.025, 0.975)) if drawn.size else (1.0, 1.0)
        tmr = self.genuine.sum(axis=1) / people.genuine.sum()
        weights = people.weights[:, : people.known]
        changes = weights @ (self.genuine[1] - self.genuine[0]) / np.maximum(weights @ people.genuine, 1)
        return Decision(
            distance=distance,
            threshold=threshold.distance,
            nominal=threshold.fmr,
            fmr=now / people.impostors,
            reference_fmr=before / people.impostors,
            fmr_ratio=(now + 0.5) / (before + 0.5),
            fmr_ratio_low=float(low),
            fmr_ratio_high=float(high),
            tmr=float(tmr[1]),
            tmr_change=Change(float(tmr[1] - tmr[0]), *map(float, np.quantile(changes, (0.025, 0.975)))),
            changed=self.changed,
            worst=[pair for _, pair in self.worst],
        )


def compare_decisions(
    reference: Embeddings,
    candidate: Embeddings,
    dataset: ReidDataset,
    calibration: Calibration,
    data_sha256: str,
    report: Report = silent,
) -> Decisions:
    """Compare the matches of two models at the same thresholds, on pairs of a query and a gallery image.

    Both are finite (queries + gallery, D) embeddings without rows of zeros. The pairs are those of `pmm calibrate`: of
    different cameras, without junk. Intervals are from a bootstrap over people in which both models are judged on the
    same draws, so that the difficulty of people cancels out.
    """
    query, gallery, people = dataset.query, dataset.gallery, People(*dataset.labels)
    row_pids, column_pids = query.pids[people.rows], gallery.pids[people.columns]
    tallies = {
        name: [_Matches(one, people, dataset) for one in getattr(calibration, name).thresholds]
        for name in get_args(Distance)
    }
    farthest = [np.float32(max((one.threshold.distance for one in found), default=-1)) for found in tallies.values()]
    sides = [(one[people.rows], one[len(query) + people.columns]) for one in (reference, candidate)]
    both = [both_distances(*side, *map(positive_lengths, side)) for side in sides]
    for (start, *before), (_, *now) in zip(*both, strict=True):
        for found, limit, *pair in zip(tallies.values(), farthest, before, now, strict=True):
            for row, (first, last) in enumerate(people.same_camera[start : start + len(pair[0])]):
                pair[0][row, first:last] = pair[1][row, first:last] = np.inf
            near = np.nonzero(np.minimum(*pair) <= limit)
            row_index, column_index = near[0] + start, near[1]
            same_person, distances = row_pids[row_index] == column_pids[column_index], np.stack([d[near] for d in pair])
            for tally in found:
                tally.add(row_index, column_index, same_person, distances)
        report("decisions", start + len(before[0]), len(people.rows))
    decisions = [tally.decision(name) for name, found in tallies.items() for tally in found]
    same_images = calibration.data_sha256 == data_sha256
    return Decisions(calibration.dataset, same_images, int(people.genuine.sum()), people.impostors, decisions)


def failed_decisions(decisions: Decisions, gates: Gates) -> list[Failure]:
    """Return at most two failed gates, each at the threshold where the model fails most.

    A change fails if it is larger than the gate allows and is not explained by the choice of people: the interval of
    the ratio excludes 1, or that of the change excludes 0.
    """
    failures, limit = [], gates.max_fmr_factor
    beyond = [
        one
        for one in decisions.thresholds
        if not 1 / limit <= one.fmr_ratio <= limit and not one.fmr_ratio_low <= 1 <= one.fmr_ratio_high
    ]
    if beyond:
        worst = max(beyond, key=lambda one: abs(math.log(one.fmr_ratio)))
        failures.append(Failure(FailureKind.FALSE_MATCHES, worst.fmr_ratio, limit, decision=worst))
    lost = [one for one in decisions.thresholds if -100 * one.tmr_change.difference > gates.max_tmr_drop]
    if lost := [one for one in lost if one.tmr_change.high < 0]:
        worst = min(lost, key=lambda one: one.tmr_change.difference)
        change = worst.tmr_change
        drop = -100 * change.difference
        failures.append(Failure(FailureKind.TRUE_MATCHES, drop, gates.max_tmr_drop, change=change, decision=worst))
    return failures
