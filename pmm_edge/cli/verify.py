"""`pmm verify`: whether models are still what a bench certified."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from pmm_edge.console import note, out, percent, print_json, print_table, progress
from pmm_edge.errors import CheckFailedError

if TYPE_CHECKING:
    from pmm_edge.bench.certification import Verification
    from pmm_edge.runtime.certificate import Certificate

_COLUMNS = ("model", "certified", "cosine min", "mAP", "ms, batch")


def verify(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL", help="Models that pmm bench has proven.")],
    data: Annotated[
        Path | None, typer.Option(help="A data set: its query and gallery must be those of the certificate.")
    ] = None,
    layout: Annotated[str | None, typer.Option(help="The data set's layout, where it is not recognised.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="A checkpoint: it must be the one of the certificate, byte for byte.")
    ] = None,
    digest: Annotated[
        str | None, typer.Option(metavar="SHA-256", help="Accept only the certificate with this digest.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the certificates and what failed as JSON.")] = False,
) -> None:
    """Check that models are still what pmm bench certified.

    pmm bench writes MODEL.certificate.json beside each model that passed. This holds the model's SHA-256 against it,
    and the certificate's own digest against its content. Nothing of the model runs; neither torch nor a GPU is needed.
    Exit code 1 where a certificate is missing, or it or its model was changed or exchanged.

    A certificate is no signature: whoever can write both files can make a new pair. Keep the digest that is printed
    here elsewhere, and give it with --digest. In a program: pmm_edge.load(MODEL, require_certificate=True).

    [dim]pmm verify runs/20261122-174200-quick/export/*.onnx[/]

    [dim]pmm verify model.onnx --data market1501 --reference best.pt[/]
    """
    from pmm_edge.bench.certification import verify as verify_models

    with progress() as report:
        found = verify_models(models, data, layout, reference, digest, report)
    if as_json:
        print_json({"passed": all(item.passed for item in found), "models": [_facts(item) for item in found]})
    else:
        _show(found)
    failures = [failure for item in found for failure in item.failures]
    if failures:
        raise CheckFailedError("not certified: " + "; ".join(failure.rstrip(".") for failure in failures))
    note(f"[green]certified[/]: {len(found)} of {len(found)} models are what pmm bench has proven")


def _facts(item: Verification) -> dict[str, Any]:
    certificate = asdict(item.certificate) | {"digest": item.certificate.digest} if item.certificate else None
    return {
        "model": str(item.model),
        "passed": item.passed,
        "failures": item.failures,
        "certificate": certificate,
    }


def _show(found: list[Verification]) -> None:
    rows = [(escape(item.model.name), *map(escape, _row(item.certificate))) for item in found if item.certificate]
    if not rows:
        return
    print_table("what was certified", _COLUMNS, rows)
    for item in found:
        if item.certificate:
            out().print(escape(_sentence(item.model, item.certificate)), soft_wrap=True)


def _row(certificate: Certificate) -> tuple[str, ...]:
    from pmm_edge.bench.certification import report_of

    report = report_of(certificate)
    assert report.parity and report.retrieval and report.retrieval_change
    smallest = min(report.latency, key=lambda row: (row.scope != "model", row.batch), default=None)
    return (
        certificate.created[:10],
        f"{report.parity.whole.cosine_min:.6f}",
        f"{percent(report.retrieval.mAP)} {100 * report.retrieval_change.mAP.difference:+.2f}",
        f"{smallest.median_ms:.1f}, {smallest.batch}" if smallest else "–",
    )


def _sentence(model: Path, certificate: Certificate) -> str:
    from pmm_edge.bench.certification import report_of

    report = report_of(certificate)
    assert report.retrieval_change
    machine = certificate.environment.get("cpu", "an unnamed machine")
    gates = report.gates
    mean = f" (mean ≥ {gates.min_mean_cosine:g})" if gates.min_mean_cosine > 0 else ""
    return (
        f"{model.name}: {certificate.spec.precision} held cosine ≥ {gates.min_cosine:g}{mean}, lengths within"
        f" ×{gates.max_stretch:g} and mAP drop ≤ {gates.max_map_drop:g} points against {certificate.reference}\n"
        f"  on {certificate.images:,} images, {report.retrieval_change.queries:,} queries of {certificate.data};"
        f" {machine}, {report.backend} {report.device}, pmm-edge {certificate.pmm_edge}\n"
        f"  digest {certificate.digest}"
    )
