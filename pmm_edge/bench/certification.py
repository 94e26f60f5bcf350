"""What a bench proves goes beside each model that it proved, and an older claim that it refutes goes away."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from pmm_edge import __version__
from pmm_edge.bench.report import BenchReport, ModelReport
from pmm_edge.console import Report, silent
from pmm_edge.data.dataset import data_sha256, read
from pmm_edge.errors import ModelError, OutputError, PmmError
from pmm_edge.files import decode_json, encode_json, sha256
from pmm_edge.runtime import load
from pmm_edge.runtime.certificate import ENGINE, Certificate, certificate_path, check_certificate
from pmm_edge.runtime.manifest import manifest_path, read_manifest
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
        report=msgspec.to_builtins(_without_image_names(model)),
        environment=dict(report.environment),
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


def _without_image_names(model: ModelReport) -> ModelReport:
    """Remove what only the maker of a certificate should see: folders, and names of images."""
    assert model.parity is not None and model.retrieval_change is not None
    parity = replace(
        model.parity,
        whole=replace(model.parity.whole, worst_image=""),
        stages={name: replace(stage, worst_image="") for name, stage in model.parity.stages.items()},
        stretched_image="",
    )
    return replace(
        model,
        path=_name(Path(model.path)),
        parity=parity,
        retrieval_change=replace(model.retrieval_change, first_hits=[]),
        latency=[row for row in model.latency if math.isfinite(row.median_ms)],
    )


def report_of(certificate: Certificate) -> ModelReport:
    """Return the report in a certificate.

    Raises:
        ModelError: it is not a report of this version.
    """
    return decode_json(ModelReport, encode_json(certificate.report), f"the report on {certificate.model}", ModelError)


def _name(path: Path) -> str:
    """The file's or folder's name alone: a certificate travels, and its maker's folders are nobody's business."""
    return _printable(path.resolve().name)


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


@dataclass(frozen=True)
class Verified:
    """A model, and what holding it against its certificate gave."""

    model: Path
    certificate: Certificate | None
    """None where it does not certify this model."""
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failures


def verify(
    models: Sequence[Path],
    data: Path | None = None,
    layout: str | None = None,
    reference: Path | None = None,
    digest: str | None = None,
    report: Report = silent,
) -> list[Verified]:
    """Hold models against the certificates beside them. Nothing of a model runs, and no engine is needed.

    A model that is not certified is no error: why is in its `failures`.

    Args:
        models: files that `pmm bench` certified.
        data: a data set; its queries and gallery must be the ones of the certificates.
        layout: of the data set, where it is not recognised.
        reference: a file that must be the reference of the certificates.
        digest: that of the one certificate that is accepted.
        report: told how much of the data set is hashed.

    Raises:
        ModelError: a model or the reference does not exist.
        DataError: the data set cannot be read.
        PmmError: one digest for several models.
    """
    if digest is not None and len(models) != 1:
        raise PmmError(f"one digest cannot be that of {len(models)} certificates", "Verify one model at a time")
    for path in (*models, *([reference] if reference else [])):
        if not path.is_file():
            raise ModelError(f"{path} does not exist", "Name a file that pmm bench has seen")
    data_hash = _hash_of_data(data, layout, report) if data else None
    reference_hash = sha256(reference) if reference else None
    found = []
    for model in models:
        try:
            certificate = check_certificate(model, digest)
        except ModelError as error:
            found.append(Verified(model, None, [str(error)]))
            continue
        failures = []
        if data_hash not in (None, certificate.data_sha256):
            failures.append(f"{model} was certified on {certificate.data}; the images of {data} are other ones")
        if reference_hash not in (None, certificate.reference_sha256):
            failures.append(f"{model} was certified against {certificate.reference}; {reference} is another file")
        found.append(Verified(model, certificate, failures))
    return found


def _hash_of_data(data: Path, layout: str | None, report: Report) -> str:
    dataset = read(data, layout)
    return data_sha256([*dataset.query.paths, *dataset.gallery.paths], dataset.root, report)
