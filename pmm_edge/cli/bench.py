"""`pmm bench`: the proof that an export retrieves the same people, and how fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from pmm_edge.console import INTERRUPTED, note, print_json, print_table, progress
from pmm_edge.errors import CheckFailedError, ModelError, PmmError
from pmm_edge.runs import BEST, EXPORT_FOLDER, data_of, newest_run, run_of

if TYPE_CHECKING:
    from pmm_edge.bench import BenchReport
    from pmm_edge.bench.html import Picture
    from pmm_edge.bench.tables import Table

_MODEL_SUFFIXES = (".onnx", ".engine", ".safetensors")
_GATES, _SPEED, _COMPARE = "What a model must hold", "What is timed", "Two benches"


def bench(
    models: Annotated[
        list[Path] | None,
        typer.Argument(help="Models to judge; by default all in the export folder of the reference's run."),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="What they are compared with; by default best.pt of their run, else of the newest."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A data set, whose query and gallery are embedded, or any folder of crops, which shows parity without"
            " retrieval; by default the data set of the run."
        ),
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="The data set's layout, where it is not recognised by itself.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Embed only this many images, spread evenly; retrieval needs all of them and is left out."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda or cuda:N, of .onnx files also tensorrt or tensorrt:N; by default a GPU where the engine"
            " can use one."
        ),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Find the layer at which a failing ONNX model departs from the reference."),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="All figures; .md and .html beside it. By default bench.json, bench.md and report.html in the run's"
            " folder.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
    min_cosine: Annotated[
        float | None,
        typer.Option(help="The least cosine of any image; 0.9999, fp16 0.999, int8 0.95.", rich_help_panel=_GATES),
    ] = None,
    min_mean_cosine: Annotated[
        float | None, typer.Option(help="The least mean cosine; fp16 0.9999, int8 0.99.", rich_help_panel=_GATES)
    ] = None,
    max_map_drop: Annotated[
        float | None, typer.Option(help="The largest loss of mAP, in points; 0.1, int8 0.5.", rich_help_panel=_GATES)
    ] = None,
    max_stretch: Annotated[
        float | None,
        typer.Option(
            help="How many times longer or shorter an image's embedding may be; 1.001, fp16 1.01, int8 1.1.",
            rich_help_panel=_GATES,
        ),
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes to time.", rich_help_panel=_SPEED)] = "1,8",
    parity_only: Annotated[
        bool, typer.Option("--parity-only", help="Time nothing: the proof alone.", rich_help_panel=_SPEED)
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="OLD.json NEW.json",
            help="Measure nothing: say what became better or worse between two benches, beyond noise. Exit code 1 on"
            " a regression.",
            rich_help_panel=_COMPARE,
        ),
    ] = None,
) -> None:
    """Prove that exported models retrieve the same people as their checkpoint, and measure how fast they are.

    Every model embeds the same images as the reference. It passes where its embeddings and its mAP hold the gates, and
    where it is sound: equal rows, any batch size, any neighbours and a second run give the same embeddings. For one
    that fails, the sentence says which gate, by how much, on which image, and a known mistake that explains it.

    Exit code 0: all models pass. 1: one fails. 2: nothing could be judged. 130: interrupted; what was measured is kept.
    A model that passed gets a certificate beside it (pmm verify). docs/parity.md explains each figure and gate.

    [dim]pmm bench[/]

    [dim]pmm bench model.onnx --reference best.pt --data market1501 --batch 1,16,64[/]

    [dim]pmm bench broken.onnx --parity-only --explain[/]

    [dim]pmm bench --compare monday/bench.json bench.json[/]
    """
    if compare:
        _compare(*compare, as_json)
        return
    from pmm_edge.bench import AskedGates, Options
    from pmm_edge.bench.network_pictures import network_pictures
    from pmm_edge.bench.pipeline import bench_run
    from pmm_edge.files import check_output

    options = Options(
        batches=tuple(_batch_sizes(batch)),
        gates=AskedGates(min_cosine, min_mean_cosine, max_map_drop, max_stretch),
        limit=limit,
        device=device,
        explain=explain,
        speed=not parity_only,
    )
    reference = reference or _reference_of(models)
    run = run_of(reference)
    models = models or _exports_beside(reference)
    data, layout = data_of(reference, data, layout)
    out = out or (run or Path()) / "bench.json"
    check_output(out, [".json"])  # the figures of some minutes are not lost with a file that cannot be written
    try:
        with progress() as report:
            measured = bench_run(models, reference, data, replace(options, layout=layout), report)
            found = measured.report()
            found.save(out)  # first of all: what comes now may fail, and these figures took minutes
            pictures = network_pictures(measured, report) if found.complete else []
    except KeyboardInterrupt:
        note("[yellow]interrupted[/] before anything was measured that could be kept")
        raise typer.Exit(INTERRUPTED) from None
    written = _written(found, out, pictures)
    if as_json:
        print_json(found.to_json())
    else:
        _print(found)
    _end(found, out, written)


def _print(found: BenchReport) -> None:
    from pmm_edge.bench.tables import terminal_tables

    for table in terminal_tables(found):
        _print_table(table)
    for warning in found.warnings:
        note(f"[yellow]note:[/] {escape(warning)}")


def _print_table(table: Table) -> None:
    rows = [tuple(map(escape, row)) for row in table.rows]
    print_table(escape(table.title), table.columns, rows)


def _written(found: BenchReport, out: Path, pictures: Sequence[Picture]) -> list[Path]:
    """Write everything that a bench leaves behind beside its figures."""
    from pmm_edge.bench.certification import write_certificates
    from pmm_edge.bench.html import write_html
    from pmm_edge.bench.tables import markdown
    from pmm_edge.files import written_whole

    page = out.with_name("report.html") if out.name == "bench.json" else out.with_suffix(".html")
    with written_whole(out.with_suffix(".md")) as temporary:
        # A path of undecodable bytes has no UTF-8; it gets question marks.
        temporary.write_bytes(markdown(found).encode("utf-8", "replace"))
    write_html(found, page, pictures)
    certificates = write_certificates(found)
    for path in certificates.removed:
        note(f"[dim]removed {escape(str(path))}: it certified a model that fails[/]")
    for model, reason in certificates.none.items():
        note(f"[dim]no certificate for {escape(model)}: {escape(reason)}[/]")
    return [out, out.with_suffix(".md"), page, *certificates.certificates]


def _end(found: BenchReport, out: Path, written: Sequence[Path]) -> None:
    """Say how it ended, and where everything is; the exit code with it."""
    note(f"[dim]wrote {escape(', '.join(map(str, written)))}[/]")
    for model in found.models:
        for about, text in (("likely cause", model.likely_cause), ("layer", model.departure and model.departure.words)):
            if text:
                note(f"[bold]{about}[/] of {escape(model.path)}: {escape(text)}")
    if not found.complete:
        failed = f"; failed so far: {'; '.join(found.failures)}" if found.failures else ""
        note(f"[yellow]interrupted[/]: what was measured by now is in {escape(str(out))}{escape(failed)}")
        raise typer.Exit(INTERRUPTED)
    if found.failures:
        raise CheckFailedError("parity failed: " + "; ".join(found.failures), f"All figures are in {out}")
    note(f"[green]parity holds[/]: {_gates(found)}")


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


def _compare(old: Path, new: Path, as_json: bool) -> None:
    from pmm_edge.bench.regression import compare_reports, comparison_table

    found = compare_reports(old, new)
    if as_json:
        facts: dict[str, Any] = {"passed": not found.regressions, **asdict(found)}
        print_json(facts)
    else:
        _print_table(comparison_table(found))
        for text in found.notes:
            note(f"[yellow]note:[/] {escape(text)}")
    if found.regressions:
        raise CheckFailedError(
            "worse than before: " + "; ".join(found.regressions), f"{old} and {new} have the figures"
        )
    better = f", {len(found.improvements)} figures are better" if found.improvements else ""
    note(f"[green]no regression[/]: nothing is worse beyond noise{better}")


def _reference_of(models: Sequence[Path] | None) -> Path:
    run = run_of(models[0]) if models else None
    return (run or newest_run()) / BEST


def _exports_beside(reference: Path) -> list[Path]:
    """The exports of the reference's run, of which the reference may be one."""
    folder = reference.parent if reference.parent.name == EXPORT_FOLDER else reference.parent / EXPORT_FOLDER
    found = sorted(path for path in folder.glob("*") if path.suffix in _MODEL_SUFFIXES and path != reference)
    if not found:
        raise ModelError(f"{folder} holds no exported model", "Run pmm export first, or name the models")
    return found


def _batch_sizes(text: str) -> list[int]:
    try:
        return [int(size) for size in text.split(",")]
    except ValueError as error:
        raise PmmError(f"'{text}' is no list of batch sizes", "Write such as --batch 1,8") from error
