"""A certificate is believed only while it and its model are what the bench left."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from certify import certify

import pmm_edge
from pmm_edge.errors import ModelError
from pmm_edge.files import sha256
from pmm_edge.runtime.certificate import (
    Certificate,
    CertificateError,
    certificate_path,
    check_certificate,
    read_certificate,
)


@pytest.fixture
def model(tiny_onnx: Path, tmp_path: Path) -> Path:
    """A certified model that a test may change."""
    path = Path(shutil.copy(tiny_onnx, tmp_path / "model.onnx"))
    certify(path)
    return path


def refused(model: Path, message: str) -> None:
    """Neither checked nor loaded, in one line, and for the right reason."""
    for attempt in (check_certificate, lambda path: pmm_edge.load(path, "cpu", require_certificate=True)):
        with pytest.raises(CertificateError, match=message) as caught:
            attempt(model)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 1
        assert caught.value.remedy


def edit(model: Path, change: Callable[[dict], object]) -> None:
    """Change the certificate's content, and leave its digest as it was."""
    path = certificate_path(model)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def forge(model: Path, change: Callable[[dict], object]) -> None:
    """Change the certificate's content, and give it the digest of that."""
    path = certificate_path(model)
    content = json.loads(path.read_text())
    del content["digest"]
    change(content)
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({**content, "digest": hashlib.sha256(canonical.encode()).hexdigest()}))


def test_a_certified_model_loads(model: Path) -> None:
    assert certificate_path(model).name == "model.onnx.certificate.json"
    assert check_certificate(model) == read_certificate(model)
    assert check_certificate(str(model)).spec == pmm_edge.load(model, "cpu").spec
    assert pmm_edge.load(model, "cpu", require_certificate=True).backend == "onnxruntime"


def test_a_certificate_goes_with_a_model_that_is_renamed(model: Path) -> None:
    other = model.with_name("reid.onnx")
    certificate_path(model).rename(certificate_path(other))
    model.rename(other)
    assert check_certificate(other).model == "model.onnx"


def test_a_changed_byte_of_the_model(model: Path) -> None:
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    refused(model, r"model\.onnx has changed since it was certified on 2026-11-22 \(SHA-256 ")


def test_a_changed_figure(model: Path) -> None:
    edit(model, lambda content: content["parity"].update(cosine_min=0.99999))
    refused(model, r"certificate\.json was changed after it was written")


def test_a_changed_digest(model: Path) -> None:
    edit(model, lambda content: content.update(digest="0" * 64))
    refused(model, "was changed after it was written")
    edit(model, lambda content: content.pop("digest"))
    refused(model, "was changed after it was written")


def test_a_certificate_that_is_only_laid_out_differently_is_the_same(model: Path) -> None:
    edit(model, lambda content: None)
    check_certificate(model)


def test_swapped_certificates(model: Path) -> None:
    other = model.with_name("other.onnx")
    other.write_bytes(model.read_bytes() + b"\x00")
    mine, others = certificate_path(model), certificate_path(other)
    replace(read_certificate(model), model="other.onnx", sha256=sha256(other)).save(others)
    check_certificate(model)
    check_certificate(other)
    swapped = mine.read_text(), others.read_text()
    others.write_text(swapped[0])
    mine.write_text(swapped[1])
    refused(model, r"is the certificate of another model, other\.onnx")
    refused(other, r"is the certificate of another model, model\.onnx")


def test_missing_files(model: Path) -> None:
    certificate_path(model).unlink()
    refused(model, r"has no certificate: there is no model\.onnx\.certificate\.json beside it")
    model.unlink()
    with pytest.raises(ModelError, match=r"model\.onnx does not exist") as caught:
        check_certificate(model)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("garble", "message"),
    [
        (lambda text: text[:-100], "cannot be read as a certificate"),
        (lambda text: "", "cannot be read as a certificate"),
        (lambda text: "[]", "no JSON object"),
        (lambda text: "[" * 100_000, "nested too deeply"),
        (lambda text: text + " " * (1 << 20), "larger than any certificate"),
        (lambda text: text.replace('"schema": 1', '"schema": 2'), "schema"),
        (lambda text: text.replace("7.94", "NaN"), "NaN is no figure"),
        (lambda text: text.replace("7.94", "1e999"), "median_ms is not what it must be"),
        (lambda text: text.replace("7.94", '"7.94"'), "median_ms is not what it must be"),
        (lambda text: text.replace('"images": 24', '"images": true'), "images is not what it must be"),
        (lambda text: text.replace('"images": 24', '"images": 24, "images": 25'), "stands twice"),
        (lambda text: text.replace('"images": 24,', ""), "lacks images"),
        (lambda text: text.replace('"images": 24', '"images": 24, "signed": 1'), "unknown entries: 'signed'"),
        (lambda text: text.replace("AMD EPYC", r"\u001b[2J"), "a terminal would obey"),
    ],
)
def test_files_from_strangers(garble: Callable[[str], str], message: str, model: Path) -> None:
    path = certificate_path(model)
    garbled = garble(path.read_text())
    assert garbled != path.read_text()
    path.write_text(garbled)
    refused(model, message)


def test_a_certificate_of_another_schema_with_the_right_digest(model: Path) -> None:
    forge(model, lambda content: content.update(schema=2))
    refused(model, "schema 2 instead of 1")


def test_a_pinned_digest(model: Path) -> None:
    digest = read_certificate(model).digest
    assert check_certificate(model, digest.upper()).digest == digest
    forge(model, lambda content: content["parity"].update(cosine_min=0.99999))
    check_certificate(model)  # a forged pair is consistent: the digest tells it
    with pytest.raises(CertificateError, match=f"not {digest}"):
        check_certificate(model, digest)


def test_a_spec_that_is_not_the_models(model: Path) -> None:
    spec = read_certificate(model).spec
    certify(model, spec=replace(spec, dataset="another"))
    with pytest.raises(CertificateError, match="for a network of another spec"):
        pmm_edge.load(model, "cpu", require_certificate=True)


def test_nothing_of_a_refused_model_is_executed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    def opened(*arguments: object, **options: object) -> None:
        raise AssertionError("the model was opened")

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    model.write_bytes(model.read_bytes() + b" ")
    refused(model, "has changed since")


def test_what_runs_is_what_was_checked(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pmm_edge.runtime import certificate

    checked = certificate.read_certified

    def then_exchanged(path: Path) -> tuple[Certificate, bytes]:
        found = checked(path)
        path.write_bytes(b"something else")
        return found

    monkeypatch.setattr(certificate, "read_certified", then_exchanged)
    assert pmm_edge.load(model, "cpu", require_certificate=True).spec == read_certificate(model).spec


def test_checkpoints(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pmm_edge.runtime import certificate

    path = Path(shutil.copy(tiny_checkpoint, tmp_path / "best.pt"))
    certify(path)
    assert pmm_edge.load(path, "cpu", require_certificate=True).backend == "torch"
    checked = certificate.read_certified

    def then_exchanged(path: Path) -> tuple[Certificate, bytes]:
        found = checked(path)
        path.write_bytes(path.read_bytes() + b"\x00")
        return found

    monkeypatch.setattr(certificate, "read_certified", then_exchanged)
    with pytest.raises(ModelError, match=r"best\.pt has changed since|cannot be read"):
        pmm_edge.load(path, "cpu", require_certificate=True)
