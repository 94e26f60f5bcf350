"""`pmm eval`: retrieval figures of any model that loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from pmm_edge.console import note, percent, print_json, print_table, progress

if TYPE_CHECKING:
    from pmm_edge.retrieval import RetrievalResult

_RANKS = (1, 5, 10)
_WHY_MAP_50 = (
    "mAP@50 is what the PMM paper calls mAP: its released evaluation cuts each ranking at 50 before the average"
    " precision. Compare mAP with other work."
)


def evaluate(
    model: Annotated[
        Path, typer.Argument(help="A checkpoint, or a .onnx, .engine or .safetensors file of pmm export.")
    ],
    data: Annotated[Path, typer.Argument(help="A data set's folder; pmm data says what it holds.")],
    layout: Annotated[str | None, typer.Option(help="The data set's layout, where it is not recognised.")] = None,
    rerank: Annotated[
        bool,
        typer.Option(
            "--rerank",
            help="Show re-ranked figures as well (k-reciprocal: k1 20, k2 6, lambda 0.3). It compares every image with"
            " every other: on Market-1501 about 40 s on two cores, and 1 GB of memory.",
        ),
    ] = False,
    flip: Annotated[
        bool,
        typer.Option(
            "--flip",
            help="Show figures for the mean of each image's embedding and its mirror image's as well. Embedding takes"
            " twice the time, here and wherever these figures shall be reached.",
        ),
    ] = False,
    cmc: Annotated[Path | None, typer.Option(metavar="FILE.png|.svg", help="Plot the CMC, ranks 1 to 50.")] = None,
    features: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npz", help="Save the embeddings with identities, cameras and file names."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda or cuda:N, of a .onnx also tensorrt or tensorrt:N; by default a GPU where the engine"
            " can use one."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON, as fractions.")] = False,
) -> None:
    """Evaluate a model's retrieval under the Market-1501 protocol.

    mAP@50, beside mAP, is what the PMM paper calls mAP. docs/evaluation.md says what each figure means.

    [dim]pmm eval runs/20261122-174200-quick/best.pt market1501[/]

    [dim]pmm eval model.onnx market1501 --rerank --flip --cmc cmc.png[/]
    """
    from pmm_edge.bench.evaluation import evaluate_model

    with progress() as report:
        found = evaluate_model(
            model,
            data,
            layout=layout,
            rerank=rerank,
            flip=flip,
            cmc=cmc,
            features=features,
            device=device,
            report=report,
        )
    plain = found.rows[0].result
    if as_json:
        facts = {"model": str(found.model), "data": str(found.data), "backend": found.backend, "device": found.device}
        each = [{"name": r.name, "flip": r.flip, "rerank": r.rerank, "figures": _figures(r.result)} for r in found.rows]
        counts = {"queries": plain.valid_queries, "gallery": found.gallery}
        print_json({**facts, **counts, "figures": _figures(plain), "rows": each})
    else:
        title = f"{escape(found.dataset)}: {plain.valid_queries:,} queries, {found.gallery:,} gallery images"
        names = [model.name, *(f"{model.name} + {row.name}" for row in found.rows[1:])]
        figures = [map(percent, _figures(row.result).values()) for row in found.rows]
        table = [(escape(name), *values) for name, values in zip(names, figures, strict=True)]
        print_table(title, ("model", *_figures(plain)), table)
        note(f"[dim]{_WHY_MAP_50}[/]")
    for file in filter(None, (features, cmc)):
        note(f"[dim]wrote {escape(str(file))}[/]")


def _figures(result: RetrievalResult) -> dict[str, float]:
    ranks = {f"Rank-{k}": result.rank(k) for k in _RANKS}
    return {**ranks, "mAP": result.mAP, "mINP": result.mINP, "mAP@50": result.mAP_at_50}
