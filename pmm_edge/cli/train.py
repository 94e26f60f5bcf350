"""`pmm train`: train a network."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from pmm_edge.cli.render import note, out, percent, print_json, print_table, progress
from pmm_edge.errors import PmmError

if TYPE_CHECKING:
    from pmm_edge.trainer.loop import TrainResult

INTERRUPTED = 130
"""The exit code of a program that Ctrl-C stopped."""


def train(
    data: Annotated[
        Path | None,
        typer.Argument(help="Data set folder in Market-1501's layout. Without it: the synthetic set, made once."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="market1501 (the paper's setting) or quick (minutes on a CPU). ")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with any of these settings.")] = None,
    backbone: Annotated[str | None, typer.Option(help="resnet18, resnet34, resnet50 or resnet101.")] = None,
    backbone_weights: Annotated[str | None, typer.Option(help="imagenet, none, or a torchvision file.")] = None,
    height: Annotated[int | None, typer.Option(help="Input height in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Input width in pixels.")] = None,
    mix_blocks: Annotated[int | None, typer.Option(help="K, the blocks of the map that mixing replaces.")] = None,
    epochs: Annotated[int | None, typer.Option(help="The learning rate's schedule is scaled to them.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images in a batch, 4 of each identity.")] = None,
    erase_size: Annotated[int | None, typer.Option(help="Side in pixels of the erased square; 0: none.")] = None,
    evaluate_every: Annotated[int | None, typer.Option(help="Epochs between two evaluations.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, batches, augmentation and mixing.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16.")] = None,
    out_folder: Annotated[Path | None, typer.Option("--out", help="Run folder, else runs/<time>-<preset>.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with this interrupted run; its own settings and data hold.")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the settings as TOML, no training.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train PMM: a ResNet and three heads, each forced to find what the one before it missed.

    A run folder holds the settings, a log, the metrics, TensorBoard files and the checkpoints last.pt and best.pt
    (best mAP). Ctrl-C saves and says how to go on.

    [dim]pmm train[/]  learn the synthetic set in minutes, without a GPU

    [dim]pmm train /data/Market-1501 --preset market1501[/]  the paper's training

    [dim]pmm train --resume runs/20261122-174200-quick[/]
    """
    flags = {
        "backbone": backbone,
        "backbone_weights": backbone_weights,
        "height": height,
        "width": width,
        "mix_blocks": mix_blocks,
        "epochs": epochs,
        "batch": batch,
        "erase_size": erase_size,
        "evaluate_every": evaluate_every,
        "seed": seed,
        "device": device,
        "precision": precision,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    if resume:
        _refuse_with_resume(given, data, preset, config, out_folder)
    from pmm_edge.trainer import config as configs

    if not resume:
        if preset and config:
            raise PmmError("--preset and --config are both given", "The file can name its preset; give one of them")
        chosen = configs.read_config(config) if config else configs.preset(preset or "quick")
        chosen = configs.overridden(chosen, given)
        if print_config:
            out.print(chosen.to_toml(), end="", markup=False)
            return
    note("[dim]loading torch[/]")
    from pmm_edge.trainer import loop

    with progress() as report:
        if resume:
            result = loop.resume(resume, report=report)
        else:
            result = loop.train(chosen, data or _synthetic(report), out=out_folder, report=report)
    _show(result, as_json)
    if not result.finished:
        raise typer.Exit(INTERRUPTED)


def _refuse_with_resume(given: dict[str, Any], *others: object) -> None:
    if given or any(other is not None for other in others):
        raise PmmError("--resume goes on with a run's own settings and data", "Leave the other settings out")


def _synthetic(report: Any) -> Path:
    from pmm_edge.data.synthetic import cached_synthetic

    return cached_synthetic(report=report)


def _show(result: TrainResult, as_json: bool) -> None:
    folder = escape(str(result.folder))
    if as_json:
        print_json({**asdict(result), "folder": str(result.folder)})
    else:
        rows = [
            [name, *map(percent, (figures.rank1, figures.mAP, figures.mINP, figures.mAP_at_50))]
            for name, figures in (("before training", result.before), ("best epoch", result.best))
            if figures
        ]
        print_table(f"retrieval in %, of people it never saw · {folder}", ["", "Rank-1", "mAP", "mINP", "mAP@50"], rows)
    if result.finished:
        note("next: [bold]pmm export[/] makes an ONNX file of the newest run")
    else:
        note(f"interrupted after {result.epochs_done} epochs; go on with: [bold]pmm train --resume {folder}[/]")
