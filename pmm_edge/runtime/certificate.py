"""The certificate beside a model: that a bench held it against its reference, on which data, and what came of it.

It names the model's SHA-256 and carries one over its own content, so that a model that was exported again, a file that
was exchanged and a figure that was edited all show. It is no signature: whoever can write both files can write a new
pair. Whoever needs more signs the certificate with a tool for that, or pins its `digest`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pmm_edge.errors import ModelError
from pmm_edge.files import sha256, written_whole
from pmm_edge.runtime.manifest import check_files, manifest_path, parse_object, read_manifest, strictly
from pmm_edge.spec import ModelSpec, RetrievalFigures

SCHEMA = 1
SUFFIX = ".certificate.json"
ENGINE = ".engine"
_DIGEST = "digest"
_LARGEST = 1 << 20
_BENCH = "Prove the model again with pmm bench"


class CertificateError(ModelError):
    """A model that is not certified, or no longer."""

    exit_code = 1


@dataclass(frozen=True)
class HeldGates:
    """What was asked of the model: the bench's gates."""

    min_cosine: float
    max_map_drop: float
    """In points of 100."""
    min_mean_cosine: float
    max_stretch: float


@dataclass(frozen=True)
class CertifiedParity:
    """The model's embeddings beside its reference's."""

    cosine_min: float
    cosine_p1: float
    cosine_mean: float
    largest_difference: float
    largest_relative: float
    shortest: float | None
    """Least length of an embedding over its reference's."""
    longest: float | None


@dataclass(frozen=True)
class CertifiedChange:
    """A retrieval figure less the reference's, with its 95 % interval; in 0..1."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class CertifiedRetrieval:
    """How the model retrieves, in 0..1, and what differs from the reference."""

    model: RetrievalFigures
    reference: RetrievalFigures
    rank1: CertifiedChange
    mAP: CertifiedChange  # noqa: N815  the field's own spelling
    mINP: CertifiedChange  # noqa: N815
    queries: int
    first_hits_changed: int


@dataclass(frozen=True)
class CertifiedLatency:
    """Time of one batch on the machine of the bench."""

    batch: int
    scope: str
    cuda_graph: bool
    median_ms: float
    p90_ms: float
    images_per_second: float


@dataclass(frozen=True)
class Certificate:
    """That a model passed every gate of a whole bench. Files are named without their folders."""

    model: str
    sha256: str
    file_bytes: int
    engine_manifest_sha256: str | None
    """Of the manifest beside an engine, which says what the engine is fed; None for other models."""
    engine_onnx_sha256: str | None
    """Of the ONNX file that an engine was built from."""
    spec: ModelSpec
    reference: str
    reference_sha256: str
    data: str
    data_sha256: str
    images: int
    """All of the data set's queries and gallery."""
    gates: HeldGates
    parity: CertifiedParity
    retrieval: CertifiedRetrieval
    latency: list[CertifiedLatency]
    backend: str
    device: str
    machine: dict[str, str]
    warnings: list[str]
    """What makes the figures less worth, as the bench said it."""
    created: str
    """When the bench ran; UTC, ISO 8601."""
    pmm_edge: str
    """Version that ran it."""
    schema: int = SCHEMA

    @property
    def digest(self) -> str:
        """SHA-256 of the content, to be pinned where a certificate must not be replaced."""
        return _digest_of(self._content())

    def save(self, path: Path) -> None:
        """Write the certificate whole.

        Raises:
            OutputError: the file cannot be written.
        """
        content = self._content()
        text = json.dumps(content | {_DIGEST: _digest_of(content)}, indent=2, allow_nan=False)
        with written_whole(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    def _content(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # tuples become lists, as they are read again
        return content


def certificate_path(model: Path) -> Path:
    """`model.onnx.certificate.json` for `model.onnx`: several models share a folder and often a stem."""
    return model.with_name(model.name + SUFFIX)


def read_certificate(model: Path) -> Certificate:
    """The certificate beside a model, whether or not it is still true of it.

    Raises:
        CertificateError: it is missing, truncated, of another schema, or was changed.
    """
    path = certificate_path(model)
    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST + 1)
        if len(raw) > _LARGEST:
            raise ValueError("it is larger than any certificate")
        content = parse_object(raw.decode("utf-8"))
        if content.get("schema") != SCHEMA:
            found = content.get("schema")
            raise ValueError(f"schema {found if isinstance(found, int) else 'unknown'} instead of {SCHEMA}")
        digest = content.pop(_DIGEST, None)
        certificate: Certificate = strictly(Certificate, content)
    except FileNotFoundError as error:
        raise CertificateError(
            f"{model} has no certificate: there is no {path.name} beside it",
            "Prove the model with pmm bench; where it passes, the certificate is written",
        ) from error
    except (OSError, ValueError, ModelError) as error:
        raise CertificateError(f"{path} cannot be read as a certificate ({error})", _BENCH) from error
    if digest != _digest_of(content):
        raise CertificateError(
            f"{path} was changed after it was written: its digest is not that of its content", _BENCH
        )
    return certificate


def check_certificate(model: str | Path, digest: str | None = None) -> Certificate:
    """Hold a model against the certificate beside it; nothing of the model is executed.

    Args:
        model: a model file, of an engine with its manifest.
        digest: what the certificate's digest must be, where it was pinned.

    Raises:
        ModelError: the model does not exist.
        CertificateError: its certificate is missing, unreadable, changed, of another file or not the pinned one; or the
            model or its manifest has changed since.
    """
    model = Path(model)
    _check_exists(model)
    return _checked(model, sha256(model), digest)


def read_certified(model: Path) -> tuple[Certificate, bytes]:
    """A certified model's bytes, the very ones that its certificate was held against.

    Raises:
        ModelError, CertificateError: as `check_certificate`.
    """
    _check_exists(model)
    content = model.read_bytes()
    return _checked(model, hashlib.sha256(content).hexdigest(), None), content


def _check_exists(model: Path) -> None:
    if not model.is_file():
        raise ModelError(f"{model} does not exist", "Name a model that pmm bench has proven")


def _checked(model: Path, actual: str, digest: str | None) -> Certificate:
    certificate = read_certificate(model)
    if digest is not None and digest.strip().lower() != certificate.digest:
        raise CertificateError(
            f"{certificate_path(model)} has the digest {certificate.digest}, not {digest}",
            "It is not the certificate that was pinned",
        )
    if actual != certificate.sha256:
        if certificate.model != model.name:
            problem = f"{certificate_path(model)} is the certificate of another model, {certificate.model}"
        else:
            problem = (
                f"{model} has changed since it was certified on {certificate.created[:10]}"
                f" (SHA-256 {actual[:12]}… instead of {certificate.sha256[:12]}…)"
            )
        raise CertificateError(problem, _BENCH)
    if model.suffix == ENGINE:
        _check_engine(certificate, model)
    return certificate


def _check_engine(certificate: Certificate, engine: Path) -> None:
    manifest = read_manifest(engine)
    check_files(manifest, engine)
    changed = sha256(manifest_path(engine)) != certificate.engine_manifest_sha256
    if changed or manifest.onnx_sha256 != certificate.engine_onnx_sha256:
        raise CertificateError(f"{manifest_path(engine)} has changed since {engine.name} was certified", _BENCH)


def _digest_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
