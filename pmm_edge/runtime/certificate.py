"""The certificate next to a model: a complete bench compared it with its reference, and it passed.

It names the SHA-256 of the model and has a digest of its own content, which reveals replaced files and edited figures.
It is not a signature: anyone who can write both files can write a new pair. Sign it or pin its `digest` against that.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from pmm_edge.errors import ModelError
from pmm_edge.files import decode_sealed, encode_sealed, json_digest, sha256, written_whole
from pmm_edge.runtime.manifest import check_files, manifest_path, read_manifest
from pmm_edge.runtime.model_file import ModelFile, read_model
from pmm_edge.spec import ModelSpec


class CertificateError(ModelError):
    """A model has no valid certificate."""

    exit_code = 1


@dataclass(frozen=True)
class Certificate:
    """States that a model passed every gate of a complete bench. Files are named without their folders."""

    model: str
    sha256: str  # of the file followed by its external data
    file_bytes: int  # with its external data
    engine_manifest_sha256: str | None  # of the manifest of an engine, which defines its input; None for other models
    engine_onnx_sha256: str | None  # of the ONNX file that an engine was built from
    spec: ModelSpec
    reference: str
    reference_sha256: str
    data: str
    data_sha256: str
    images: int  # all queries and gallery images of the data set
    report: dict[str, Any]  # the entry of the model in `bench.json`, without names of images
    environment: dict[str, Any]  # the machine, as in `bench.json`
    warnings: list[str]
    created: str  # when the bench ran; UTC, ISO 8601
    pmm_edge: str
    schema: Literal[1] = 1

    @property
    def digest(self) -> str:
        """SHA-256 of the content, to pin if a certificate must not be replaced."""
        return json_digest(msgspec.to_builtins(self))

    def save(self, path: Path) -> None:
        """Write the certificate atomically; raise OutputError if the file cannot be written."""
        with written_whole(path) as temporary:
            temporary.write_text(encode_sealed(self), encoding="utf-8")


def certificate_path(model: Path) -> Path:
    """Return `model.onnx.certificate.json` for `model.onnx`; several models often share a stem."""
    return model.with_name(model.name + ".certificate.json")


def read_certificate(model: Path) -> Certificate:
    """Read the certificate of a model without comparing them; CertificateError if it is missing, invalid or changed."""
    path = certificate_path(model)
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        problem = f"{model} has no certificate, {path.name}"
        raise CertificateError(problem, "Run pmm bench, which certifies models that pass") from error
    except OSError as error:
        problem = f"cannot read {path}, the certificate of {model}: {error.strerror}"
        raise CertificateError(problem, "Run pmm bench, which certifies models that pass") from error
    return decode_sealed(Certificate, text, str(path), CertificateError, _remedy(model))


def check_certificate(model: str | Path, digest: str | None = None) -> Certificate:
    """Compare a model with its certificate, without executing anything of the model.

    Raises ModelError if the model, or external data that it refers to, does not exist, CertificateError if the
    certificate is missing, invalid, changed, of another model or has another digest than the pinned one, or the model
    or the manifest of an engine has changed.
    """
    return _certified(Path(model), digest)[1]


def open_model(path: Path, require_certificate: bool | None = False) -> ModelFile:
    """Read a model and check it: against its certificate if there is one, otherwise against its own digest.

    Running the returned content, rather than the file, runs what was checked. `require_certificate` True refuses a
    model without a certificate, None ignores certificates. Raises ModelError or CertificateError.
    """
    if require_certificate or (require_certificate is False and certificate_path(path).exists()):
        file, certificate = _certified(path)
        return replace(file, certificate=certificate)
    file = read_model(path)
    file.check()
    return file


def _certified(model: Path, digest: str | None = None) -> tuple[ModelFile, Certificate]:
    if not model.is_file():
        raise ModelError(f"{model} does not exist", "Name a model that pmm bench has certified")
    certificate, file = read_certificate(model), read_model(model)
    if digest is not None and digest.strip().lower() != certificate.digest:
        problem = f"{certificate_path(model)} has the digest {certificate.digest}, not {digest}"
        raise CertificateError(problem, "Use the certificate that was pinned")
    if file.sha256 != certificate.sha256:
        of_another = f", or its certificate is that of {certificate.model}" * (certificate.model != model.name)
        raise CertificateError(
            f"{model} has changed since it was certified on {certificate.created[:10]} (other SHA-256){of_another}",
            _remedy(model),
        )
    if model.suffix == ".engine":
        manifest = read_manifest(model)
        check_files(manifest, file)
        found = sha256(manifest_path(model)), manifest.onnx_sha256
        if found != (certificate.engine_manifest_sha256, certificate.engine_onnx_sha256):
            problem = f"{manifest_path(model)} has changed since {model.name} was certified"
            raise CertificateError(problem, _remedy(model))
    return file, certificate


def _remedy(model: Path) -> str:
    return f"Run pmm bench again, or remove {certificate_path(model)}"
