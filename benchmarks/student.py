"""A student with and without its teacher: the same network, data and number of epochs, over several seeds.

Train the student both ways, export it and its teacher in INT8 for CPUs, and time them in turns. Print Rank-1 and mAP
on identities not seen in training, with mean and standard deviation over the seeds, operations and latency. Finished
trainings are reused from the output folder: run the same command again to continue an interrupted comparison.

    python benchmarks/student.py --teacher runs/teacher --set backbone=mobilenet_v3_small --set lr=1e-3 --set epochs=144
    python benchmarks/student.py DATA --teacher best.pt --preset edge --seeds 0,1,2 --json student.json

Measure latency on an idle machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from compare_methods import Comparison, comparison, figures_of, folder_of, parser_of_trainings
from machine import end_with, machine
from method_tables import Figures, Row, mean_and_deviation

from pmm_edge.bench.evaluation import evaluate_model
from pmm_edge.bench.timing import measure_latency
from pmm_edge.console import Report, print_line, print_table, progress
from pmm_edge.errors import PmmError
from pmm_edge.export import export
from pmm_edge.files import check_output, encode_json, sha256, written_whole
from pmm_edge.model import load_checkpoint
from pmm_edge.runs import resolve_checkpoint
from pmm_edge.runtime import load

WITHOUT, WITH, TEACHER = "student without teacher", "student with teacher", "teacher"
BATCHES = (1, 8)
MAX_WORK, MAX_LOSS = 1 / 5, 0.03
"""The goal: at most a fifth of the teacher's operations, and at most 3 points of mAP below it."""


@dataclass
class Side:
    """A row of the table."""

    figures: list[Figures]
    """Of each seed; of the teacher once."""
    gflops: float
    parameters: int
    median_ms: dict[int, float] = field(default_factory=dict)
    """Latency of the INT8 export by batch size; the same for both students."""


@dataclass
class Result:
    machine: str
    data: str
    student: str
    sides: dict[str, Side]
    gains: list[float]
    """mAP with the teacher minus mAP without it, by seed."""
    gain: float
    gain_deviation: float
    """Mean of the gains and their standard deviation, which is 0 for one seed. The goal is a mean of more than 0."""
    loss: float
    """mAP of the teacher minus the mean mAP of the student that it taught."""
    work: float
    """Operations of the student as a share of the teacher's."""


def main() -> None:
    end_with(run)


def run() -> int:
    parser = parser_of_trainings(str(__doc__), Path("runs/student"))
    parser.add_argument("--teacher", type=Path, required=True, help="its checkpoint or run folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures")
    options = parser.parse_args()
    if options.json:
        check_output(options.json, [".json"])
    teacher = resolve_checkpoint(options.teacher)
    if teacher.suffix == ".safetensors":  # trains students, but cannot be exported
        raise PmmError(f"{teacher} cannot be exported to INT8", "Name the teacher's checkpoint (.pt) or run folder")
    load_checkpoint(teacher)  # before anything is trained
    trainings = comparison(options, {WITHOUT: {"method": "baseline"}, WITH: {"teacher": str(teacher)}})
    found, code = figures_of(trainings)
    if [len(figures) for figures in found.values()] == 2 * [len(trainings.seeds)]:
        with progress() as report:
            result = measured(trainings, teacher, found, report)
        show(result)
        if options.json:
            with written_whole(options.json) as temporary:
                temporary.write_text(encode_json(result), encoding="utf-8")
    return code


def measured(trainings: Comparison, teacher: Path, found: dict[str, list[Figures]], report: Report) -> Result:
    """Evaluate the teacher, export it and the first student that it taught, and time both exports in turns."""
    base, data, layout = trainings.base, trainings.data, trainings.layout
    (evaluated,) = evaluate_model(teacher, [data], layout=layout, report=report)
    retrieval = evaluated.results["plain"].figures()
    taught: Row = trainings.rows[WITH]
    student = folder_of(trainings, taught, trainings.seeds[0]) / "best.pt"
    embedders = []
    for checkpoint, name in ((student, student.parent.name), (teacher, f"teacher-{sha256(teacher)[:8]}")):
        onnx = trainings.folder / f"{name}-int8.onnx"
        export(checkpoint, out=onnx, precision="int8", target="cpu", calibration=data, layout=layout, report=report)
        embedders.append(load(onnx, "cpu"))
    figures = {**found, TEACHER: [{"Rank-1": retrieval.rank1, "mAP": retrieval.mAP, "mAP@50": retrieval.mAP_at_50}]}
    specs = [embedders[0].spec, embedders[0].spec, embedders[1].spec]
    sides = {
        name: Side(figures[name], spec.gflops or np.nan, spec.parameters or 0)
        for name, spec in zip((WITHOUT, WITH, TEACHER), specs, strict=True)
    }
    sizes = [embedder.spec.input for embedder in embedders]
    crops = [np.zeros((1, size.height, size.width, 3), np.uint8) for size in sizes]
    for batch in BATCHES:
        ours, theirs = measure_latency(embedders, crops, batch, report=report)
        sides[WITHOUT].median_ms[batch] = sides[WITH].median_ms[batch] = ours.median_ms
        sides[TEACHER].median_ms[batch] = theirs.median_ms
    gains = [one["mAP"] - other["mAP"] for one, other in zip(found[WITH], found[WITHOUT], strict=True)]
    return Result(
        machine("torch", "onnxruntime"),
        data.name,
        f"{base.backbone} {base.height}x{base.width}, {base.embedding_size} values, {base.epochs} epochs",
        sides,
        gains,
        mean(gains),
        stdev(gains) if len(gains) > 1 else 0.0,
        retrieval.mAP - mean(one["mAP"] for one in found[WITH]),
        sides[WITH].gflops / sides[TEACHER].gflops,
    )


def show(result: Result) -> None:
    rows, verdicts = [], ("not met", "met")
    for name, side in result.sides.items():
        figures = [mean_and_deviation([one[key] for one in side.figures]) for key in ("Rank-1", "mAP")]
        latency = [f"{side.median_ms[batch]:.2f}" for batch in BATCHES]
        rows.append([name, *figures, f"{side.gflops:.3f}", f"{side.parameters / 1e6:.2f}", *latency])
    print_line(result.machine)
    heads = ["", "Rank-1", "mAP", "GFLOPs", "million\nparameters", *(f"INT8, batch {batch}\nms" for batch in BATCHES)]
    print_table(f"{result.data}: {result.student}", heads, rows)
    gains = ", ".join(f"{100 * gain:+.1f}" for gain in result.gains)
    print_line(f"points of mAP that the teacher adds, by seed: {gains}")
    gain, verdict = f"{100 * result.gain:+.2f} ± {100 * result.gain_deviation:.2f}", verdicts[result.gain > 0]
    print_line(f"points of mAP that the teacher adds: {gain}, goal more than 0: {verdict}")
    for what, value, limit in (
        ("operations as a share of the teacher's", result.work, MAX_WORK),
        ("points of mAP below the teacher", 100 * result.loss, 100 * MAX_LOSS),
    ):
        print_line(f"{what}: {value:.3g}, goal at most {limit:g}: {verdicts[value <= limit]}")


if __name__ == "__main__":
    main()
