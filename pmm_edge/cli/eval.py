"""`pmm eval`: retrieval figures of any model that loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pmm_edge.cli.render import percent, print_json, print_table, progress

_RANKS = (1, 5, 10)


def evaluate(
    model: Annotated[Path, typer.Argument(help="A checkpoint, or a .onnx or .safetensors file of pmm export.")],
    data: Annotated[Path, typer.Argument(help="A data set in the layout of Market-1501.")],
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N; by default a GPU where the engine can use one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON, as fractions.")] = False,
) -> None:
    """Evaluate a model's retrieval under the Market-1501 protocol.

    mAP@50 cuts each ranking at 50 before the average precision: what the PMM paper calls mAP.

    [dim]pmm eval runs/20261122-174200-quick/best.pt market1501[/]
    """
    from pmm_edge.bench import evaluate_model
    from pmm_edge.data.dataset import scan
    from pmm_edge.runtime import load

    dataset = scan(data)
    embedder = load(model, device)
    with progress() as report:
        result = evaluate_model(embedder, dataset, report)
    figures = {f"Rank-{k}": result.rank(k) for k in _RANKS}
    figures |= {"mAP": result.mAP, "mINP": result.mINP, "mAP@50": result.mAP_at_50}
    if as_json:
        facts = {"model": str(model), "data": str(data), "backend": embedder.backend, "device": embedder.device}
        print_json({**facts, "queries": result.valid_queries, "gallery": len(dataset.gallery), "figures": figures})
        return
    title = f"{dataset.name}: {result.valid_queries:,} queries, {len(dataset.gallery):,} gallery images"
    print_table(title, ("model", *figures), [(model.name, *map(percent, figures.values()))])
