"""`pmm export`: from a checkpoint to what runs without torch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from pmm_edge.cli.render import note, print_json, print_table, progress
from pmm_edge.errors import PmmError
from pmm_edge.runs import BEST, EXPORT_FOLDER, newest_run


def export(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A checkpoint of pmm train; by default the newest run's best.pt.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The .onnx file to write; by default in the run's export folder.")
    ] = None,
    form: Annotated[
        Literal["uint8", "raw", "normalized"],
        typer.Option(
            "--input",
            help="uint8: (N, H, W, 3) RGB, normalised in the graph. raw: float (N, 3, H, W) of 0..255, normalised in"
            " the graph, for DeepStream. normalized: float (N, 3, H, W), for consumers that normalise themselves.",
        ),
    ] = "uint8",
    safetensors: Annotated[
        bool, typer.Option("--safetensors", help="Also write the weights without classifiers, for PyTorch.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Export a trained network to ONNX: training parts removed, preprocessing inside, checked by running it.

    [dim]pmm export[/]

    [dim]pmm export runs/20261122-174200-quick/best.pt --input raw --out tracker.onnx[/]
    """
    try:
        from pmm_edge.export import export_onnx, export_safetensors
    except ModuleNotFoundError as error:
        raise PmmError(
            f"exporting needs {error.name}, which is not installed", "pip install 'pmm-edge[train]'"
        ) from error

    checkpoint = checkpoint or newest_run() / BEST
    out = out or _default_out(checkpoint, form)
    with progress() as report:
        exported = [export_onnx(checkpoint, out, form, report=report)]
    if safetensors:
        exported.append(export_safetensors(checkpoint, out.with_suffix(".safetensors")))
    if as_json:
        files = [{**asdict(item), "path": str(item.path)} for item in exported]
        print_json({"checkpoint": str(checkpoint), "exported": files})
        return
    rows = [
        (item.path.name, f"{item.size / 1e6:.1f}", item.spec.precision, item.spec.input.form, f"{item.departure:.1e}")
        for item in exported
    ]
    print_table(f"exported to {out.parent}", ("file", "MB", "precision", "input", "departure"), rows)
    note("[dim]Prove that it retrieves the same people: pmm bench[/]")


def _default_out(checkpoint: Path, form: str) -> Path:
    return checkpoint.parent / EXPORT_FOLDER / ("model.onnx" if form == "uint8" else f"model-{form}.onnx")
