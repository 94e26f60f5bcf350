"""Certificates: `pmm bench` certifies the models that passed, `pmm verify` checks models against their certificates."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from pmm_edge import __version__
from pmm_edge.bench.report import BenchReport, FailureKind, ModelReport, WarningKind
from pmm_edge.bench.tables import describe_warning
from pmm_edge.console import Report, printable, silent
from pmm_edge.data.dataset import data_sha256, read
from pmm_edge.errors import ModelError, OutputError, PmmError
from pmm_edge.files import decode_json, encode_json, sha256
from pmm_edge.runtime import load
from pmm_edge.runtime.certificate import Certificate, certificate_path, check_certificate, open_model
from pmm_edge.runtime.manifest import manifest_path, read_manifest
from pmm_edge.runtime.model_file import read_model

_NO_VERDICT = (FailureKind.CANNOT_RUN, FailureKind.EMBEDDING_SIZE)
"""Failures without a comparison."""


@dataclass(frozen=True)
class Certification:
    """Certificates that were written and removed; by model path, why a model that did not fail is not certified."""

    written: list[Path] = field(default_factory=list)
    removed: list[Path] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def write_certificates(report: BenchReport) -> Certification:
    """Certify each model that passed, and remove the certificate of one that failed where it had passed before.

    A valid certificate of the same file is only replaced or removed by a verdict on the same data and reference. Raises
    OutputError if the one of a model that failed cannot be removed.
    """
    found = Certification()
    for model in report.models:
        path, valid = certificate_path(Path(model.path)), None
        with suppress(ModelError):
            valid = check_certificate(model.path)
        compared = model.sha256, report.reference.sha256, report.data_sha256
        again = valid and (valid.sha256, valid.reference_sha256, valid.data_sha256) == compared
        judged = not report.reference.failures and any(failure.kind not in _NO_VERDICT for failure in model.failures)
        try:
            if not model.failures:
                certificate = _certificate(report, model)
                if valid and not again:
                    older = f"that of {valid.created[:10]}, on {valid.data} against {valid.reference}, stays valid"
                    raise ModelError(older, f"Remove {path} to replace it")
                certificate.save(path)
                found.written.append(path)
            elif again and judged:
                path.unlink()
                found.removed.append(path)
        except (PmmError, OSError) as error:
            if model.failures:
                raise OutputError(f"cannot remove {path} of a model that failed: {error}", "Remove it") from error
            found.refused[model.path] = str(error)
    return found


def _certificate(report: BenchReport, model: ModelReport) -> Certificate:
    """Return a certificate without folders and names of images, which show people; ModelError if one is refused."""
    file, manifest_sha256, onnx_sha256 = open_model(Path(model.path), require_certificate=None), None, None
    for refused, reason in (
        (not report.complete, "the bench was interrupted"),
        (report.reference.failures, "the reference failed"),
        (model.sha256 == report.reference.sha256, "it is the same file as the reference"),
        (not model.retrieval_change, "retrieval was not evaluated; it needs all images of a data set (no --limit)"),
        (file.sha256 != model.sha256, "the file has changed since it was measured"),
    ):
        if refused:
            raise ModelError(reason)
    if file.path.suffix == ".engine":
        manifest = read_manifest(file.path)
        spec, manifest_sha256, onnx_sha256 = manifest.spec, sha256(manifest_path(file.path)), manifest.onnx_sha256
    else:
        spec = load(file, "cpu").spec
    return Certificate(
        model=_name(model.path),
        sha256=model.sha256,
        file_bytes=model.file_bytes,
        engine_manifest_sha256=manifest_sha256,
        engine_onnx_sha256=onnx_sha256,
        spec=spec,
        reference=_name(report.reference.path),
        reference_sha256=report.reference.sha256,
        data=_name(report.data),
        data_sha256=report.data_sha256,
        images=report.images,
        report=_anonymous(msgspec.to_builtins(model)) | {"path": _name(model.path)},
        environment=msgspec.to_builtins(report.environment),
        warnings=_warnings(report),
        created=report.created,
        pmm_edge=__version__,
    )


def _name(path: str) -> str:
    return printable(Path(path).resolve().name)


def _warnings(report: BenchReport) -> list[str]:
    measured = (report.reference, *report.models)
    paths = [*(model.path for model in measured), *(warning.model for warning in report.warnings)]
    folders = {f"{Path(path).parent}/" for path in paths} - {"./"}
    texts = []
    for warning in report.warnings:
        if warning.kind is WarningKind.UNREADABLE:
            warning = replace(warning, model="of the data set")
        text = describe_warning(warning)
        for folder in sorted(folders, key=len, reverse=True):  # one may contain another
            text = text.replace(folder, "")
        texts.append(text)
    return texts


def _anonymous(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: "" if name.endswith("image") else _anonymous(entry) for name, entry in value.items()}
    return [_anonymous(entry) for entry in value] if isinstance(value, list | tuple) else value


def report_of(certificate: Certificate) -> ModelReport:
    """Return the model's report that a certificate holds; raise ModelError if it is not one of this version."""
    return decode_json(ModelReport, encode_json(certificate.report), f"the report on {certificate.model}", ModelError)


@dataclass(frozen=True)
class Verification:
    """A model compared with its certificate, which is None if it is missing or invalid."""

    model: Path
    certificate: Certificate | None
    failures: list[str]


def verify(
    models: Sequence[Path],
    data: Path | None = None,
    layout: str | None = None,
    reference: Path | None = None,
    digest: str | None = None,
    report: Report = silent,
) -> list[Verification]:
    """Compare models with their certificates. No model is run, and no engine is needed.

    The query and gallery images of `data`, the file `reference` and, for a single model, `digest` must be those of the
    certificates. Raises ModelError if a model or the reference does not exist, DataError if `data` cannot be read.
    """
    if digest is not None and len(models) != 1:
        raise PmmError(f"--digest was given for {len(models)} models", "Verify one model at a time")
    for path in (*models, *([reference] if reference else [])):
        if not path.is_file():
            problem = f"{path} is a folder" if path.is_dir() else f"{path} does not exist"
            raise ModelError(problem, "Name a file that pmm bench has measured")
    data_hash, reference_hash = None, read_model(reference).sha256 if reference else None
    if data is not None:
        dataset = read(data, layout)
        data_hash = data_sha256([*dataset.query.paths, *dataset.gallery.paths], dataset.root, report)
    found = []
    for model in models:
        try:
            certificate = check_certificate(model, digest)
        except ModelError as error:
            found.append(Verification(model, None, [str(error)]))
            continue
        failures = []
        if data_hash not in (None, certificate.data_sha256):
            differs = f"{model} was certified on {certificate.data}, whose images differ from {data}"
            failures.append(f"{differs}. Name that data set, or run pmm bench on this one")
        if reference_hash not in (None, certificate.reference_sha256):
            differs = f"{model} was certified against {certificate.reference}, which differs from {reference}"
            failures.append(f"{differs}. Name that checkpoint, or run pmm bench against this one")
        found.append(Verification(model, certificate, failures))
    return found
