"""`pmm bench`: the proof that an export retrieves the same people, and its latency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from pmm_edge.cli.render import note, print_json, print_table, progress
from pmm_edge.errors import CheckFailedError, DataError, ModelError, PmmError
from pmm_edge.runs import BEST, EXPORT_FOLDER, about_run, newest_run, run_of

if TYPE_CHECKING:
    from pmm_edge.bench import BenchReport, Gates

_MODEL_SUFFIXES = (".onnx", ".engine", ".safetensors")


def bench(
    models: Annotated[
        list[Path] | None,
        typer.Argument(help="Models to compare; by default all in the export folder of the reference's run."),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="What they are compared with; by default best.pt of their run, else of the newest."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A data set in Market-1501's layout; by default the one of the run.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes to time.")] = "1,8",
    min_cosine: Annotated[
        float | None,
        typer.Option(help="Gate: the least cosine of any image; 0.9999, fp16 0.999, int8 0.9 by default."),
    ] = None,
    max_map_drop: Annotated[
        float | None, typer.Option(help="Gate: the largest loss of mAP, in points; 0.1, int8 0.5 by default.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Compare only this many images, spread evenly. Retrieval needs all of them: no mAP, no Rank-1,"
            " and no gate on them."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N; by default a GPU where the engine can use one.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON file for all figures; by default bench.json in the run's folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """Prove that exported models retrieve the same people as their checkpoint, and measure latency.

    Exit code 1 where a model fails a gate; bench.json is written in either case.

    [dim]pmm bench[/]

    [dim]pmm bench model.onnx --reference best.pt --data market1501 --batch 1,16,64[/]
    """
    from pmm_edge.bench import bench as compare_models

    reference = reference or _reference_of(models)
    run = run_of(reference)
    with progress() as report:
        found = compare_models(
            models or _exports_of(reference),
            reference,
            data or _data_of(run, reference),
            batches=_batch_sizes(batch),
            gates=_asked_gates(min_cosine, max_map_drop),
            limit=limit,
            device=device,
            report=report,
        )
    # Shown first: the figures of some minutes are not lost with a file that cannot be written.
    if as_json:
        print_json(found.to_json())
    else:
        _print(found)
    out = out or (run or Path()) / "bench.json"
    found.save(out)
    if found.failures:
        raise CheckFailedError("parity failed: " + "; ".join(found.failures), f"All figures are in {out}")
    note(f"[green]parity holds[/]: {_gates(found)}. [dim]All figures are in {escape(str(out))}[/]")


def _print(found: BenchReport) -> None:
    from pmm_edge.bench.report import LATENCY_COLUMNS, PARITY_COLUMNS, latency_rows, parity_rows

    print_table(f"parity on {found.images:,} images of {found.data}", PARITY_COLUMNS, parity_rows(found))
    print_table("latency of a batch, model only; ratio to the reference", LATENCY_COLUMNS, latency_rows(found))


def _asked_gates(min_cosine: float | None, max_map_drop: float | None) -> Gates | None:
    """None where nothing was asked for: each model then has the gates of its precision."""
    from pmm_edge.bench import Gates

    if min_cosine is None and max_map_drop is None:
        return None
    usual = Gates()
    return Gates(
        usual.min_cosine if min_cosine is None else min_cosine,
        usual.max_map_drop if max_map_drop is None else max_map_drop,
    )


def _gates(found: BenchReport) -> str:
    """The gates that were held, once for each precision."""
    held = {model.precision: model.gates for model in found.models}
    texts = []
    for precision, gates in held.items():
        text = f"cosine >= {gates.min_cosine:g}"
        if found.reference.retrieval:
            text += f", mAP drop <= {gates.max_map_drop:g} points"
        texts.append(f"{precision} {text}" if len(held) > 1 else text)
    return "; ".join(texts)


def _reference_of(models: Sequence[Path] | None) -> Path:
    run = run_of(models[0]) if models else None
    return (run or newest_run()) / BEST


def _exports_of(reference: Path) -> list[Path]:
    folder = reference.parent / EXPORT_FOLDER
    found = sorted(path for path in folder.glob("*") if path.suffix in _MODEL_SUFFIXES)
    if not found:
        raise ModelError(f"{folder} holds no exported model", "Run pmm export first, or name the models")
    return found


def _data_of(run: Path | None, reference: Path) -> Path:
    about = about_run(run) if run else None
    if about is None:
        raise DataError(f"{reference} does not say which data set it belongs to", "Name one with --data")
    return Path(about.data)


def _batch_sizes(text: str) -> list[int]:
    try:
        return [int(size) for size in text.split(",")]
    except ValueError as error:
        raise PmmError(f"'{text}' is no list of batch sizes", "Write such as --batch 1,8") from error
