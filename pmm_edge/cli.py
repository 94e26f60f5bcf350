"""The command line. Each command parses its arguments, calls one public function and prints the result."""

import os
import sys
import warnings
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import typer
from rich.markup import escape

import pmm_edge
from pmm_edge import __version__, render
from pmm_edge.cli_gallery import gallery_app
from pmm_edge.cli_options import (
    FOREIGN_FLAGS,
    Device,
    Json,
    Layout,
    Model,
    arg,
    opt,
    out_opt,
    parameters_of,
    with_flags,
)
from pmm_edge.console import INTERRUPTED, note, print_json, print_plain, print_table, progress, protect_streams
from pmm_edge.data.synthetic import SyntheticConfig
from pmm_edge.errors import CheckFailedError, PmmError, PmmWarning, install
from pmm_edge.machine import in_torchrun
from pmm_edge.runs import resolve_checkpoint
from pmm_edge.spec import CalibrationMethod, Distance, HardwareCompatibility, InputForm, Precision, QuantizationTarget
from pmm_edge.trainer.config import TrainConfig, choose_config, read_run_config

app = typer.Typer(
    name="pmm",
    help="Train person re-identification networks, export them for edge devices, and verify that the exported network"
    " retrieves the same people.\n\nStart with **pmm train**, **pmm export**, **pmm bench**: without arguments, each"
    " continues from the result of the previous one.",
    rich_markup_mode="markdown",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _or_newest(path: Path | None) -> Path:
    """The path, or the checkpoint of the newest run, which is then named."""
    if path is None:
        path = resolve_checkpoint(None)
        note(f"[dim]the newest run is {escape(str(path.parent))}[/]")
    return path


def _version(wanted: bool) -> None:
    if wanted:
        print_plain(f"pmm-edge {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    debug: bool = opt(False, "Show tracebacks; also accepted after the command.", "--debug"),
    version: bool = opt(False, "Show the version.", "--version", callback=_version, is_eager=True),
) -> None:
    """Options of every command."""


@app.command()
@with_flags(TrainConfig)
def train(
    data: list[Path] | None = arg(None, "Data sets; see above. Default: the built-in synthetic set.", "DATA"),
    preset: str | None = opt(None, "Settings to start from, see above. Default: quick."),
    config: Path | None = opt(None, "TOML file with any of the settings below; its preset gives the rest."),
    layout: Layout = None,
    out: Path | None = out_opt(None, "Run folder. Default: runs/TIME-PRESET."),
    resume: Path | None = opt(None, "Run folder to resume with its settings. Name DATA only if the data set moved."),
    print_config: bool = opt(False, "Print the settings as TOML and exit.", "--print-config"),
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Train PMM: a ResNet with three heads, each trained to find what the previous head missed.

    The run folder holds settings, log, metrics, TensorBoard files and the checkpoints last.pt and best.pt (best mAP).
    Ctrl-C saves the state and prints how to resume.

    Several data sets are trained on together, with people and cameras kept apart. Query and gallery are those of the
    first one, which chooses best.pt.

    Presets: market1501, dukemtmc-reid, cuhk03-detected and cuhk03-labeled (the paper's settings), quick (minutes on a
    CPU), edge (a small network for boards such as the Jetson Orin Nano) and edge-tiny (an even smaller one).

    --teacher trains a small network with one head that also learns from the embeddings of a trained one, of any method
    and size. The result has the size and speed of the small network.

    - `pmm train` trains on the built-in data set in minutes, without a GPU
    - `pmm train /data/Market-1501 --preset market1501` is the paper's training
    - `pmm train DATA --preset edge --teacher runs/20261122-174200-market1501` learns from an earlier run
    - `torchrun --nproc-per-node 4 -m pmm_edge train /data/Market-1501 --preset market1501`
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if print_config:
        print_plain((read_run_config(resume) if resume else choose_config(preset, config, given)).to_toml())
        return
    note("[dim]loading torch[/]")
    with progress() as report:
        result = pmm_edge.train(
            data, preset=preset, config=config, layout=layout, out=out, resume=resume, report=report, **given
        )
    if not in_torchrun() or os.environ["RANK"] == "0":  # one of several processes prints
        print_json(result) if as_json else render.show_training(result)
    if not result.finished:
        raise typer.Exit(INTERRUPTED)


_precision, _tensorrt, _bundle, _many = (
    partial(opt, panel=name) for name in ("Precision", "TensorRT", "Deployment bundles", "Folder of shards")
)


@app.command()
def export(
    checkpoint: Path | None = arg(None, "Checkpoint, run folder or .onnx file. Default: newest run.", "CHECKPOINT"),
    out: Path | None = out_opt(None, ".onnx file to write, or .engine for an .onnx CHECKPOINT. Default: in the run."),
    input_form: InputForm | None = opt(
        None,
        "uint8 (default): (N, H, W, 3) RGB, normalized in the graph. raw: float32 (N, 3, H, W) in 0..255, normalized in"
        " the graph, for DeepStream. normalized: float32 (N, 3, H, W), for consumers that normalize.",
    ),
    opset: int | None = opt(None, "ONNX opset, 17 to 20. Default: 18, for INT8 for TensorRT 19."),
    embedding_size: int | None = opt(
        None, "Reduce the embedding to N values by PCA; see docs/reduction.md.", metavar="N"
    ),
    whiten: bool = opt(False, "Scale each value of the reduced embedding to a variance of 1.", "--whiten"),
    normalize_output: bool = opt(False, "Scale embeddings to unit length.", "--normalize-output"),
    static_batch: int | None = opt(None, "Fix the batch size. Default: dynamic.", metavar="N"),
    safetensors: bool = opt(False, "Also write the weights, for PyTorch.", "--safetensors"),
    precision: Precision = _precision("fp32", "Precision of weights and activations."),
    calibration: Path | None = _precision(None, "Data set for INT8, FP16 range checks and PCA. Default: the run's."),
    layout: str | None = _precision(None, "Layout of that data set. Default: detected."),
    target: QuantizationTarget | None = _precision(None, "Runtime that the INT8 graph is for. Default: tensorrt."),
    calibration_method: CalibrationMethod | None = _precision(None, "Choice of activation ranges. Default: the best."),
    max_map_drop: float | None = _precision(None, "Maximum loss of mAP in points; sensitive layers stay in float."),
    trt: bool = _tensorrt(False, "Also build a TensorRT engine for this machine's GPU.", "--trt"),
    batch_profile: str | None = _tensorrt(None, "Batch sizes of the engine. Default: 1,16,64.", metavar="MIN,OPT,MAX"),
    workspace_gib: float | None = _tensorrt(None, "Maximum scratch memory.", "--workspace", metavar="GIB"),
    optimization_level: int | None = _tensorrt(None, "0 (fastest build) to 5 (longest search)."),
    hardware_compatible: HardwareCompatibility | None = _tensorrt(
        None, "Support more GPUs: all since Ampere, or all of the same compute capability. Not for Jetson."
    ),
    version_compatible: bool = _tensorrt(False, "Build for later TensorRT versions as well.", "--version-compatible"),
    timing_cache: bool = _tensorrt(True, "Reuse layer timings of earlier builds."),
    rtx: bool = _tensorrt(False, "Also build an engine for RTX GPUs; needs no GPU. See docs/rtx.md.", "--rtx"),
    gpu: str | None = _tensorrt(None, "RTX GPUs of the engine. Default: sm80,sm86,sm89,sm120.", metavar="SM,..."),
    deepstream: Path | None = _bundle(None, "Write a folder for DeepStream's tracker.", metavar="DIR"),
    triton: Path | None = _bundle(None, "Add the network or engine to this Triton repository.", metavar="DIR"),
    triton_name: str | None = _bundle(None, "Name of the model there. Default: like pmm_resnet50.", metavar="NAME"),
    as_json: Json = False,
) -> None:
    """Export a checkpoint to ONNX and, on request, TensorRT, TensorRT for RTX, DeepStream and Triton.

    The exported network has no classifiers and no mixing, batch norm is folded, and preprocessing is part of the graph.
    Each file is compared with the checkpoint before it is written.

    - `pmm export` exports the best checkpoint of the newest run
    - `pmm export runs/20261122-174200-quick --precision int8 --target cpu`
    - `pmm export --embedding-size 256` writes and exports a checkpoint with a smaller embedding
    - `pmm export best.pt --precision fp16 --trt --batch-profile 1,16,64`
    - `pmm export best.pt --precision fp16 --rtx --gpu sm86,sm89`
    - `pmm export model.onnx --deepstream tracker/ --triton models/`
    """
    arguments = parameters_of(locals()) | {"checkpoint": _or_newest(checkpoint)}
    with progress() as report:
        result = pmm_edge.export(**arguments, report=report)
    print_json({**vars(result), "failures": list(map(str, result.failures))}) if as_json else render.show_export(result)
    for failure in result.failures[:-1]:
        note(f"[red]error:[/] {escape(str(failure))}")
    if result.failures:
        raise result.failures[-1]
    if result.files and not result.engine:
        which = "them" if len(result.files) > 1 else "it"
        note(f"next: [bold]{escape(render.bench_command(result))}[/] compares {which} with the checkpoint")


_gate, _speed = partial(opt, panel="Gates"), partial(opt, panel="Speed")


@app.command()
def bench(
    models: list[Path] | None = arg(
        None, "Models, or run folders to check all their exports. Default: the exports of the reference's run.", "MODEL"
    ),
    reference: Path | None = opt(None, "Checkpoint or run folder to compare with. Default: the models' checkpoint."),
    data: Path | None = opt(None, "Data set, or folder of crops (without retrieval). Default: the run's."),
    layout: Layout = None,
    limit: int | None = opt(None, "Use this many evenly spaced images, without retrieval."),
    device: Device = None,
    explain: bool = opt(False, "Find the first layer of a failing ONNX model that differs.", "--explain"),
    out: Path | None = out_opt(None, "Report; also writes .md and .html. Default: in the models' run.", "FILE.json"),
    as_json: Json = False,
    min_cosine: float | None = _gate(None, "Minimum cosine of any image. Default: fp32 0.9999, fp16 0.999, int8 0.95."),
    min_mean_cosine: float | None = _gate(None, "Minimum mean cosine. Default: fp16 0.9999, int8 0.99."),
    max_map_drop: float | None = _gate(None, "Maximum loss of mAP, in points. Default: fp32 and fp16 0.1, int8 0.5."),
    max_stretch: float | None = _gate(
        None, "Maximum ratio of embedding lengths. Default: fp32 1.001, fp16 1.01, int8 1.1."
    ),
    max_fmr_factor: float | None = _gate(
        None, "Maximum ratio of false-match rates at the model's thresholds. Default: fp32 and fp16 1.05, int8 1.25."
    ),
    max_tmr_drop: float | None = _gate(
        None, "Maximum loss of true-match rate there, in points. Default: fp32 and fp16 0.1, int8 1."
    ),
    batch_sizes: str = _speed("1,8", "Batch sizes to time, such as 1,8,64."),
    parity_only: bool = _speed(False, "Skip all timing.", "--parity-only"),
    compare: tuple[Path, Path] | None = opt(None, "Only compare two reports.", metavar="OLD.json NEW.json"),
) -> None:
    """Check that exported models retrieve the same people as their checkpoint, and measure how fast they are.

    Every model embeds the same images as the reference. It passes if cosine, embedding length, mAP and the matches at
    its decision thresholds meet the gates, and if neither the batch size nor the other images of a batch change an
    embedding. A model that passes gets a certificate. For one that fails, the report names the gate, the image and, if
    recognized, the cause. docs/parity.md explains the figures.

    Exit code 0: all models pass. 1: a model fails, or --compare finds a regression. 2: nothing could be compared. 130:
    interrupted; results so far are saved.

    - `pmm bench model.onnx --reference best.pt --data market1501 --batch-sizes 1,16,64`
    - `pmm bench broken.onnx --parity-only --explain`
    - `pmm bench --compare monday/bench.json bench.json`
    """
    arguments = parameters_of(locals(), "compare") | ({} if models or compare else {"reference": _or_newest(reference)})
    if compare:
        from pmm_edge.bench.regression import compare_reports

        found = compare_reports(*compare)
        print_json({"passed": not found.regressions, **vars(found)}) if as_json else render.show_comparison(found)
        if found.regressions:
            raise CheckFailedError("; ".join(one.sentence for one in found.regressions), f"See {compare[1]}")
        note("[green]ok:[/] nothing is worse beyond noise")
        return
    from pmm_edge.bench.report import Gates
    from pmm_edge.bench.tables import verdict

    gates = {gate.name: arguments.pop(gate.name) for gate in fields(Gates)}
    try:
        arguments["batch_sizes"] = [int(size) for size in batch_sizes.split(",")]
    except ValueError as error:
        raise PmmError(f"--batch-sizes is '{batch_sizes}'", "Write, for example, --batch-sizes 1,8") from error
    with progress() as report:
        result = pmm_edge.bench(**arguments, gates=gates, report=report)
    if as_json:
        print_json({"passed": result.report.passed, **vars(result.report)})
    render.show_bench(result, tables=not as_json)
    if not result.report.complete:
        note(f"[yellow]interrupted[/]: the results so far are in {escape(str(result.files[0]))}")
        raise typer.Exit(INTERRUPTED)
    if result.report.failures:
        raise CheckFailedError(verdict(result.report)[1].rstrip("."), f"See {result.files[0]}")
    note("[green]ok:[/] all models meet their gates")


@app.command()
def verify(
    models: list[Path] = arg(..., "Models that passed pmm bench.", "MODEL"),
    data: Path | None = opt(None, "Data set whose query and gallery must be those of the certificate."),
    layout: Layout = None,
    reference: Path | None = opt(None, "Checkpoint that must be the one in the certificate, byte for byte."),
    digest: str | None = opt(None, "Accept only the certificate with this digest.", metavar="SHA-256"),
    as_json: Json = False,
) -> None:
    """Check that models are still the files that pmm bench certified.

    pmm bench writes MODEL.certificate.json, with the SHA-256 of the model, next to each model that passes. The model is
    not run; neither torch nor a GPU is needed. Exit code 1 if a certificate is missing, or if it or its model was
    changed. A certificate is not a signature: whoever can write both files can create a new pair. Keep the digest
    elsewhere and pass it with --digest. In Python: `pmm_edge.load(MODEL, require_certificate=True)`.

    - `pmm verify runs/20261122-174200-quick/export/*.onnx`
    - `pmm verify model.onnx --data market1501 --reference best.pt`
    """
    from pmm_edge.bench.certification import verify as run

    with progress() as report:
        found = run(models, data, layout, reference, digest, report)
    print_json(render.verification_facts(found)) if as_json else render.show_verification(found)
    if failures := [failure for item in found for failure in item.failures]:
        raise CheckFailedError("; ".join(failure.rstrip(".") for failure in failures))  # each names its remedy
    note(f"[green]ok:[/] certified: {', '.join(escape(str(model)) for model in models)}")


@app.command("eval")
def evaluate(
    model: Model,
    data: list[Path] = arg(..., "Data sets; pmm data describes them.", "DATA"),
    layout: Layout = None,
    distance: Distance = opt("euclidean", "Distance by which images are ranked; cosine is 1 - cosine."),
    rerank: bool = opt(False, "Also show k-reciprocal re-ranking (k1 20, k2 6, lambda 0.3).", "--rerank"),
    flip: bool = opt(False, "Also show the mean embedding of each image and its mirror image.", "--flip"),
    tracklets: bool = opt(False, "Also show pooled tracklets, as queries and gallery.", "--tracklets"),
    cmc: Path | None = opt(None, "Plot the CMC, ranks 1 to 50.", metavar="FILE.png|.svg"),
    features: Path | None = opt(None, "Save the embeddings with their labels.", metavar="FILE.npz"),
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Evaluate retrieval under the Market-1501 protocol: Rank-k, mAP and mINP.

    Several data sets give one table, and with --json a list. The PMM paper's mAP is mAP@50: its evaluation cuts each
    ranking at 50. docs/evaluation.md explains every figure.

    - `pmm eval runs/20261122-174200-quick market1501`
    - `pmm eval model.onnx market1501 --rerank --flip --cmc cmc.png`
    - `pmm eval model.onnx market1501 msmt17 people.csv`
    - `pmm eval model.onnx market1501 --distance cosine`, as most trackers match
    - `pmm eval model.onnx MARS --tracklets`
    """
    arguments = parameters_of(locals())
    from pmm_edge.bench.evaluation import evaluate_model as run

    with progress() as report:
        found = run(**arguments, report=report)
    if as_json:
        facts = [render.evaluation_facts(one) for one in found]
        print_json(facts if len(facts) > 1 else facts[0])
    else:
        render.show_evaluation(found)
    render.show_written(features, cmc)


@app.command()
def calibrate(
    model: Path | None = arg(None, "Checkpoint, run folder or exported model. Default: newest run.", "MODEL"),
    data: Path | None = arg(None, "Data set; pmm data describes it. Default: the run's.", "DATA"),
    layout: Layout = None,
    out: Path | None = out_opt(None, "Plot ROC and DET curves and the histograms of distances.", "FILE.png|.svg"),
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Find the distance up to which two images show the same person, for a chosen rate of false matches.

    Compares each query with the gallery images of other cameras. The false-match rate is the share of pairs of
    different people that a threshold accepts, the true-match rate that of pairs of one person. The thresholds are
    written into a checkpoint, and pmm export passes them on; an exported model is measured but not changed.
    docs/thresholds.md explains how to choose one.

    - `pmm calibrate` uses the newest run and its data set
    - `pmm calibrate best.pt /data/our-cameras -o thresholds.png`
    """
    arguments = parameters_of(locals()) | {"model": _or_newest(model)}
    with progress() as report:
        result = pmm_edge.calibrate(**arguments, report=report)
    print_json(render.calibration_facts(result)) if as_json else render.show_calibration(result)
    render.show_written(out)


@app.command()
def match(
    model: Model,
    first: Path = arg(..., "Image of a person.", "IMAGE"),
    second: Path = arg(..., "Another one.", "IMAGE"),
    fmr: float = opt(1e-3, "False-match rate of the threshold: 0.01, 0.001 or 0.0001, as far as calibrated."),
    distance: Distance | None = opt(None, "Distance to compare. Default: that of the model, Euclidean."),
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Decide whether two images show the same person, with a threshold of pmm calibrate.

    Exit code 0: same person. 1: different people. 2: an image or the model cannot be used, or has no such threshold.

    - `pmm match model.onnx a.jpg b.jpg`
    - `pmm match model.onnx a.jpg b.jpg --fmr 0.01 --distance cosine && echo same`
    """
    try:
        found = pmm_edge.load(model, device).match(first, second, fmr, distance)
    except PmmError as error:
        error.exit_code = 2  # 1 means different people
        raise
    print_json(found) if as_json else render.show_match(found)
    if not found.same:
        raise typer.Exit(1)


@app.command()
def embed(
    model: Model,
    images: str = arg(..., "Data set, folder, list (a text file with one path per line) or tar file.", "IMAGES"),
    out: str = out_opt("embeddings.npz", "File, or folder of Parquet shards; see above.", "FILE.npz|.parquet|DIR"),
    layout: Layout = None,
    batch: int | None = opt(None, "Images per batch. Default: 64; with an engine at least two of its largest batches."),
    tracklets: bool = opt(False, "Write a pooled row per tracklet: a folder, or as in the data set.", "--tracklets"),
    dtype: Literal["float32", "float16"] | None = _many(None, "Type of the embeddings. Default: float32."),
    shard_rows: int | None = _many(None, "Images per shard. Default: 8192. A tar file is one shard."),
    ray: str | None = _many(None, "Embed on a Ray cluster; local starts one here.", metavar="auto|local|HOST:PORT"),
    workers: int | None = _many(None, "Processes there. Default: one per GPU or, without GPUs, per CPU.", min=1),
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Embed images and save one row per image, with identity, camera and split if they are a data set.

    Folders are searched recursively. Unreadable images are listed and skipped; if no image can be read, the exit code
    is 1. Rows are in the order of the sorted paths, of the list, or of query, gallery and train.

    A .npz file holds the arrays spec (JSON), paths, embeddings and, for a data set, pids, camids, split and, if it has
    tracklets, tracks. In a .parquet file these are columns, except for spec, which is in its metadata. With
    --tracklets, a path is the folder of the tracklet or, for a data set, its first image, and frames counts its images.

    A folder, a name without a suffix, is for any number of images: Parquet files with the columns path, pid, camid,
    split and embedding, which are written while the images are read. Repeat the command to resume after an
    interruption. Images may be in tar files, alone or in folders: key.jpg, with labels in key.json. IMAGES and the
    folder may be in object storage. docs/scale.md explains all of this, and how to use several machines.

    - `pmm embed model.onnx crops/ -o embeddings.npz`
    - `pmm embed model.onnx tracks/ --tracklets`
    - `pmm embed model.onnx market1501 -o market.parquet`
    - `pmm embed model.onnx /data/tars -o embeddings/ --dtype float16`
    - `pmm embed model.onnx s3://bucket/tars -o s3://bucket/embeddings --ray auto`
    """
    arguments = parameters_of(locals(), "dtype", "shard_rows", "ray", "workers", "tracklets")
    many = {"dtype": dtype, "shard_rows": shard_rows, "ray": ray, "workers": workers}
    of_shards: dict[str, Any] = {name: value for name, value in many.items() if value is not None}
    if "://" in out or not Path(out).suffix:
        if tracklets:
            raise PmmError(f"--tracklets cannot write the folder {out}", "Write a .npz or .parquet file")
        with progress() as report:
            shards = pmm_edge.embed_shards(**arguments, **of_shards, report=report)
        print_json(render.shard_facts(shards)) if as_json else render.show_shards(shards)
        return
    if of_shards:
        option = f"--{min(of_shards).replace('_', '-')}"
        raise PmmError(f"{option} is for a folder of shards, not for {out}", "Name -o FOLDER")
    with progress() as report:
        found = pmm_edge.embed_files(**arguments, tracklets=tracklets, skip_bad=True, report=report)
    print_json(render.embedding_facts(found, model, out)) if as_json else render.show_embedded(found, out)


app.add_typer(gallery_app, name="gallery", rich_help_panel="Commands")


@app.command()
def visualize(
    model: Path | None = arg(None, "Checkpoint or run folder; for galleries any model. Default: newest.", "MODEL"),
    what: Literal["cams", "galleries", "mixing", "all"] = opt("all", "Kind of picture, see above."),
    data: Path | None = opt(None, "Data set; for cams also a folder or list of images. Default: the run's data set."),
    images: int = opt(6, "Number of images to draw, chosen at random.", metavar="N"),
    top: int = opt(10, "Number of gallery images per query.", metavar="K"),
    seed: int = opt(0, "Seed for the choice of images and negatives."),
    out: Path | None = out_opt(None, "Folder to write. Default: pictures/ in the run folder."),
    layout: Layout = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Draw what a network sees: attention of its stages, ranked galleries and the mixing of training.

    cams: Grad-CAM of each stage, and overlap.json with the overlap of the maps (0: disjoint, 1: identical). galleries:
    queries and their nearest images. mixing: what training replaces. all: those that the model and the images allow.

    - `pmm visualize --what cams --data crops/ --images 20`
    - `pmm visualize model.onnx --what galleries --data market1501`
    """
    arguments = parameters_of(locals()) | {"model": _or_newest(model)}
    from pmm_edge.pictures.album import visualize as run

    with progress() as report:
        album = run(**arguments, report=report)
    print_json(album) if as_json else render.show_album(album)


@app.command()
@with_flags(SyntheticConfig)
def synth(
    folder: Path = arg(..., "Folder to write; it must be new or empty.", "FOLDER"),
    workers: int | None = opt(None, "Worker processes. Default: one per core.", min=1),
    sheet: Path | None = opt(None, "Also write a contact sheet.", metavar="FILE.jpg|.png"),
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Generate a synthetic reID data set in the layout of Market-1501 or, with --frames, tracklets in that of MARS.

    People pass cameras that differ in viewpoint, background, color, exposure and blur. Several wear the same clothes,
    so that only hair, hat, shoes, logo and bag distinguish them. Nothing is downloaded.

    - `pmm synth data/synthetic`
    - `pmm synth data/small --train-identities 20 --test-identities 10`
    - `pmm synth data/tracklets --frames 8`
    """
    from pmm_edge.data.synthetic import make_synthetic as run

    config = SyntheticConfig(**{name: value for name, value in settings.items() if value is not None})
    with progress() as report:
        counts = run(folder, config, workers=workers, sheet=sheet, report=report)
    if as_json:
        print_json({"folder": folder, "images": counts, "sheet": sheet, "config": config})
    else:
        print_table(str(folder), ("", "images"), [(name, f"{count:,}") for name, count in counts.items()])
    render.show_written(folder / "synthetic.json", sheet)


@app.command()
def data(
    folder: Path = arg(..., "Data set folder or CSV file.", "DATA"),
    layout: Layout = None,
    decode: bool = opt(False, "Decode every image; exit code 1 if one is unreadable.", "--decode"),
    as_json: Json = False,
) -> None:
    r"""Describe a data set: identities, cameras and images per split, and anything that looks wrong.

    Images are counted as in papers: distractors (0000) are included, junk (-1) is not. Layouts: market1501,
    dukemtmc-reid, occluded-duke, cuhk03-np-detected, cuhk03-np-labeled, msmt17-v1, msmt17-v2, mars, market-layout,
    folders (a folder per person) and csv (columns path, pid, camid and split). In folders:REGEX, the first group of the
    regular expression is the camera in a path.

    - `pmm data /data/Market-1501-v15.09.15`
    - `pmm data /data/CUHK03-NP --layout cuhk03-np-labeled --decode`
    - `pmm data people/ --layout 'folders:cam(\d+)'`
    """
    from pmm_edge.data.checks import analyze, unreadable
    from pmm_edge.data.dataset import read

    dataset = read(folder, layout)
    paths = [path for split in dataset.splits.values() for path in split.paths]
    with progress() as report:
        bad = unreadable(paths, report=report) if decode else None
    results = dataset, analyze(dataset), bad
    print_json(render.dataset_facts(*results)) if as_json else render.show_dataset(*results)
    if bad:
        raise CheckFailedError(f"{len(bad):,} of {len(paths):,} images cannot be read", "Replace or remove them")


@app.command()
def doctor(
    commands: list[str] | None = arg(None, "Commands that must work; trt and rtx are those of pmm export.", "COMMAND"),
    as_json: Json = False,
) -> None:
    """Show what is installed, what works, and what each command still needs.

    Each check runs in a process of its own, and torch is not imported. The output does not contain the path of your
    home folder. Exit code 1 if a COMMAND given here cannot work.

    - `pmm doctor embed trt && ./start.sh`
    """
    from pmm_edge.doctor import Status, examine

    found = examine(commands or [])
    print_json(found) if as_json else render.show_diagnosis(found)
    for name in commands or []:
        if (state := found["commands"][name]).status is Status.PROBLEM:
            raise CheckFailedError(f"{name} {state.detail}", state.remedy)


def main() -> None:
    """Run `pmm`. A user's error is one line on standard error; `--debug` anywhere shows its traceback."""
    protect_streams()
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            warnings.filterwarnings("ignore", module=r"PIL\.")  # corrupt metadata, in a file that it does not name
            code = app(arguments, standalone_mode=False)
    except Exception as error:
        text, code = _explain(error)
        if text is None or len(arguments) < len(sys.argv) - 1:
            raise
        if text and _reports_first(text):
            note(f"[bold red]error:[/] {escape(text)}")
    sys.exit(code if isinstance(code, int) else 0)


def _explain(error: Exception) -> tuple[str | None, int]:
    """The message and exit code of an error that a user can act on; None for a mistake in the program."""
    if isinstance(error, PmmError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error), 2
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("pmm_edge"):
        return f"this command needs {error.name}. {install('train')}", 2
    if hasattr(error, "format_message"):  # usage errors are click's, which typer bundles in some versions
        remedy = FOREIGN_FLAGS.get(getattr(error, "option_name", ""), "Add -h for help")
        problem = error.format_message().replace("Value error, ", "").rstrip(".")
        return problem and f"{problem}. {remedy}", 2  # without arguments, the help has been printed
    return None, 1


def _reports_first(text: str) -> bool:
    """Whether this process prints an error: of torchrun's processes, only the first that meets it does."""
    if in_torchrun():
        with suppress(ModuleNotFoundError):  # the error may be about torch
            from pmm_edge.trainer.device import first_to_report

            return first_to_report(text)
    return True


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **_: Any) -> None:
    """Print our own warnings as one line; show others as Python does."""
    if issubclass(category, PmmWarning):
        note(f"[yellow]warning:[/] {escape(str(message))}")
    else:
        sys.stderr.write(warnings.formatwarning(message, category, *where[:2]))
