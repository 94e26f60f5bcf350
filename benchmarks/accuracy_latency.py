"""mAP against latency on this CPU: FP32 and INT8 exports of several trainings, as a table and a figure.

Name checkpoints, run folders, or folders of runs such as the output of compare_methods.py. Each checkpoint is exported
in both precisions and evaluated on the data set of its run; exports and evaluations are kept in a cache folder and
reused. Delete the cache after an update of pmm-edge. Then all networks are timed in turns, each once: latency does not
depend on the weights. Runs that differ only in the seed are one model, with mean and standard deviation of mAP.

    python benchmarks/accuracy_latency.py runs/compare-methods/synthetic-* runs/student/reduced-256/best.pt
    python benchmarks/accuracy_latency.py runs/*/ --json figures.json --picture accuracy-latency.png
    python benchmarks/accuracy_latency.py --draw figures.json    # the table and the figure again, without measuring

Measure on an idle machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from machine import end_with, machine
from method_tables import mean_and_deviation

from pmm_edge.bench.charts import COLORS, check_plot, log_ticks
from pmm_edge.bench.timing import measure_latency
from pmm_edge.console import Report, print_line, print_table, progress
from pmm_edge.data.dataset import ReidDataset, scan
from pmm_edge.errors import CheckFailedError, PmmError
from pmm_edge.export import export
from pmm_edge.files import cache_folder, check_output, decode_json, encode_json, sha256, written_whole
from pmm_edge.model import load_checkpoint
from pmm_edge.runs import BEST, CONFIG, data_of, resolve_checkpoint
from pmm_edge.runtime import Embedder, load
from pmm_edge.runtime.embed_files import embed_dataset, evaluate_dataset
from pmm_edge.spec import Precision, RetrievalFigures
from pmm_edge.trainer.config import read_run_config

PRECISIONS: dict[Precision, dict[str, Any]] = {
    "fp32": {"marker": "o", "linestyle": ""},
    "int8": {"marker": "s", "linestyle": "", "markerfacecolor": "white"},
}
"""Precisions to compare, with their looks in the figure."""


@dataclass
class Exports:
    """One precision of a model: the figures of each seed, and latency in ms by batch size."""

    mAP: list[float] = field(default_factory=list)  # noqa: N815  the usual spelling
    rank1: list[float] = field(default_factory=list)
    median_ms: dict[int, float] = field(default_factory=dict)
    variation: dict[int, float] = field(default_factory=dict)
    """Standard deviation over mean of the runs."""


@dataclass
class Model:
    name: str
    runs: list[str]
    """Names of the folders of the checkpoints, one for each seed."""
    gflops: float | None = None
    parameters: int | None = None
    embedding_size: int = 0
    exports: dict[Precision, Exports] = field(default_factory=dict)
    """INT8 is missing if no export passed the comparison with its checkpoint."""


@dataclass
class Figures:
    machine: str
    data: str
    batches: list[int]
    models: list[Model]


def main() -> None:
    end_with(run)


def run() -> int:
    options, failures = parsed(), list[CheckFailedError]()
    check_plot(options.picture)
    if options.json:
        check_output(options.json, [".json"])
    if options.draw:
        figures = decode_json(Figures, options.draw.read_bytes(), str(options.draw))
    else:
        with progress() as report:
            figures, failures = measure(options, report)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    if options.json:
        with written_whole(options.json) as temporary:
            temporary.write_text(encode_json(figures), encoding="utf-8")
    show(figures)
    draw(figures, options.picture)
    print(f"picture: {options.picture}")
    return failures[0].exit_code if failures else 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", type=Path, help="checkpoints, run folders or folders of runs")
    parser.add_argument("--data", type=Path, help="data set to calibrate and evaluate on; default: that of the runs")
    parser.add_argument("--layout", help="layout of the data set if it is not detected")
    parser.add_argument("--batch", default=[1, 8], type=lambda text: [*map(int, text.split(","))], help="default: 1,8")
    parser.add_argument("--cache", type=Path, help="folder for exports; default: accuracy-latency in pmm-edge's cache")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="draw the figures that --json wrote")
    parser.add_argument("--picture", type=Path, default=Path("accuracy-latency.png"), help="default: %(default)s")
    options = parser.parse_args()
    if bool(options.checkpoints) == bool(options.draw) or min(options.batch) < 1:
        parser.error("name checkpoints or --draw FILE, and batch sizes of 1 or more")
    return options


def measure(options: argparse.Namespace, report: Report) -> tuple[Figures, list[CheckFailedError]]:
    """Export and evaluate every checkpoint, then time every network; return also the exports that failed."""
    where = machine("onnxruntime-gpu", "onnxruntime")  # before the load is this script's own
    checkpoints = [*dict.fromkeys(file for path in options.checkpoints for file in checkpoints_in(path))]
    data, layout = data_of(checkpoints[0], options.data, options.layout)
    for checkpoint in checkpoints:
        if (other := data_of(checkpoint, options.data, options.layout)[0]).resolve() != data.resolve():
            problem = f"{checkpoints[0]} was trained on {data}, {checkpoint} on {other}"
            raise PmmError(problem, "Evaluate all of them on one data set with --data")
    dataset = scan(data, layout).without_junk()
    cache = options.cache or cache_folder() / "accuracy-latency"
    models, failures, embedders = list[Model](), list[CheckFailedError](), dict[tuple[str, Precision], Embedder]()
    done, total = 0, len(checkpoints) * len(PRECISIONS)
    for name, files in seeds_by_name(checkpoints).items():
        model = Model(name, [file.absolute().parent.name for file in files])
        for run, file in zip(model.runs, files, strict=True):
            for precision in PRECISIONS:
                step = detailed(report, done, total, f"{run}, {precision}")
                try:
                    embedder, retrieval = evaluated(file, precision, dataset, layout, cache, step)
                    exports = model.exports.setdefault(precision, Exports())
                    exports.mAP.append(retrieval.mAP)
                    exports.rank1.append(retrieval.rank1)
                    embedders.setdefault((name, precision), embedder)
                except CheckFailedError as failure:  # the export differs too much from its checkpoint
                    failures.append(failure)
                done += 1
                report("exports", done, total)
        if spec := next((embedders[name, precision].spec for precision in model.exports), None):
            model.gflops, model.parameters, model.embedding_size = spec.gflops, spec.parameters, spec.embedding_size
            models.append(model)
    if not models:
        raise failures[0]
    time_all(models, embedders, options.batch, report)
    return Figures(where, dataset.name, options.batch, models), failures


def checkpoints_in(path: Path) -> list[Path]:
    """A checkpoint, `best.pt` of a run folder, or those of all runs in a folder; raise ModelError if there is none."""
    found = sorted(path.glob(f"*/{BEST}")) if path.is_dir() and not (path / BEST).is_file() else []
    return found or [resolve_checkpoint(path)]


def seeds_by_name(checkpoints: Sequence[Path]) -> dict[str, list[Path]]:
    """Group the runs that differ only in their seed. Names say what differs between the models."""
    groups: dict[object, list[Path]] = {}
    parts: dict[object, list[str]] = {}
    for file in checkpoints:
        spec = load_checkpoint(file).spec
        run = next((folder for folder in file.absolute().parents[:2] if (folder / CONFIG).is_file()), None)
        config = asdict(read_run_config(run)) if run else {}
        settings = {name: value for name, value in config.items() if name not in ("seed", "teacher")}
        whitened = spec.reduction and spec.reduction.whitened  # None if the embedding is not reduced
        key = (*settings.items(), spec.embedding_size, whitened, spec.teacher_sha256, None if run else file)
        groups.setdefault(key, []).append(file)
        method = spec.architecture if spec.architecture == "baseline" else spec.architecture.upper()
        method += "+RPP" * config.get("rpp", spec.rpp)  # best.pt may be from before the refinement
        method += f" ({spec.mix})" * (spec.architecture == "pmm" and spec.mix != "a-hard-mix")
        size = f"{spec.input.height}x{spec.input.width}"
        flags = ["distilled" if spec.teacher_sha256 else "", {None: "", False: "PCA", True: "PCA whitened"}[whitened]]
        folder = file.absolute().parent.name
        parts[key] = [method, spec.backbone, size, *flags, f"{spec.embedding_size}-d", folder, str(file)]
    columns = [*zip(*parts.values(), strict=True)]
    shown = [0, *(number for number in range(1, 5) if len(set(columns[number])) > 1)]
    for more in ([], [5], [6], [7]):  # embedding size, folder and path only where names are not unique without them
        shown += more
        names = {key: " ".join(found[number] for number in shown if found[number]) for key, found in parts.items()}
        if len({*names.values()}) == len(names):
            break
    return {names[key]: files for key, files in groups.items()}


def detailed(report: Report, done: int, total: int, title: str) -> Report:
    """Show the progress of one export next to the bar of all."""
    return lambda what, part, parts, detail="": report("exports", done, total, f"{title}: {what} {part}/{parts}")


def evaluated(
    checkpoint: Path, precision: Precision, dataset: ReidDataset, layout: str | None, cache: Path, report: Report
) -> tuple[Embedder, RetrievalFigures]:
    """Export a checkpoint and evaluate the export, unless the cache folder has both."""
    onnx = cache / sha256(checkpoint)[:16] / f"{precision}-{dataset.fingerprint()[:8]}.onnx"
    if not onnx.exists():
        int8: dict[str, Any] = {"target": "cpu", "calibration": dataset.root, "layout": layout}
        export(checkpoint, out=onnx, precision=precision, report=report, **(int8 if precision == "int8" else {}))
    embedder, result = load(onnx, "cpu"), onnx.with_suffix(".json")
    if not result.exists():
        embeddings = embed_dataset(embedder, dataset, report=report).embeddings
        with written_whole(result) as temporary:
            temporary.write_text(encode_json(evaluate_dataset(dataset, embeddings).figures()), encoding="utf-8")
    return embedder, decode_json(RetrievalFigures, result.read_bytes(), str(result), remedy=f"Delete {result}")


def time_all(
    models: Sequence[Model], embedders: dict[tuple[str, Precision], Embedder], batches: Sequence[int], report: Report
) -> None:
    """Measure the latency of all networks in turns, of those that differ only in weights once."""
    networks: dict[object, Embedder] = {}
    same: dict[tuple[str, Precision], object] = {}
    for place, embedder in embedders.items():
        spec = embedder.spec
        same[place] = (spec.backbone, spec.input, spec.embedding_size, spec.gflops, spec.parameters, spec.precision)
        networks.setdefault(same[place], embedder)
    sizes = [(embedder.spec.input.height, embedder.spec.input.width, 3) for embedder in networks.values()]
    random = np.random.default_rng(0)
    crops = [random.integers(0, 256, (max(batches), *size), dtype=np.uint8) for size in sizes]
    for batch in batches:
        measured = measure_latency([*networks.values()], crops, batch, report=report)
        found = dict(zip(networks, measured, strict=True))
        for model in models:
            for precision, exports in model.exports.items():
                latency = found[same[model.name, precision]]
                exports.median_ms[batch], exports.variation[batch] = latency.median_ms, latency.variation


def show(figures: Figures) -> None:
    """Print one row for each model."""
    columns = ["", "seeds", "GFLOPs", "million\nparameters", "embedding"]
    columns += [f"mAP %\n{precision.upper()}" for precision in PRECISIONS]
    columns += [f"ms, batch {batch}\n{precision.upper()}" for batch in figures.batches for precision in PRECISIONS]
    rows = []
    for model in figures.models:
        found = [model.exports.get(precision) for precision in PRECISIONS]
        cells = [model.name, str(len(model.runs)), f"{model.gflops or 0:.2f}", f"{(model.parameters or 0) / 1e6:.2f}"]
        cells += [str(model.embedding_size)]
        cells += [mean_and_deviation(one.mAP) if one else "" for one in found]
        for batch in figures.batches:
            cells += [f"{one.median_ms[batch]:.2f} ± {one.variation[batch]:.0%}" if one else "" for one in found]
        rows.append(cells)
    print_line(figures.machine)
    print_table(f"{figures.data}: mean ± deviation over seeds; median latency ± deviation of the runs", columns, rows)


def draw(figures: Figures, path: Path) -> None:
    """Draw mAP against the latency of the first batch size, with error bars over the seeds, the best model on top."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    batch = figures.batches[0]
    with rc_context({"font.size": 9, "text.parse_math": False}), written_whole(path) as temporary:
        figure = Figure(figsize=(9, 4.5), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        best = {model.name: max(mean(one.mAP) for one in model.exports.values()) for model in figures.models}
        for number, model in enumerate(sorted(figures.models, key=lambda model: -best[model.name])):
            color, style = COLORS[number % len(COLORS)], ("-", "--", ":")[number // len(COLORS) % 3]
            points = []
            for precision, exports in model.exports.items():
                x, y = exports.median_ms[batch], 100 * mean(exports.mAP)
                error = 100 * stdev(exports.mAP) if len(exports.mAP) > 1 else None
                axes.errorbar(x, y, error, color=color, zorder=3, **PRECISIONS[precision])
                points.append((x, y))
            axes.plot(*zip(*points, strict=True), color=color, linestyle=style, linewidth=1, label=model.name)
        for precision, marker in PRECISIONS.items():
            axes.plot([], [], color="black", label=precision.upper(), **marker)
        axes.set(xlabel=f"latency in ms, batch {batch}", ylabel=f"mAP in % ({figures.data})", xscale="log")
        log_ticks(axes.xaxis)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", frameon=False)
        figure.savefig(temporary, format=path.suffix[1:].lower())


if __name__ == "__main__":
    main()
