"""Do thresholds hold for other people? Calibrate on half of the test people, and measure the rates on the other half.

    pmm synth DATA --test-identities 300
    python benchmarks/threshold_validity.py best.pt DATA

Each split draws other halves of the people and of the distractors. A row says how often the rate of the other half lay
within the 95 % interval that the calibration gave.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
from machine import machine
from numpy.typing import NDArray

import pmm_edge
from pmm_edge.data.dataset import ReidDataset, scan
from pmm_edge.retrieval import pairwise_distances
from pmm_edge.retrieval.metrics import DISTRACTOR_PID
from pmm_edge.runtime.embed_files import dataset_thresholds, embed_dataset

Half = tuple[ReidDataset, NDArray[np.float32]]


def halves(dataset: ReidDataset, embeddings: NDArray[np.float32], seed: int) -> tuple[Half, Half]:
    """Split query and gallery into two sets of people."""
    rng, count = np.random.default_rng(seed), len(dataset.query)
    people = np.unique(dataset.query.pids[dataset.query.pids != DISTRACTOR_PID])
    chosen = rng.permutation(people)[: len(people) // 2]
    strangers = rng.random(len(dataset.gallery)) < 0.5
    gallery = np.where(dataset.gallery.pids == DISTRACTOR_PID, strangers, np.isin(dataset.gallery.pids, chosen))
    parts = []
    for first in (True, False):
        rows = np.flatnonzero(np.isin(dataset.query.pids, chosen) == first), np.flatnonzero(gallery == first)
        part = replace(dataset, query=dataset.query.select(rows[0]), gallery=dataset.gallery.select(rows[1]))
        parts.append((part, np.concatenate([embeddings[:count][rows[0]], embeddings[count:][rows[1]]])))
    return parts[0], parts[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--splits", type=int, default=100)
    arguments = parser.parse_args()
    dataset = scan(arguments.data).without_junk()
    embeddings = embed_dataset(pmm_edge.load(arguments.model, "cpu"), dataset).embeddings
    found = defaultdict(list)
    for seed in range(arguments.splits):
        calibrated, (other, features) = halves(dataset, embeddings, seed)
        result = dataset_thresholds(*calibrated, "").calibration
        query, gallery, count = other.query, other.gallery, len(other.query)
        elsewhere = query.camids[:, None] != gallery.camids
        same = query.pids[:, None] == gallery.pids
        for name in ("euclidean", "cosine"):
            distances = pairwise_distances(features[:count], features[count:], name)
            genuine, impostor = distances[elsewhere & same], distances[elsewhere & ~same]
            for one in getattr(result, name).thresholds:
                fmr, tmr = np.mean(impostor <= one.distance), np.mean(genuine <= one.distance)
                (low, high), (fewest, most) = one.fmr_interval, one.tmr_interval
                inside = low <= fmr <= high, fewest <= tmr <= most
                found[name, one.fmr].append((*inside, fmr / one.fmr, low / one.fmr, high / one.fmr, tmr, one.tmr))
    print(f"{arguments.splits} splits of {dataset.query.identities} people, {result.impostor_pairs:,} impostor pairs")
    print(machine("numpy") + "\n")
    print("distance      rate  FMR inside  TMR inside  FMR/rate median (90 %)  median interval  TMR here, there")
    for (name, rate), rows in found.items():
        fmr_inside, tmr_inside, ratio, low, high, tmr, expected = np.array(rows).T
        spread = "{:.2f} ({:.2f} to {:.2f})".format(*np.quantile(ratio, (0.5, 0.05, 0.95)))
        interval = f"{np.median(low):.2f} to {np.median(high):.2f}"
        inside = f"{fmr_inside.mean():>12.0%}{tmr_inside.mean():>12.0%}"
        rates = f"{100 * expected.mean():.1f} %, {100 * tmr.mean():.1f} %"
        print(f"{name:<12}{rate:>6g}{inside}{spread:>24}{interval:>17}  {rates}")


if __name__ == "__main__":
    main()
