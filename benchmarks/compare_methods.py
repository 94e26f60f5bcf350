"""The paper's tables 2 and 3 on one data set: every method and every mix, over several seeds.

Trains each with the same settings and prints Rank-1 and mAP on people never seen, mean and spread over the seeds,
and draws them. Finished trainings are found again in the output folder, so an interrupted comparison goes on.

    python benchmarks/compare_methods.py                               # the synthetic set, preset quick
    python benchmarks/compare_methods.py DATA --preset market1501 --seeds 0,1,2
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

from machine import machine
from rich.console import Console
from rich.table import Table

from pmm_edge.cli.render import progress
from pmm_edge.data.synthetic import cached_synthetic
from pmm_edge.files import written_whole
from pmm_edge.trainer.config import TrainConfig
from pmm_edge.trainer.loop import CONFIG, resume, train
from pmm_edge.trainer.presets import preset, resolved

METHODS = {
    "baseline": {"method": "baseline"},
    "BDB": {"method": "bdb"},
    "PMM": {"method": "pmm"},
}
"""Table 2: its own three."""
MIXES = {
    "none": {"mix": "none"},
    "CutOut": {"mix": "cutout"},
    "CutMix": {"mix": "cutmix"},
    "A-CutMix": {"mix": "a-cutmix"},
    "DropBlock": {"mix": "dropblock"},
    "A-Hard-Mix": {"mix": "a-hard-mix"},
}
"""Table 3, and two that it lacks; PMM's stages with each."""

Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, help="data set folder; the synthetic set without it")
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--epochs", type=int, help="other than the preset's")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--out", type=Path, default=Path("runs/compare-methods"))
    options = parser.parse_args()

    base = preset(options.preset)
    if options.epochs:
        base = resolved(base, {"epochs": options.epochs, "evaluate_every": options.epochs})
    seeds = [int(seed) for seed in options.seeds.split(",")]
    data = options.data or cached_synthetic()
    found: dict[str, list[Figures]] = {}
    for seed in seeds:
        for name, values in {**METHODS, **MIXES}.items():
            config = resolved(base, {**values, "seed": seed})
            found.setdefault(name, []).append(_trained(config, data, options.out))
    _show(found, base, len(seeds), data.name)
    _draw(found, options.out / "compare-methods.png")


def _trained(config: TrainConfig, data: Path, out: Path) -> Figures:
    """The figures of a training; of an earlier one with the same settings where there is one."""
    folder = out / f"{data.name}-{config.preset}" / f"{config.method}-{config.mix}-{config.epochs}-seed-{config.seed}"
    result = folder / "result.json"
    if not result.exists():
        with progress() as report:
            started = (folder / CONFIG).exists()
            trained = resume(folder, report=report) if started else train(config, data, out=folder, report=report)
        if not trained.finished or trained.best is None:
            raise SystemExit("interrupted; the same command goes on from here")
        figures = {"Rank-1": trained.best.rank1, "mAP": trained.best.mAP, "epochs": trained.epochs_done}
        with written_whole(result) as temporary:
            temporary.write_text(json.dumps(figures))
        (folder / "last.pt").unlink()  # three times best.pt, and nothing goes on from here
    return json.loads(result.read_text())


def _show(found: dict[str, list[Figures]], base: TrainConfig, seeds: int, data: str) -> None:
    console = Console()
    console.print(machine("torch"), soft_wrap=True)
    what = f"{data}, {base.preset}: {base.backbone} {base.height}x{base.width}, {base.epochs} epochs, {seeds} seeds"
    for title, names in (("table 2", METHODS), ("table 3: PMM's stages with", MIXES)):
        table = Table("", "Rank-1", "mAP", title=f"{title} · {what}", title_justify="left")
        for name in names:
            table.add_row(name, *(_spread([figures[key] for figures in found[name]]) for key in ("Rank-1", "mAP")))
        console.print(table)


def _spread(values: list[float]) -> str:
    values = [100 * value for value in values]
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def _draw(found: dict[str, list[Figures]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, key in zip(axes, ("Rank-1", "mAP"), strict=True):
        for row, values in enumerate(found.values()):
            points = [100 * figures[key] for figures in values]
            axis.plot(points, [row] * len(points), "o", color="0.6", markersize=4)
            axis.plot(mean(points), row, "|", color="tab:red", markersize=16, markeredgewidth=2)
        axis.set_xlabel(f"{key} in %")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(found)), list(found))
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
