"""`pmm train`: train a network."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from pmm_edge.console import INTERRUPTED, note, percent, print_json, print_plain, print_table, progress
from pmm_edge.errors import PmmError

if TYPE_CHECKING:
    from pmm_edge.trainer.train import TrainResult

METHOD, COURSE, MACHINE = "Method", "Course of the training", "Machine"


def _option(text: str, panel: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel)


def train(
    data: Annotated[
        Path | None, typer.Argument(help="Data set folder (pmm data says what it is). Without it: the synthetic set.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="market1501, dukemtmc-reid, cuhk03-detected, cuhk03-labeled (the paper's settings), quick (minutes"
            " on a CPU; the default) or edge (a small network for a small board)."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML file with any of these settings; what it leaves out is its preset's, quick's if it names none."
        ),
    ] = None,
    layout: Annotated[str | None, typer.Option(help="The data set's layout, where it is not recognised.")] = None,
    out_folder: Annotated[Path | None, typer.Option("--out", help="Run folder, else runs/<time>-<preset>.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with this interrupted run; its settings and data hold. DATA: if moved.")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the settings as TOML and train nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    method: Annotated[str | None, _option("pmm, bdb or baseline.", METHOD)] = None,
    mix: Annotated[
        str | None,
        _option("For PMM: a-hard-mix, dropblock, cutout, cutmix, a-cutmix or none.", METHOD),
    ] = None,
    mix_blocks: Annotated[int | None, _option("K, the blocks of the map that mixing replaces.", METHOD)] = None,
    mix_block_size: Annotated[str | None, _option("Height x width of a block on the map, such as 3x2.", METHOD)] = None,
    backbone: Annotated[str | None, _option("resnet18, resnet34, resnet50 or resnet101.", METHOD)] = None,
    backbone_weights: Annotated[str | None, _option("imagenet, none, or a torchvision file.", METHOD)] = None,
    init_from: Annotated[
        str | None, _option("Start from what fits of a checkpoint, ours or the paper's authors'.", METHOD)
    ] = None,
    height: Annotated[int | None, _option("Input height in pixels.", METHOD)] = None,
    width: Annotated[int | None, _option("Input width in pixels.", METHOD)] = None,
    epochs: Annotated[int | None, _option("The learning rate's schedule is scaled to them.", COURSE)] = None,
    lr: Annotated[float | None, _option("Peak learning rate.", COURSE)] = None,
    schedule: Annotated[str | None, _option("Learning rate schedule: paper (steps) or cosine.", COURSE)] = None,
    batch: Annotated[int | None, _option("Images of an update, over all processes.", COURSE)] = None,
    images_per_identity: Annotated[int | None, _option("Images of an identity in a batch.", COURSE)] = None,
    accumulate: Annotated[int | None, _option("Parts that a batch is taken in, where memory is short.", COURSE)] = None,
    erase_size: Annotated[int | None, _option("Side in pixels of the erased square; 0: none.", COURSE)] = None,
    weight_decay: Annotated[float | None, _option("Of Adam.", COURSE)] = None,
    clip_norm: Annotated[float | None, _option("Largest norm of the gradient; 0: no clipping.", COURSE)] = None,
    ema: Annotated[float | None, _option("Decay of a moving average of the weights, such as 0.999.", COURSE)] = None,
    patience: Annotated[int | None, _option("Stop after so many evaluations without a better mAP.", COURSE)] = None,
    evaluate_every: Annotated[int | None, _option("Epochs between two evaluations.", COURSE)] = None,
    seed: Annotated[int | None, _option("Of weights, batches, augmentation and mixing.", COURSE)] = None,
    device: Annotated[str | None, _option("auto, cpu, cuda or cuda:N.", MACHINE)] = None,
    precision: Annotated[str | None, _option("auto, fp32, bf16 or fp16.", MACHINE)] = None,
    compile_backbone: Annotated[
        bool | None, _option("Compile the backbone with torch.compile.", MACHINE, "--compile/--no-compile")
    ] = None,
    deterministic: Annotated[
        bool | None, _option("The same bits every time, on a GPU too.", MACHINE, "--deterministic/--no-deterministic")
    ] = None,
    sync_batch_norm: Annotated[
        bool | None,
        _option("Batch norm over all GPUs of torchrun.", MACHINE, "--sync-batch-norm/--no-sync-batch-norm"),
    ] = None,
    cache_gib: Annotated[
        float | None, _option("Memory for decoded images, of a machine's processes together.", MACHINE)
    ] = None,
    max_bad_images: Annotated[int | None, _option("Unreadable images that are passed over.", MACHINE)] = None,
    keep: Annotated[int | None, _option("Checkpoints of the last epochs that are kept.", MACHINE)] = None,
) -> None:
    """Train PMM: a ResNet and three heads, each forced to find what the one before it missed.

    A run folder holds the settings, a log, the metrics, TensorBoard files and the checkpoints last.pt and best.pt
    (best mAP). Ctrl-C saves and says how to go on.

    [dim]pmm train[/]  learn the synthetic set in minutes, without a GPU

    [dim]pmm train /data/Market-1501 --preset market1501[/]  the paper's training

    [dim]pmm train --resume runs/20261122-174200-quick[/]

    [dim]torchrun --nproc-per-node 4 -m pmm_edge.cli train /data/Market-1501 --preset market1501[/]
    """
    flags = {
        "method": method,
        "mix": mix,
        "mix_blocks": mix_blocks,
        "mix_block_size": mix_block_size,
        "backbone": backbone,
        "backbone_weights": backbone_weights,
        "init_from": init_from,
        "height": height,
        "width": width,
        "epochs": epochs,
        "lr": lr,
        "schedule": schedule,
        "batch": batch,
        "images_per_identity": images_per_identity,
        "accumulate": accumulate,
        "erase_size": erase_size,
        "weight_decay": weight_decay,
        "clip_norm": clip_norm,
        "ema": ema,
        "patience": patience,
        "evaluate_every": evaluate_every,
        "seed": seed,
        "device": device,
        "precision": precision,
        "compile": compile_backbone,
        "deterministic": deterministic,
        "sync_batch_norm": sync_batch_norm,
        "cache_gib": cache_gib,
        "max_bad_images": max_bad_images,
        "keep": keep,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    if resume:
        _refuse_with_resume(given, preset, config, layout, out_folder)
    note("[dim]loading torch[/]")
    from pmm_edge.trainer.config import choose_config, read_run_config
    from pmm_edge.trainer.train import train as start

    if print_config:
        chosen = read_run_config(resume) if resume else choose_config(preset, config, given)
        print_plain(chosen.to_toml())
        return
    with progress() as report:
        result = start(
            data,
            preset=preset,
            config=config,
            layout=layout,
            out=out_folder,
            resume=resume,
            report=report,
            **given,
        )
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes one speaks
        _show(result, as_json)
    if not result.finished:
        raise typer.Exit(INTERRUPTED)


def _refuse_with_resume(given: dict[str, Any], *others: object) -> None:
    if given or any(other is not None for other in others):
        raise PmmError(
            "--resume goes on with a run's own settings",
            "Leave the other settings out; DATA alone may be given, where it was moved",
        )


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
