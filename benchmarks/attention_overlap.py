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
import json
from pathlib import Path

import numpy as np
from machine import machine
from rich.console import Console
from rich.table import Table

from pmm_edge.console import progress
from pmm_edge.errors import PmmError
from pmm_edge.pictures.attention import Overlap, attention_of, overlap
from pmm_edge.runs import BEST, about_run
from pmm_edge.runtime.embed_files import find_images

PAIRS = ("I-II", "I-III", "II-III")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders or checkpoints")
    parser.add_argument("--data", type=Path, help="data set, or other images; by default the first run's data set")
    parser.add_argument("--limit", type=int, help="use this many evenly spaced images")
    parser.add_argument("--device", help="cpu, cuda or cuda:N")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    try:
        checkpoints = {path: path / BEST if path.is_dir() else path for path in options.runs}
        source = options.data or _data_of(next(iter(checkpoints.values())))
        paths = _images(source, options.limit)
        found = {}
        for name, path in checkpoints.items():
            with progress() as report:
                attention = attention_of(path, paths, device=options.device, report=report)
            spec = attention.spec
            found[name] = (spec.architecture, spec.mix, overlap(attention.maps, attention.stages))
    except PmmError as error:
        raise SystemExit(f"error: {error}") from error
    where = machine("torch", "numpy")
    if options.json:
        runs = [{"run": str(name), "method": method, **vars(figures)} for name, (method, _, figures) in found.items()]
        print(json.dumps({"machine": where, "data": source.name, "runs": runs}, indent=2))
        return
    console = Console(width=None if Console().is_terminal else 160)
    console.print(where, soft_wrap=True)
    title = f"overlap of the stages' maps, mean over {len(paths):,} query images of {source.name}"
    table = Table("run", "method", *PAIRS, "mean", "chance", "empty", title=title, title_justify="left")
    for name, (method, mix, figures) in found.items():
        label = f"{method} {mix}" if method == "pmm" else method
        table.add_row(name.name if name.is_dir() else f"{name.parent.name}/{name.name}", label, *_row(figures))
    console.print(table)


def _row(figures: Overlap) -> list[str]:
    values = [*map(figures.pairs.get, PAIRS), figures.mean, figures.chance]
    return [*("–" if value is None else f"{value:.3f}" for value in values), str(figures.empty)]


def _data_of(checkpoint: Path) -> Path:
    about = about_run(checkpoint.parent)
    if about is None:
        raise SystemExit(f"error: {checkpoint} does not say which data set it belongs to. Name one with --data")
    return Path(about.data)


def _images(source: Path, limit: int | None) -> list[Path]:
    images = find_images(source)
    queries = (
        np.arange(len(images.paths)) if images.labels is None else np.flatnonzero(images.labels["split"] == "query")
    )
    kept = queries if limit is None else queries[:: max(1, len(queries) // limit)][:limit]
    return [images.paths[row] for row in kept]


if __name__ == "__main__":
    main()
