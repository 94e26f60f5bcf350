"""`pmm export`: from a checkpoint to what runs without torch."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from pmm_edge.console import note, print_json, print_table, progress
from pmm_edge.runtime.manifest import BatchProfile, BuildSettings
from pmm_edge.spec import FLOAT16_MAX, describe_precision

if TYPE_CHECKING:
    from pmm_edge.export import ExportedFile, ExportResult
    from pmm_edge.export.tensorrt import BuiltEngine

_TENSORRT = "TensorRT, with --trt"
_PRECISION = "Precision"


def export(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            help="A checkpoint of pmm train; by default the newest run's best.pt. With --trt, --deepstream or --triton"
            " also a .onnx that was exported before: that needs no torch."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The .onnx file to write; by default in the run's export folder. An engine lies beside it."),
    ] = None,
    form: Annotated[
        Literal["uint8", "raw", "normalized"] | None,
        typer.Option(
            "--input-form",
            help="uint8 (the default): (N, H, W, 3) RGB, normalised in the graph. raw: float (N, 3, H, W) of 0..255,"
            " normalised in the graph, for DeepStream. normalized: float (N, 3, H, W), for consumers that normalise"
            " themselves.",
        ),
    ] = None,
    opset: Annotated[int, typer.Option(help="Of ONNX, 17 to 20.")] = 18,
    normalize_output: Annotated[
        bool, typer.Option("--normalize-output", help="Give embeddings of length 1 (L2): Euclidean ranks as cosine.")
    ] = False,
    static_batch: Annotated[
        int | None, typer.Option(metavar="N", help="Take batches of N images and no others; by default any.")
    ] = None,
    precision: Annotated[
        Literal["fp32", "fp16", "int8"],
        typer.Option(rich_help_panel=_PRECISION, help="Of weights and values; input and output stay as they are."),
    ] = "fp32",
    calibration: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_PRECISION,
            metavar="DATA",
            help="Data set whose training images set INT8's ranges and check FP16's; by default the run's own.",
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(rich_help_panel=_PRECISION, help="The data set's layout, where it is not recognised."),
    ] = None,
    target: Annotated[
        Literal["tensorrt", "cpu"] | None,
        typer.Option(
            rich_help_panel=_PRECISION,
            help="What will run the INT8 graph: tensorrt (the default) or ONNX Runtime on a cpu.",
        ),
    ] = None,
    calibration_method: Annotated[
        Literal["minmax", "percentile", "entropy"] | None,
        typer.Option(rich_help_panel=_PRECISION, help="Of INT8's ranges; by default the one that loses least."),
    ] = None,
    max_map_drop: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_PRECISION,
            metavar="POINTS",
            help="Keep the layers that INT8 hurts most in float until no more mAP than this is lost. Takes minutes.",
        ),
    ] = None,
    safetensors: Annotated[
        bool, typer.Option("--safetensors", help="Also write the weights without classifiers, for PyTorch.")
    ] = False,
    deepstream: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Also write a folder for DeepStream's tracker: the network (input raw), NvDCF's YAML."
        ),
    ] = None,
    triton: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Also put the network (input uint8; with --trt the engine) into this Triton model repository.",
        ),
    ] = None,
    triton_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The model's name there; by default like pmm_resnet50 or, with --precision fp16 --trt,"
            " pmm_resnet50_fp16_trt.",
        ),
    ] = None,
    trt: Annotated[
        bool,
        typer.Option(
            "--trt", rich_help_panel=_TENSORRT, help="Also build a TensorRT engine, for this machine's GPU alone."
        ),
    ] = False,
    batch: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_TENSORRT,
            metavar="MIN,OPT,MAX",
            help=f"Least, optimal and largest batch of the engine; by default {BatchProfile()}, of a graph with"
            " a static batch that one.",
        ),
    ] = None,
    workspace: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_TENSORRT, metavar="GIB", help="Limit of scratch memory; by default all that the GPU has."
        ),
    ] = None,
    optimization_level: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_TENSORRT,
            help=f"0 builds fastest, 5 searches longest; by default {BuildSettings.optimization_level}.",
        ),
    ] = None,
    hardware_compatible: Annotated[
        bool,
        typer.Option(
            "--hardware-compatible",
            rich_help_panel=_TENSORRT,
            help="An engine for every GPU from Ampere on, some of them slower. Not for Jetson.",
        ),
    ] = False,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible",
            rich_help_panel=_TENSORRT,
            help="An engine that later versions of TensorRT load as well, somewhat slower.",
        ),
    ] = False,
    no_timing_cache: Annotated[
        bool,
        typer.Option(
            "--no-timing-cache", rich_help_panel=_TENSORRT, help="Measure every layer anew, and keep no timings."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Export a trained network to ONNX: training parts removed, preprocessing inside, checked by running it.

    [dim]pmm export[/]

    [dim]pmm export runs/20261122-174200-quick/best.pt --input-form raw --out tracker.onnx[/]

    [dim]pmm export --precision int8 --target cpu --max-map-drop 0.5[/]

    [dim]pmm export model.onnx --trt --batch 1,16,64[/]
    """
    from pmm_edge.export import exporter

    with progress() as report:
        made = exporter.export(
            checkpoint,
            out=out,
            input_form=form,
            opset=opset,
            normalize_output=normalize_output,
            static_batch=static_batch,
            precision=precision,
            calibration=calibration,
            layout=layout,
            target=target,
            calibration_method=calibration_method,
            max_map_drop=max_map_drop,
            safetensors=safetensors,
            deepstream=deepstream,
            triton=triton,
            triton_name=triton_name,
            trt=trt,
            batch_profile=batch,
            workspace_gib=workspace,
            optimization_level=optimization_level,
            hardware_compatible=hardware_compatible,
            version_compatible=version_compatible,
            timing_cache=not no_timing_cache,
            report=report,
        )
    if as_json:
        _print_json(made)
    else:
        _print(made)
    if made.failures:
        for failure in made.failures[:-1]:
            note(f"[red]error:[/] {escape(str(failure))}")
        raise made.failures[-1]
    if not as_json:
        note("[dim]Compare it with the checkpoint on your data: pmm bench[/]")


def _print_json(made: ExportResult) -> None:
    files = [{**asdict(item), "path": str(item.path)} for item in made.files]
    printed: dict[str, object] = {"checkpoint": str(made.checkpoint), "exported": files}
    for name, engine in (("engine", made.engine), ("served_engine", made.served_engine)):
        if engine:
            printed[name] = {"path": str(engine.path)} | json.loads(engine.manifest.to_json())
    if made.bundles:
        printed["bundles"] = {bundle.kind: str(bundle.folder) for bundle in made.bundles}
    print_json(printed)


def _print(made: ExportResult) -> None:
    if made.files:
        rows = [
            (
                escape(item.path.name),
                f"{item.size / 1e6:.1f}",
                item.spec.precision,
                item.spec.input.form,
                f"{item.departure:.1e}",
                f"{item.cosine_mean:.6f}",
            )
            for item in made.files
        ]
        columns = ("file", "MB", "precision", "input", "difference", "cosine")
        print_table(f"exported to {escape(str(made.files[0].path.parent))}", columns, rows)
        _print_precision(made.files[0])  # the other forms hold the same network
    for engine in (made.engine, made.served_engine):
        if engine:
            _print_engine(engine)
    for bundle in made.bundles:
        note(f"{bundle.kind}: {escape(str(bundle.folder))} [dim](see its README.md)[/]")


def _print_engine(engine: BuiltEngine) -> None:
    manifest = engine.manifest
    layers = ", ".join(f"{number} {kind}" for kind, number in manifest.precision.layers.items())
    print_table(
        f"built for {manifest.machine.gpu} with TensorRT {manifest.machine.tensorrt}",
        ("file", "MB", "batch", "layers", "seconds"),
        [
            (
                escape(engine.path.name),
                f"{manifest.engine_size / 1e6:.1f}",
                str(manifest.settings.batch),
                layers,
                f"{manifest.build_seconds:.1f}",
            )
        ],
    )


def _print_precision(item: ExportedFile) -> None:
    if item.spec.precision != "fp32":
        note(f"{escape(item.path.name)}: {escape(describe_precision(item.spec))}")
    if item.largest_value is not None:
        note(f"largest value between the nodes {item.largest_value:.4g}, limit of float16 {FLOAT16_MAX:.0f}")
    if search := item.search:
        note(f"mAP {100 * search.map_float32:.2f} in FP32, {100 * search.map_int8:.2f} in INT8")
        if search.layers:
            rows = [
                (
                    escape(layer.layer),
                    f"{layer.loss:.1e}",
                    f"{100 * layer.work:.1f} %",
                    "float32" if layer.float32 else "int8",
                )
                for layer in search.layers
            ]
            print_table("sensitivity of layers to INT8", ("layer", "1 - cosine", "work", "precision"), rows)
