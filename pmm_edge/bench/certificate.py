"""What a bench proves goes beside each model that it proved, and an older claim that it refutes goes away."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pmm_edge import __version__
from pmm_edge.bench.figures import BenchReport, Change, Latency, ModelReport
from pmm_edge.errors import OutputError, PmmError
from pmm_edge.files import sha256
from pmm_edge.runtime import load
from pmm_edge.runtime.certificate import (
    ENGINE,
    Certificate,
    CertifiedChange,
    CertifiedLatency,
    CertifiedParity,
    CertifiedRetrieval,
    HeldGates,
    certificate_path,
)
from pmm_edge.runtime.engine_manifest import manifest_path, read_manifest
from pmm_edge.spec import ModelSpec


@dataclass(frozen=True)
class Written:
    """What became of the certificates."""

    certificates: list[Path] = field(default_factory=list)
    """That were written, for models that passed."""
    removed: list[Path] = field(default_factory=list)
    """Of an earlier bench, for models that failed in this one."""
    none: dict[str, str] = field(default_factory=dict)
    """By the model's path, for those that neither passed nor failed: why they are not certified."""


def write_certificates(report: BenchReport) -> Written:
    """Certify each model that passed, and remove the certificate of each that failed.

    A certificate says that every gate was held, so it needs a bench that was not interrupted, in which all queries and
    the gallery were judged. A model of any other bench keeps the certificate that it has.

    Raises:
        OutputError: the certificate of a model that failed cannot be removed.
    """
    found = Written()
    for model in report.models:
        path = certificate_path(Path(model.path))
        if model.failures:
            if _removed(path):
                found.removed.append(path)
            continue
        try:
            certificate = _certify(report, model)
            certificate.save(path)
        except (_NotProvenError, PmmError, OSError) as error:
            found.none[model.path] = str(error)
        else:
            found.certificates.append(path)
    return found


class _NotProvenError(Exception):
    """Why a bench does not certify a model that failed no gate."""


def _removed(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise OutputError(
            f"cannot remove {path}, which certifies a model that failed: {error.strerror}", "Remove it yourself"
        ) from error
    return True


def _certify(report: BenchReport, model: ModelReport) -> Certificate:
    if not report.complete:
        raise _NotProvenError("the bench was interrupted")
    if report.reference.failures:
        raise _NotProvenError("its reference failed")
    if not all(invariant.held for invariant in model.invariants):
        raise _NotProvenError("an invariant does not hold")
    parity, change = model.parity, model.retrieval_change
    figures, reference = model.retrieval, (change and change.reference) or report.reference.retrieval
    if model.sha256 == report.reference.sha256:
        raise _NotProvenError("it is the reference itself, which proves nothing")
    if parity is None or change is None or figures is None or reference is None:
        raise _NotProvenError(
            "retrieval was not judged; a certificate needs all queries and the gallery of a data set: leave --limit out"
        )
    path = Path(model.path)
    if sha256(path) != model.sha256:
        raise _NotProvenError("the file has changed since it was measured")
    spec, manifest_sha256, onnx_sha256 = _facts(path)
    return Certificate(
        model=_name(path),
        sha256=model.sha256,
        file_bytes=model.file_bytes,
        engine_manifest_sha256=manifest_sha256,
        engine_onnx_sha256=onnx_sha256,
        spec=spec,
        reference=_name(Path(report.reference.path)),
        reference_sha256=report.reference.sha256,
        data=_name(Path(report.data)),
        data_sha256=report.data_sha256,
        images=report.images,
        gates=HeldGates(**asdict(model.gates)),
        parity=CertifiedParity(
            parity.whole.cosine_min,
            parity.whole.cosine_p1,
            parity.whole.cosine_mean,
            parity.whole.largest_difference,
            parity.whole.largest_relative,
            parity.shortest,
            parity.longest,
        ),
        retrieval=CertifiedRetrieval(
            figures,
            reference,
            _change(change.rank1),
            _change(change.mAP),
            _change(change.mINP),
            change.queries,
            len(change.first_hits),
        ),
        latency=[_latency(row) for row in model.latency if math.isfinite(row.median_ms)],
        backend=model.backend,
        device=model.device,
        machine={_printable(name): _printable(value) for name, value in report.environment.items()},
        warnings=[_printable(warning) for warning in report.warnings],
        created=report.created,
        pmm_edge=__version__,
    )


def _facts(path: Path) -> tuple[ModelSpec, str | None, str | None]:
    """The spec in a model, and the hashes of an engine's manifest and of the ONNX file that it was built from."""
    if path.suffix != ENGINE:
        return load(path, "cpu").spec, None, None
    manifest = read_manifest(path)
    return manifest.spec, sha256(manifest_path(path)), manifest.onnx_sha256


def _change(change: Change) -> CertifiedChange:
    return CertifiedChange(change.difference, change.low, change.high)


def _latency(row: Latency) -> CertifiedLatency:
    return CertifiedLatency(row.batch, row.scope, row.cuda_graph, row.median_ms, row.p90_ms, row.images_per_second)


def _name(path: Path) -> str:
    """The file's or folder's name alone: a certificate travels, and its maker's folders are nobody's business."""
    return _printable(path.resolve().name)


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)
