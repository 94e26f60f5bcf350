"""The paper's tables 2 and 3 on one data set: every method and every mix, over several seeds.

Trains each with the same settings and prints Rank-1, mAP and mAP@50 (what the paper calls mAP) on people never seen,
mean and spread over the seeds, and draws them. Finished trainings are found again in the output folder, so an
interrupted comparison goes on with the same command; interrupted, it prints the tables as far as they are.

    python benchmarks/compare_methods.py                               # the synthetic set, preset quick
    python benchmarks/compare_methods.py DATA --preset market1501 --seeds 0,1,2
    python benchmarks/compare_methods.py --methods PMM,BDB --dtype bf16 --set height=192 --set mix_blocks=2
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from machine import machine
from method_tables import Figures, Row, draw, rows_named, show, tables_of
from rich.console import Console

from pmm_edge.console import progress
from pmm_edge.data.dataset import scan
from pmm_edge.data.synthetic import cached_synthetic
from pmm_edge.errors import CheckFailedError, PmmError
from pmm_edge.files import written_whole
from pmm_edge.runs import CONFIG
from pmm_edge.trainer.config import DEFAULT, TrainConfig, preset, read_assignments, resolved
from pmm_edge.trainer.setup import fingerprint
from pmm_edge.trainer.train import TrainResult, resume, train

INTERRUPTED = 130
RESULT = "result.json"


class StopAskedError(Exception):
    """Ctrl-C or SIGTERM, and the training in which it came is saved."""


@dataclass(frozen=True)
class Comparison:
    """Trainings of one data set that differ in their method, mix and seed only."""

    base: TrainConfig
    data: Path
    folder: Path
    """Of these settings and images alone."""
    rows: dict[str, Row]
    seeds: list[int]
    layout: str | None = None
    """That of the data set, where it was named."""


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # between trainings as Ctrl-C; in one it saves first
    try:
        sys.exit(run(planned()))
    except PmmError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def planned() -> Comparison:
    """What the command line asks for, each of its trainings checked before the first one starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, help="data set folder; the synthetic set without it")
    parser.add_argument("--layout", help="the data set's layout, where it is not recognised")
    parser.add_argument("--preset", default=DEFAULT, help="by default %(default)s")
    parser.add_argument("--methods", default="", help="rows of the tables, such as PMM,BDB,CutOut; all by default")
    parser.add_argument("--epochs", type=int, help="other than the preset's, with one evaluation, at the end")
    parser.add_argument("--dtype", help="auto, fp32, bf16 or fp16")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of pmm train")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated; %(default)s by default")
    parser.add_argument("--out", type=Path, default=Path("runs/compare-methods"), help="by default %(default)s")
    options = parser.parse_args()

    rows = rows_named(options.methods)
    base = resolved(preset(options.preset), _settings(options))
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError as error:
        raise PmmError(f"--seeds is '{options.seeds}'", "Write numbers, such as 0,1,2") from error
    for row in rows.values():
        resolved(base, row)
    with progress() as report:
        data = options.data or cached_synthetic(report=report)
    dataset = scan(data, options.layout)
    key = sha256((base.to_toml() + fingerprint(dataset)).encode()).hexdigest()[:8]
    folder = options.out / f"{dataset.root.name}-{base.preset}-{key}"
    return Comparison(base, dataset.root, folder, rows, seeds, options.layout)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if options.epochs:
        values |= {"epochs": options.epochs, "evaluate_every": options.epochs}
    if options.dtype:
        values["precision"] = options.dtype
    values |= read_assignments(options.set)
    for name in ("preset", "method", "mix", "seed"):
        if name in values:
            raise PmmError(f"--set {name}: it is not the same in all rows", "Use --preset, --methods or --seeds")
    return values


def run(comparison: Comparison) -> int:
    """Train what is not trained yet, then print and draw what there is; the exit code."""
    found: dict[str, list[Figures]] = {}
    code = 0
    try:
        for seed in comparison.seeds:
            for name, row in comparison.rows.items():
                try:
                    found.setdefault(name, []).append(_figures(comparison, row, seed))
                except CheckFailedError as error:  # such as a loss that is not finite: the others go on
                    print(f"error: {name}, seed {seed}: {error}", file=sys.stderr)
                    code = error.exit_code
    except (StopAskedError, KeyboardInterrupt):
        print("interrupted; the same command goes on from here", file=sys.stderr)
        code = INTERRUPTED
    _show(comparison, {name: figures for name, figures in found.items() if figures})
    return code


def _figures(comparison: Comparison, row: Row, seed: int) -> Figures:
    """The figures of a training; of an earlier one where there is one.

    Raises:
        StopAskedError: a stop was asked for in the training.
    """
    config = resolved(comparison.base, {**row, "seed": seed})
    folder = comparison.folder / f"{config.method}-{config.mix}-seed-{seed}"
    result = folder / RESULT
    if not result.exists():
        trained = _trained(config, comparison, folder)
        if trained.finished and trained.best:
            figures = {"Rank-1": trained.best.rank1, "mAP": trained.best.mAP, "mAP@50": trained.best.mAP_at_50}
            with written_whole(result) as temporary:
                temporary.write_text(json.dumps({**figures, "epochs": trained.epochs_done}))
            (folder / "last.pt").unlink()  # three times best.pt, and nothing goes on from here
        if trained.stop_asked:
            raise StopAskedError
    return json.loads(result.read_text())


def _trained(config: TrainConfig, comparison: Comparison, folder: Path) -> TrainResult:
    print(f"{folder}", file=sys.stderr)
    with progress() as report:
        if (folder / CONFIG).exists():
            return resume(folder, report=report)
        shutil.rmtree(folder, ignore_errors=True)  # a run that was killed before its settings were written
        return train(config, comparison.data, layout=comparison.layout, out=folder, report=report)


def _show(comparison: Comparison, found: dict[str, list[Figures]]) -> None:
    if not found:
        return
    base, console = comparison.base, Console(markup=False, emoji=False)
    console.print(machine("torch"), soft_wrap=True)
    what = f"{comparison.data.name}, {base.preset}: {base.backbone} {base.height}x{base.width}, {base.epochs} epochs"
    by_row = [(comparison.rows[name], figures) for name, figures in found.items()]
    for title, rows in tables_of(comparison.rows).items():
        shown = {name: figures for name, row in rows.items() for trained, figures in by_row if row == trained}
        show(shown, rows, f"{title} · {what}, {base.precision}", console)
    picture = comparison.folder / "compare-methods.png"
    draw(found, picture)
    console.print(f"picture: {picture}", soft_wrap=True)


if __name__ == "__main__":
    main()
