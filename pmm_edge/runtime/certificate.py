"""The certificate next to a model: a complete bench compared it with its reference, and it passed.

It names the SHA-256 of the model and has a digest of its own content, which reveals replaced files and edited figures.
It is not a signature: anyone who can write both files can write a new pair. Sign it or pin its `digest` against that.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from pmm_edge.errors import ModelError
from pmm_edge.files import decode_json, encode_json, sha256, written_whole
from pmm_edge.runtime.manifest import check_files, manifest_path, read_manifest
from pmm_edge.spec import ModelSpec

_BENCH = "Run pmm bench again"


class CertificateError(ModelError):
    """A model has no valid certificate."""

    exit_code = 1


@dataclass(frozen=True)
class Certificate:
    """States that a model passed every gate of a complete bench. Files are named without their folders."""

    model: str
    sha256: str
    file_bytes: int
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
        return _digest_of(msgspec.to_builtins(self))

    def save(self, path: Path) -> None:
        """Write the certificate atomically; raise OutputError if the file cannot be written."""
        with written_whole(path) as temporary:
            temporary.write_text(encode_json(msgspec.to_builtins(self) | {"digest": self.digest}), encoding="utf-8")


def certificate_path(model: Path) -> Path:
    """Return `model.onnx.certificate.json` for `model.onnx`; several models often share a stem."""
    return model.with_name(model.name + ".certificate.json")


def read_certificate(model: Path) -> Certificate:
    """Read the certificate of a model without comparing them; CertificateError if it is missing, invalid or changed."""
    path = certificate_path(model)
    try:
        text = path.read_bytes()
    except OSError as error:
        problem = f"cannot read {path}, the certificate of {model}: {error.strerror}"
        raise CertificateError(problem, "Run pmm bench, which certifies models that pass") from error
    content = decode_json(dict[str, Any], text, str(path), CertificateError, _BENCH)
    certificate = decode_json(Certificate, text, str(path), CertificateError, _BENCH)
    if content.pop("digest", None) != _digest_of(content):
        raise CertificateError(f"{path} was changed after it was written: its digest does not match", _BENCH)
    return certificate


def check_certificate(model: str | Path, digest: str | None = None) -> Certificate:
    """Compare a model with its certificate, without executing anything of the model.

    Raises ModelError if the model does not exist, CertificateError if the certificate is missing, invalid, changed, of
    another model or has another digest than the pinned one, or the model or the manifest of an engine has changed.
    """
    model = Path(model)
    if not model.is_file():
        raise ModelError(f"{model} does not exist", "Name a model that pmm bench has certified")
    certificate = read_certificate(model)
    if digest is not None and digest.strip().lower() != certificate.digest:
        problem = f"{certificate_path(model)} has the digest {certificate.digest}, not {digest}"
        raise CertificateError(problem, "Use the certificate that was pinned")
    if sha256(model) != certificate.sha256:
        problem = f"{model} is not the {certificate.model} that was certified on {certificate.created[:10]}"
        raise CertificateError(problem, _BENCH)
    if model.suffix == ".engine":
        manifest = read_manifest(model)
        check_files(manifest, model)
        found = sha256(manifest_path(model)), manifest.onnx_sha256
        if found != (certificate.engine_manifest_sha256, certificate.engine_onnx_sha256):
            raise CertificateError(f"{manifest_path(model)} has changed since {model.name} was certified", _BENCH)
    return certificate


def _digest_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(encode_json(content, indent=0).encode()).hexdigest()
