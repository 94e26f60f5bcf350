"""The rows of the paper's tables 2 and 3, and how their figures are printed and drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pmm_edge.console import percent, print_table
from pmm_edge.errors import PmmError, did_you_mean

Row = dict[str, Any]
"""The settings of a row, in addition to those that all rows share."""
Figures = dict[str, float]

PMM: Row = {"method": "pmm", "mix": "a-hard-mix"}
TABLES: dict[str, dict[str, Row]] = {
    # Its five rows, and two more: the baseline, and PCB without refined part pooling.
    "table 2": {
        "baseline": {"method": "baseline"},
        "AOS": {"method": "aos"},
        "PCB": {"method": "pcb"},
        "PCB+RPP": {"method": "pcb", "rpp": True},
        "CAMA": {"method": "cama"},
        "BDB": {"method": "bdb"},
        "PMM": PMM,
    },
    # Its four rows, and two more: none and DropBlock.
    "table 3: PMM's stages with": {
        "none": {"mix": "none"},
        "CutOut": {"mix": "cutout"},
        "CutMix": {"mix": "cutmix"},
        "A-CutMix": {"mix": "a-cutmix"},
        "DropBlock": {"mix": "dropblock"},
        "A-Hard-Mix": PMM,  # the same training as in table 2
    },
}
PAPER: dict[str, dict[str, tuple[float, float]]] = {
    "market1501": {
        "AOS": (91.3, 78.3),
        "PCB+RPP": (93.8, 81.6),
        "CAMA": (94.7, 84.5),
        "BDB": (94.0, 84.9),
        "PMM": (94.1, 85.2),
        "CutOut": (94.1, 84.7),
        "CutMix": (92.8, 82.4),
        "A-CutMix": (91.6, 78.1),
        "A-Hard-Mix": (94.1, 85.2),
    },
    "dukemtmc-reid": {
        "AOS": (79.2, 62.1),
        "PCB+RPP": (83.3, 69.2),
        "CAMA": (85.8, 72.9),
        "BDB": (87.1, 74.5),
        "PMM": (88.0, 74.6),
        "CutOut": (87.1, 74.5),
        "CutMix": (85.8, 72.0),
        "A-CutMix": (83.8, 68.7),
        "A-Hard-Mix": (88.0, 74.6),
    },
    "cuhk03": {
        "AOS": (54.6, 56.1),
        "PCB+RPP": (62.8, 56.7),
        "CAMA": (66.6, 64.2),
        "BDB": (73.5, 69.8),
        "PMM": (76.3, 73.0),
        "CutOut": (73.5, 69.8),
        "CutMix": (74.3, 69.9),
        "A-CutMix": (65.6, 62.8),
        "A-Hard-Mix": (76.3, 73.0),
    },
}
"""Rank-1 and mAP of tables 2 and 3 of the paper, in %, by data set. Its BDB was trained with a batch of 64."""
ROWS = {name: row for rows in TABLES.values() for name, row in rows.items()}
FIGURES = ("Rank-1", "mAP", "mAP@50")
"""The paper's mAP is mAP@50 (docs/evaluation.md)."""


def rows_named(names: str) -> dict[str, Row]:
    """The rows named by `PMM,BDB,...` in any case, all rows for an empty string; PmmError if one is unknown."""
    known = {name.lower(): name for name in ROWS}
    chosen = [name.strip().lower() for name in names.split(",") if name.strip()] or list(known)
    for name in chosen:
        if name not in known:
            raise PmmError(f"unknown row '{name}'", f"{did_you_mean(name, known)}Choose {', '.join(ROWS)}")
    return {known[name]: ROWS[known[name]] for name in known if name in chosen}


def tables_of(rows: Mapping[str, Row]) -> dict[str, dict[str, Row]]:
    """The tables that contain any of `rows`, each with all of its rows that the same trainings fill."""
    trained = list(rows.values())
    return {
        title: {name: row for name, row in table.items() if row in trained}
        for title, table in TABLES.items()
        if any(name in table for name in rows)
    }


def show(found: Mapping[str, Sequence[Figures]], rows: Iterable[str], title: str, data: str) -> None:
    """Print the rows that have figures: number of seeds, mean and standard deviation over them, the paper's figures.

    These are of the data set `data` if the paper has it, else of Market-1501. The paper's Rank-1 is next to Rank-1, its
    mAP next to mAP@50, which is computed like it.
    """
    plain = data.lower().replace("-", "")
    source = next((name for name in PAPER if plain.startswith(name.replace("-", ""))), "market1501")
    paper, note, table = PAPER[source], f"paper, {source}", []
    for name in rows:
        if found.get(name):
            rank1, mean_ap, at_50 = (mean_and_deviation([figures[key] for figures in found[name]]) for key in FIGURES)
            theirs = [f"{value:.1f}" for value in paper.get(name, ())] or ["", ""]
            table.append((name, str(len(found[name])), rank1, theirs[0], mean_ap, at_50, theirs[1]))
    if table:
        columns = ("", "seeds", "Rank-1", f"Rank-1\n{note}", "mAP", "mAP@50", f"mAP\n{note}")
        print_table(title, columns, table)


def draw(found: Mapping[str, Sequence[Figures]], path: Path) -> None:
    """Draw the figures of each seed and their mean, one line per method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(FIGURES), figsize=(4 * len(FIGURES), 0.9 + 0.3 * len(found)), sharey=True)
    for axis, key in zip(axes, FIGURES, strict=True):
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


def mean_and_deviation(values: list[float]) -> str:
    """Mean and standard deviation of fractions, in %."""
    return percent(mean(values)) + (f" ± {percent(stdev(values))}" if len(values) > 1 else "")
