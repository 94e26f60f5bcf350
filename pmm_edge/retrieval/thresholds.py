"""Decision thresholds: the distance up to which two images show the same person, at a chosen rate of false matches.

The pairs are a query and a gallery image of different cameras: genuine if they show one person, otherwise impostor.
The false-match rate (FMR) is the share of impostor pairs at or below a threshold, the true-match rate (TMR) that of
genuine pairs (ISO/IEC 19795-1). Junk is dropped; distractors are people of whom there is no query.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pmm_edge.console import Report, silent
from pmm_edge.errors import DataError
from pmm_edge.retrieval.distances import both_distances, check_pair, positive_lengths
from pmm_edge.retrieval.metrics import DISTRACTOR_PID, JUNK_PID, check_labels
from pmm_edge.spec import Calibration, Distance, DistanceThresholds, Threshold

RATES = (1e-2, 1e-3, 1e-4)
MIN_FALSE_MATCHES = 10
"""Expected false matches at a threshold. With fewer, chance decides where it lies."""
BINS = 1 << 16  # of the histograms; their width is a power of 2, so that the bin of a float32 distance is exact
DRAWS = 1000  # of the bootstrap
MAX_UNITS = 2048  # people, and strangers, that are drawn separately; more are drawn in groups


@dataclass(frozen=True, eq=False)
class PairHistogram:
    """Number of pairs by distance: bin k holds those in [k x `width`, (k + 1) x `width`)."""

    width: float
    genuine: NDArray[np.int64]  # (BINS,)
    impostor: NDArray[np.int64]

    def rates(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """FMR and TMR if the pairs of the first 0, 1, ... BINS bins are accepted: the points of a ROC curve."""
        counts = np.stack([self.impostor, self.genuine])
        shares = np.cumsum(np.pad(counts, ((0, 0), (1, 0))), axis=1) / counts.sum(axis=1, keepdims=True)
        return shares[0], shares[1]

    def equal_error_rate(self) -> float:
        """The rate at which false matches and missed matches (1 - TMR) are equal, interpolated between bins."""
        fmr, tmr = self.rates()
        return float(np.interp(0.0, fmr + tmr - 1, fmr))


@dataclass(frozen=True, eq=False)
class FoundThresholds:
    """The result of `find_thresholds`."""

    calibration: Calibration
    histograms: dict[Distance, PairHistogram]
    refused: dict[float, int]  # rates that the data does not support, with the number of impostor pairs they need


def find_thresholds(
    query_features: ArrayLike,
    gallery_features: ArrayLike,
    *labels: ArrayLike,
    dataset: str = "",
    data_sha256: str = "",
    report: Report = silent,
) -> FoundThresholds:
    """Find the thresholds of Euclidean and cosine distance at the false-match rates `RATES`.

    Takes (Q, D) and (G, D) embeddings and their labels as `evaluate` does: query pids, gallery pids, query camids,
    gallery camids. Queries of pid -1 or 0 are left out. All counts are exact, of the float32 distances that
    `pairwise_distances` returns. A rate needs `MIN_FALSE_MATCHES` expected false matches.

    The intervals are from a bootstrap over people: two pairs with a person in common are not independent. A draw takes
    as many people as there are, with repetition; a pair counts as often as the first person was drawn times the second
    (Owen, The pigeonhole bootstrap, 2007). The ratio (FMR) or difference (TMR) of two independent draws then is
    that of two sets of people: the one that was measured here and another one.

    Raises DataError for wrong arrays, NaN or infinity, embeddings of length 0, fewer than two people with a genuine
    pair, or too few impostor pairs for any of the rates.
    """
    query, gallery = check_pair(query_features, gallery_features)
    check_labels(labels, (len(query), len(gallery)))
    people = People(*labels)
    refused = refused_rates(people)
    supported = [rate for rate in RATES if rate not in refused]
    nearest = _accepted(supported[0], people.impostors) + 1
    query, gallery = query[people.rows], gallery[people.columns]
    lengths = positive_lengths(query), positive_lengths(gallery)
    bounds: dict[Distance, float] = {"euclidean": lengths[0].max() + lengths[1].max(), "cosine": 2.0}
    tallies = {name: _Tally(bound, len(people.genuine_row), nearest) for name, bound in bounds.items()}
    for first, *distances in both_distances(query, gallery, *lengths):
        for tally, part in zip(tallies.values(), distances, strict=True):
            tally.add(part, first, people)
        report("comparing pairs", first + len(distances[0]), len(query))
    found = {name: _thresholds(name, supported, tally, people) for name, tally in tallies.items()}
    calibration = Calibration(
        dataset=dataset,
        data_sha256=data_sha256,
        identities=people.identities,
        genuine_pairs=len(people.genuine_row),
        impostor_pairs=people.impostors,
        embedding_size=query.shape[1],
        euclidean=found["euclidean"],
        cosine=found["cosine"],
    )
    return FoundThresholds(calibration, {name: tally.histogram() for name, tally in tallies.items()}, refused)


def refused_rates(people: People) -> dict[float, int]:
    """Return the rates that need more impostor pairs, with the number they need; DataError if all rates do."""
    needed = {rate: round(MIN_FALSE_MATCHES / rate) for rate in RATES}
    refused = {rate: pairs for rate, pairs in needed.items() if pairs > people.impostors}
    if len(refused) == len(RATES):
        problem = f"{people.impostors:,} pairs of different people in different cameras are too few for a threshold"
        raise DataError(problem, f"A false-match rate of {RATES[0]:g} needs {refused[RATES[0]]:,}")
    return refused


class People:
    """The people on rows and columns of the table of pairs: `rows` are indices of queries, `columns` of gallery images.

    Takes query pids, gallery pids, query camids and gallery camids. Raises DataError for fewer than two people.
    """

    def __init__(self, *labels: ArrayLike) -> None:
        query_pids, gallery_pids, query_camids, gallery_camids = (np.asarray(each, np.int64) for each in labels)
        # In the order of cameras, the gallery images of a query's own camera, which form no pairs, are one slice.
        kept = np.flatnonzero(~np.isin(query_pids, (JUNK_PID, DISTRACTOR_PID)))
        self.rows = kept[np.argsort(query_camids[kept], kind="stable")]
        kept = np.flatnonzero(gallery_pids != JUNK_PID)
        self.columns = kept[np.argsort(gallery_camids[kept], kind="stable")]
        row_pids, rows = query_pids[self.rows], query_camids[self.rows]
        column_pids, columns = gallery_pids[self.columns], gallery_camids[self.columns]
        self.same_camera = np.stack([np.searchsorted(columns, rows, side) for side in ("left", "right")], axis=1)
        by_pid = np.argsort(column_pids, kind="stable")
        first, last = (np.searchsorted(column_pids[by_pid], row_pids, side) for side in ("left", "right"))
        sizes = last - first
        row = np.repeat(np.arange(len(row_pids)), sizes)
        column = by_pid[np.arange(sizes.sum()) + np.repeat(first - np.cumsum(sizes) + sizes, sizes)]
        other_camera = rows[row] != columns[column]
        self.genuine_row, self.genuine_column = row[other_camera], column[other_camera]
        if len(np.unique(row_pids[self.genuine_row])) < 2:
            problem = "fewer than two people have a query and a gallery image from different cameras"
            raise DataError(problem, "Add people, or check the identities and cameras: pmm data describes them")

        strangers = column_pids == DISTRACTOR_PID
        ids = np.unique(np.concatenate([row_pids, column_pids[~strangers]]))
        self.identities = len(np.unique(row_pids))
        self.known = min(len(ids), MAX_UNITS)
        self.row_unit = np.searchsorted(ids, row_pids) % self.known
        self.column_unit = np.searchsorted(ids, column_pids) % self.known
        self.column_unit[strangers] = self.known + np.arange(strangers.sum()) % MAX_UNITS
        self.units = int(self.column_unit.max()) + 1 if strangers.any() else self.known

        names = np.unique(np.concatenate([rows, columns]))
        of_row, of_column = (
            _table(unit, np.searchsorted(names, camids), (units, len(names))).astype(np.float64)  # for BLAS
            for unit, camids, units in ((self.row_unit, rows, self.known), (self.column_unit, columns, self.units))
        )
        # Of different cameras: all pairs without those of the same one.
        pairs = np.outer(of_row.sum(axis=1), of_column.sum(axis=1)) - of_row @ of_column.T
        self.genuine = self.by_person(slice(None))
        pairs[np.arange(self.known), np.arange(self.known)] -= self.genuine
        self.impostors, self._pairs = int(pairs.sum()), pairs

    @cached_property
    def weights(self) -> NDArray[np.float32]:
        """How often each draw of the bootstrap takes each unit: people, then strangers."""
        draws, sizes = np.random.default_rng(0), (self.known, self.units - self.known)
        counts = [draws.multinomial(size, np.full(size, 1 / size), DRAWS) for size in sizes if size]
        return np.concatenate(counts, axis=1).astype(np.float32)

    @cached_property
    def pairs_drawn(self) -> NDArray[np.float64]:
        """Number of impostor pairs in each draw."""
        return self.drawn(self._pairs)

    def by_person(self, accepted: slice | NDArray[np.bool_]) -> NDArray[np.intp]:
        """Number of genuine pairs of each person, of those that are accepted."""
        return np.bincount(self.row_unit[self.genuine_row[accepted]], minlength=self.known)

    def drawn(self, pairs: NDArray[Any]) -> NDArray[np.float64]:
        """Number of pairs in each draw, given that of each person on the rows with each on the columns."""
        drawn = self.weights[:, : self.known] @ pairs.astype(np.float32)
        return np.einsum("ij,ij->i", drawn, self.weights, dtype=np.float64)

    def fmr_interval(self, fmr: float, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> tuple[float, float]:
        """The 95 % interval of a false-match rate, given the falsely matching pairs."""
        false = _table(self.row_unit[rows], self.column_unit[columns], (self.known, self.units))
        drawn = self.drawn(false) / self.pairs_drawn
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.nan_to_num(drawn / np.roll(drawn, 1), nan=1.0, posinf=np.inf)
        return _interval(fmr * ratio)

    def tmr_interval(self, tmr: float, accepted: NDArray[np.bool_]) -> tuple[float, float]:
        """The 95 % interval of a true-match rate, given which genuine pairs match."""
        weights = self.weights[:, : self.known]
        drawn = weights @ self.by_person(accepted) / np.maximum(weights @ self.genuine, 1)
        return _interval(tmr + drawn - np.roll(drawn, 1))


def _table(rows: NDArray[Any], columns: NDArray[Any], shape: tuple[int, int]) -> NDArray[np.intp]:
    """Count pairs of indices in a table."""
    return np.bincount(rows * shape[1] + columns, minlength=shape[0] * shape[1]).reshape(shape)


def _interval(rates: NDArray[Any]) -> tuple[float, float]:
    low, high = np.clip(np.quantile(rates, (0.025, 0.975), method="nearest"), 0, 1)
    return float(low), float(high)


class _Tally:
    """What one pass over all pairs keeps of one distance."""

    def __init__(self, largest: float, genuine: int, nearest: int) -> None:
        """Take an upper bound of the distances, the number of genuine pairs, and of impostor pairs to keep."""
        self.width = 2.0 ** math.ceil(math.log2(1.01 * largest / BINS))
        self.genuine = np.empty(genuine, np.float32)
        self.impostor = np.zeros(BINS, np.int64)
        self._beyond = self._below = np.float32(BINS * self.width)  # more than any distance
        self._nearest, self._size = nearest, 0
        self._parts: list[tuple[NDArray[np.float32], NDArray[np.intp]]] = []

    def add(self, distances: NDArray[np.float32], first: int, people: People) -> None:
        """Add the rows of the matrix from `first` on; they are overwritten."""
        genuine = slice(*np.searchsorted(people.genuine_row, (first, first + len(distances))))
        pairs = people.genuine_row[genuine] - first, people.genuine_column[genuine]
        self.genuine[genuine] = distances[pairs]
        distances[pairs] = self._beyond
        for row, (start, stop) in zip(distances, people.same_camera[first:], strict=False):
            row[start:stop] = self._beyond
        flat = distances.ravel()
        self.impostor += self._bins(flat)
        places = np.flatnonzero(flat < self._below)
        self._parts.append((flat[places], places + first * distances.shape[1]))
        self._size += len(places)
        if self._size > 2 * self._nearest:
            self._shrink()

    def _bins(self, distances: NDArray[np.float32]) -> NDArray[np.intp]:
        bins = (distances * np.float32(1 / self.width)).astype(np.intp)  # a shift of the exponent: exact
        return np.bincount(bins, minlength=BINS + 1)[:BINS]

    def _shrink(self) -> None:
        values, places = map(np.concatenate, zip(*self._parts, strict=True))
        # No value equal to the cut is kept, however many there are; `nearest` adds them again.
        self._below = np.partition(values, self._nearest - 1)[self._nearest - 1]
        kept = values < self._below
        self._parts, self._size = [(values[kept], places[kept])], int(np.count_nonzero(kept))

    def nearest(self) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
        """The smallest impostor distances, ascending, and the places in the matrix of those that are below the last."""
        if self._size >= self._nearest:
            self._shrink()
        values, places = map(np.concatenate, zip(*self._parts, strict=True))
        order = np.argsort(values)
        return np.concatenate([values[order], np.full(self._nearest - len(values), self._below)]), places[order]

    def histogram(self) -> PairHistogram:
        return PairHistogram(self.width, self._bins(self.genuine), self.impostor)


def _thresholds(name: Distance, rates: Sequence[float], tally: _Tally, people: People) -> DistanceThresholds:
    values, places = tally.nearest()
    row, column = np.divmod(places, len(people.column_unit))
    thresholds = []
    for rate in rates:
        # The largest distance with at most this many impostor pairs is just below the next one.
        next_one = values[_accepted(rate, people.impostors)]
        if next_one == 0:
            problem = f"more than {rate:g} of the pairs of different people have the {name} distance 0"
            raise DataError(problem, "Check the model: it does not distinguish people")
        distance = np.nextafter(next_one, np.float32(0))
        false, accepted = int(np.searchsorted(values, next_one)), tally.genuine <= distance
        fmr, tmr = false / people.impostors, float(accepted.mean())
        intervals = people.fmr_interval(fmr, row[:false], column[:false]), people.tmr_interval(tmr, accepted)
        thresholds.append(Threshold(rate, float(distance), false, intervals[0], tmr, intervals[1]))
    return DistanceThresholds(tally.histogram().equal_error_rate(), tuple(thresholds))


def _accepted(rate: float, pairs: int) -> int:
    """The largest number of pairs whose share is at most `rate`: 3 for 0.001 of 3,000, despite rounding errors."""
    return int(rate * pairs * (1 + 1e-9))
