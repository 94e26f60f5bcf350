"""Whether models are still what a bench certified, and against which data and reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pmm_edge.data.dataset import read
from pmm_edge.data.fingerprint import data_sha256
from pmm_edge.errors import ModelError, PmmError
from pmm_edge.files import sha256
from pmm_edge.progress import Report, silent
from pmm_edge.runtime.certificate import Certificate, check_certificate


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
