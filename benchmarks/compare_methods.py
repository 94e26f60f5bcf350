"""The paper's tables 2 and 3 on one data set: every method and every mix, over several seeds.

Train each of them with the same settings. Print Rank-1, mAP and mAP@50 (the paper's mAP) on identities not seen in
training, with mean and standard deviation over the seeds, next to the paper's own figures, and draw them. Finished
trainings are reused from the output folder: run the same command again to continue an interrupted comparison. An
interrupted comparison prints its tables so far.

    python benchmarks/compare_methods.py --set erase_size=8            # the synthetic data set, preset quick
    python benchmarks/compare_methods.py DATA --preset market1501 --seeds 0,1,2
    python benchmarks/compare_methods.py --methods PMM,BDB --dtype bf16 --set height=192 --set mix_blocks=2
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
from machine import end_with, machine
from method_tables import Figures, Row, draw, rows_named, show, tables_of

from pmm_edge.console import INTERRUPTED, print_line, progress
from pmm_edge.data.dataset import scan
from pmm_edge.data.synthetic import cached_synthetic
from pmm_edge.errors import CheckFailedError, PmmError
from pmm_edge.files import written_whole
from pmm_edge.gallery.inputs import EmbeddingModel
from pmm_edge.runs import CONFIG, resolve_checkpoint
from pmm_edge.runtime import load
from pmm_edge.trainer.config import DEFAULT_PRESET, TrainConfig, choose_config
from pmm_edge.trainer.train import train

RESULT = "result.json"


class StopRequestedError(Exception):
    """Ctrl-C or SIGTERM came during a training, which is saved."""


@dataclass(frozen=True)
class Comparison:
    """Trainings on one data set that differ in method, mix, teacher and seed only."""

    base: TrainConfig
    data: Path
    folder: Path
    """Output folder of these settings and images."""
    rows: dict[str, Row]
    seeds: list[int]
    layout: str | None = None


def main() -> None:
    end_with(run)


def run() -> int:
    """Run the missing trainings, then print and draw all figures; return the exit code."""
    parser = parser_of_trainings(str(__doc__), Path("runs/compare-methods"))
    parser.add_argument("--methods", default="", help="rows of the tables, such as PMM,BDB,CutOut; default: all")
    options = parser.parse_args()
    trainings = comparison(options, rows_named(options.methods))
    found, code = figures_of(trainings)
    if found:
        _show(trainings, found)
    return code


def parser_of_trainings(text: str, out: Path) -> argparse.ArgumentParser:
    """The arguments of a comparison; `text` is its help, `out` the default of its output folder."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, help="data set folder; default: the synthetic data set")
    parser.add_argument("--layout", help="layout of the data set if it is not detected")
    parser.add_argument("--preset", default=DEFAULT_PRESET, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, help="number of epochs, with one evaluation at the end")
    parser.add_argument("--dtype", help="auto, fp32, bf16 or fp16")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of pmm train")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated; default: %(default)s")
    parser.add_argument("--out", type=Path, default=out, help="default: %(default)s")
    return parser


def comparison(options: argparse.Namespace, rows: Mapping[str, Row]) -> Comparison:
    """Build the trainings from the arguments; raise PmmError, before the first one starts, if one is not possible."""
    base = choose_config(options.preset, settings=_settings(options))
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError as error:
        raise PmmError(f"--seeds is '{options.seeds}'", "Write numbers, such as 0,1,2") from error
    for row in rows.values():
        choose_config(config=base, settings=row)
    with progress() as report:
        data = options.data or cached_synthetic(report=report)
    dataset = scan(data, options.layout)
    key = sha256((base.to_toml() + dataset.fingerprint()).encode()).hexdigest()[:8]
    folder = options.out / f"{dataset.root.name}-{base.preset}-{key}"
    return Comparison(base, dataset.root, folder, dict(rows), seeds, options.layout)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if options.epochs:
        values |= {"epochs": options.epochs, "evaluate_every": options.epochs}
    if options.dtype:
        values["precision"] = options.dtype
    for text in options.set:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise PmmError(f"--set {text}", "Write KEY=VALUE, such as epochs=3")
        if name == "teacher":
            raise PmmError("--set teacher: only students have one", "Use benchmarks/student.py --teacher")
        if name in ("preset", "method", "mix", "seed"):
            raise PmmError(f"--set {name}: the rows differ in it", "Use --preset, --methods or --seeds")
        try:
            values |= msgspec.toml.decode(f"{name} = {value}")
        except (msgspec.MsgspecError, ValueError, RecursionError):  # text without quotes, such as 3x2
            values[name] = value
    return values


def figures_of(comparison: Comparison) -> tuple[dict[str, list[Figures]], int]:
    """Run the missing trainings; return the figures of each row that has any, by seed, and the exit code."""
    found: dict[str, list[Figures]] = {}
    code = 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # between trainings like Ctrl-C; a training saves first
    try:
        for seed in comparison.seeds:
            for name, row in comparison.rows.items():
                try:
                    found.setdefault(name, []).append(_figures(comparison, row, seed))
                except CheckFailedError as error:  # such as a loss that is not finite
                    print(f"error: {name}, seed {seed}: {error}", file=sys.stderr)
                    code = error.exit_code
    except (StopRequestedError, KeyboardInterrupt):
        print("interrupted; the same command continues from here", file=sys.stderr)
        code = INTERRUPTED
    return {name: figures for name, figures in found.items() if figures}, code


def folder_of(comparison: Comparison, row: Row, seed: int) -> Path:
    """The run folder of a training."""
    config = choose_config(config=comparison.base, settings=row)
    teacher = ""
    if config.teacher:
        embedder = load(resolve_checkpoint(Path(config.teacher)), device="cpu")
        teacher = f"-{EmbeddingModel.of(embedder).sha256[:8]}"
    return comparison.folder / f"{config.method}{'-rpp' * config.rpp}-{config.mix}{teacher}-seed-{seed}"


def _figures(comparison: Comparison, row: Row, seed: int) -> Figures:
    """The figures of a training, from an earlier comparison if there are any; StopRequestedError if it is stopped."""
    config = choose_config(config=comparison.base, settings={**row, "seed": seed})
    folder = folder_of(comparison, row, seed)
    result = folder / RESULT
    if not result.exists():
        print(folder, file=sys.stderr)
        with progress() as report:
            if (folder / CONFIG).exists():
                trained = train(resume=folder, report=report)
            else:
                shutil.rmtree(folder, ignore_errors=True)  # a run that was killed before it wrote its settings
                trained = train(comparison.data, config=config, layout=comparison.layout, out=folder, report=report)
        if trained.finished and trained.best:
            figures = {"Rank-1": trained.best.rank1, "mAP": trained.best.mAP, "mAP@50": trained.best.mAP_at_50}
            with written_whole(result) as temporary:
                temporary.write_text(json.dumps({**figures, "epochs": trained.epochs_done}))
            (folder / "last.pt").unlink()  # three times the size of best.pt, and not needed any more
        if trained.stop_requested:
            raise StopRequestedError
    return json.loads(result.read_text())


def _show(comparison: Comparison, found: dict[str, list[Figures]]) -> None:
    base = comparison.base
    print_line(machine("torch"))
    what = f"{comparison.data.name}, {base.preset}: {base.backbone} {base.height}x{base.width}, {base.epochs} epochs"
    by_row = [(comparison.rows[name], figures) for name, figures in found.items()]
    for title, rows in tables_of(comparison.rows).items():
        shown = {name: figures for name, row in rows.items() for trained, figures in by_row if row == trained}
        show(shown, rows, f"{title} · {what}, {base.precision}", comparison.data.name)
    picture = comparison.folder / "compare-methods.png"
    draw(found, picture)
    print(f"picture: {picture}")


if __name__ == "__main__":
    main()
