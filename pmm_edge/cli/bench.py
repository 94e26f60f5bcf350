"""`pmm bench`: the proof that an export retrieves the same people, and how fast."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from pmm_edge.console import INTERRUPTED, note, print_plain, print_table, progress
from pmm_edge.errors import CheckFailedError, PmmError

if TYPE_CHECKING:
    from pmm_edge.bench import BenchReport, BenchResult
    from pmm_edge.bench.tables import Table

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
    from pmm_edge.bench import GateOverrides, bench

    try:
        with progress() as report:
            measured = bench(
                models,
                reference=reference,
                data=data,
                layout=layout,
                limit=limit,
                device=device,
                batch_sizes=_batch_sizes(batch),
                gates=GateOverrides(min_cosine, min_mean_cosine, max_map_drop, max_stretch),
                parity_only=parity_only,
                explain=explain,
                out=out,
                report=report,
            )
    except KeyboardInterrupt:
        note("[yellow]interrupted[/] before anything was measured")
        raise typer.Exit(INTERRUPTED) from None
    found = measured.report
    if as_json:
        print_plain(found.to_json())
    else:
        _print(found)
    _end(measured)


def _print(found: BenchReport) -> None:
    from pmm_edge.bench.sentences import describe_warning
    from pmm_edge.bench.tables import terminal_tables

    for table in terminal_tables(found):
        _print_table(table)
    for warning in found.warnings:
        note(f"[yellow]warning:[/] {escape(describe_warning(warning))}")


def _print_table(table: Table) -> None:
    rows = [tuple(map(escape, row)) for row in table.rows]
    print_table(escape(table.title), table.columns, rows)


def _end(measured: BenchResult) -> None:
    """Print what was written and the outcome, and set the exit code."""
    from pmm_edge.bench.sentences import describe_cause, describe_departure, describe_failure

    found, certificates, out = measured.report, measured.certificates, measured.files[0]
    for path in certificates.removed:
        note(f"[dim]removed {escape(str(path))}: the model fails[/]")
    for name, reason in certificates.refused.items():
        note(f"[dim]no certificate for {escape(name)}: {escape(reason)}[/]")
    note(f"[dim]wrote {escape(', '.join(map(str, [*measured.files, *certificates.written])))}[/]")
    for model in found.models:
        if model.likely_cause:
            note(f"[bold]likely cause[/] for {escape(model.path)}: {escape(describe_cause(model.likely_cause))}")
        if model.departure:
            note(f"[bold]layer[/] of {escape(model.path)}: {escape(describe_departure(model.departure))}")
    failed = "; ".join(f"{model.path} {describe_failure(failure)}" for model, failure in found.failures)
    if not found.complete:
        note(
            f"[yellow]interrupted[/]: {escape(str(out))} has what was measured{escape('; ' + failed if failed else '')}"
        )
        raise typer.Exit(INTERRUPTED)
    if failed:
        raise CheckFailedError(f"parity failed: {failed}", f"See {out}")
    note("[green]parity holds[/]: all models pass their gates")


def _compare(old: Path, new: Path, as_json: bool) -> None:
    from pmm_edge.bench.regression import compare_reports, comparison_table
    from pmm_edge.files import encode_json

    found = compare_reports(old, new)
    if as_json:
        print_plain(encode_json({"passed": not found.regressions, **vars(found)}))
    else:
        _print_table(comparison_table(found))
        for one in found.notes:
            note(f"[yellow]note:[/] {escape(one.sentence)}")
    if found.regressions:
        raise CheckFailedError("worse than before: " + "; ".join(one.sentence for one in found.regressions))
    better = f", {len(found.improvements)} figures are better" if found.improvements else ""
    note(f"[green]no regression[/]: nothing is worse beyond noise{better}")


def _batch_sizes(text: str) -> list[int]:
    try:
        return [int(size) for size in text.split(",")]
    except ValueError as error:
        raise PmmError(f"'{text}' is not a list of batch sizes", "Write for example --batch 1,8") from error
