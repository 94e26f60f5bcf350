"""How little the attention of a network's stages overlaps, for runs that are already trained.

    python benchmarks/attention_overlap.py RUN [RUN...]                # run folders or checkpoints
    python benchmarks/attention_overlap.py runs/compare-methods/*/*-seed-0 --data market1501

Grad-CAM of each stage for the class that it predicts, on all query images of the data set (the first run's own unless
--data names one). The overlap of two maps is the share of their attention that lies in the same places (histogram
intersection); `chance` pairs the maps of two different images. docs/visualize.md says how to read them. Maps of
different sizes do not compare: give runs of one input size. The baseline has one map, and no overlap.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from machine import end_with, machine

from pmm_edge.console import print_json, print_line, print_table, progress
from pmm_edge.images import evenly
from pmm_edge.pictures.attention import attention_of, overlap
from pmm_edge.runs import data_of, resolve_checkpoint
from pmm_edge.runtime.listing import find_images

PAIRS = ("I-II", "I-III", "II-III")


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders or checkpoints")
    parser.add_argument("--data", type=Path, help="data set, or other images; by default the first run's data set")
    parser.add_argument("--limit", type=int, help="use this many evenly spaced images")
    parser.add_argument("--device", help="cpu, cuda or cuda:N")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    checkpoints = {path: resolve_checkpoint(path) for path in options.runs}
    source, layout = data_of(checkpoints[options.runs[0]], options.data)
    images = find_images(source, layout)
    paths = images.dataset.query.paths if images.dataset else images.paths
    paths = [paths[row] for row in evenly(len(paths), options.limit or len(paths))]
    found = {}
    for name, path in checkpoints.items():
        with progress() as report:
            attention = attention_of(path, paths, device=options.device, report=report)
        found[name] = attention.spec, overlap(attention.maps, attention.stages)
    where = machine("torch", "numpy")
    if options.json:
        runs = [{"run": name, "method": spec.architecture, **vars(figures)} for name, (spec, figures) in found.items()]
        print_json({"machine": where, "data": source.name, "runs": runs})
        return 0
    rows = []
    for name, (spec, figures) in found.items():
        run = name.name if name.is_dir() else f"{name.parent.name}/{name.name}"
        method = f"{spec.architecture} {spec.mix}" if spec.architecture == "pmm" else spec.architecture
        values = [*map(figures.pairs.get, PAIRS), figures.mean, figures.chance]
        cells = ["–" if value is None else f"{value:.3f}" for value in values]
        rows.append([run, method, *cells, str(figures.empty)])
    print_line(where)
    title = f"overlap of the stages' maps, mean over {len(paths):,} images of {source.name}"
    print_table(title, ["run", "method", *PAIRS, "mean", "chance", "empty"], rows)
    return 0


if __name__ == "__main__":
    end_with(run)
