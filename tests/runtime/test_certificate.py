"""A certificate is accepted only while it and its model are what the bench left."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from certify import certify
from color_network import HEIGHT, WIDTH, color_network

import pmm_edge
from pmm_edge import runtime
from pmm_edge.errors import ModelError
from pmm_edge.files import sha256
from pmm_edge.runtime.certificate import (
    CertificateError,
    certificate_path,
    check_certificate,
    open_model,
    read_certificate,
)
from pmm_edge.runtime.model_file import ModelFile


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A certified model."""
    path = color_network(tmp_path / "model.onnx")
    certify(path)
    return path


def refused(model: Path) -> str:
    """Neither checked nor loaded; returns the message."""
    for attempt in (check_certificate, lambda path: pmm_edge.load(path, "cpu", require_certificate=True)):
        with pytest.raises(CertificateError) as caught:
            attempt(model)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 1
        assert caught.value.remedy
    return caught.value.problem


def test_a_certified_model_loads(model: Path) -> None:
    assert certificate_path(model).name == "model.onnx.certificate.json"
    assert check_certificate(model) == read_certificate(model)
    assert check_certificate(str(model)).spec == pmm_edge.load(model, "cpu").spec
    assert pmm_edge.load(model, "cpu", require_certificate=True).backend == "onnxruntime"
    renamed = model.rename(model.with_name("reid.onnx"))
    certificate_path(model).rename(certificate_path(renamed))
    assert check_certificate(renamed).model == "model.onnx"


def test_a_changed_model_is_refused_without_opening_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*arguments: object, **options: object) -> None:
        raise AssertionError("the model was opened")

    monkeypatch.setattr("onnxruntime.InferenceSession", opened)
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    assert str(model) in refused(model)


@pytest.mark.parametrize("changes", [{}, {"images": 25}, {"digest": "0" * 64}, {"digest": None}, {"signed": 1}])
def test_a_changed_certificate_is_refused(changes: dict[str, object], model: Path) -> None:
    path = certificate_path(model)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    if changes:
        refused(model)
    else:
        check_certificate(model)  # another layout of the same content is not a change


def test_swapped_certificates_name_the_other_model(model: Path) -> None:
    other = model.with_name("other.onnx")
    other.write_bytes(model.read_bytes() + b"\x32\x00")  # an empty documentation
    mine, theirs = certificate_path(model), certificate_path(other)
    replace(read_certificate(model), model="other.onnx", sha256=sha256(other)).save(theirs)
    check_certificate(other)
    swapped = mine.read_text(), theirs.read_text()
    theirs.write_text(swapped[0])
    mine.write_text(swapped[1])
    assert "other.onnx" in refused(model)
    assert "model.onnx" in refused(other)


def test_missing_and_invalid_files(model: Path) -> None:
    path = certificate_path(model)
    text = path.read_text()
    deep = text.replace('"report": {', f'"report": {{"x": {"[" * 100_000}{"]" * 100_000},')
    values = [text.replace('"images": 24', f'"images": {value}') for value in ("NaN", '"24"', "true", "1e999")]
    for garbled in (text[:-100], "", "[]", deep, text.replace('"images": 24,', ""), *values):
        assert garbled != text
        path.write_text(garbled)
        assert str(path) in refused(model)
    path.unlink()
    assert path.name in refused(model)
    model.unlink()
    with pytest.raises(ModelError) as caught:
        check_certificate(model)
    assert caught.value.exit_code == 2
    assert str(model) in caught.value.problem


def test_another_schema_or_spec_with_the_right_digest(model: Path) -> None:
    certificate = read_certificate(model)
    replace(certificate, spec=replace(certificate.spec, dataset="another")).save(certificate_path(model))
    check_certificate(model)
    with pytest.raises(CertificateError):
        pmm_edge.load(model, "cpu", require_certificate=True)
    replace(certificate, schema=2).save(certificate_path(model))
    assert "schema" in refused(model)


def test_a_pinned_digest(model: Path) -> None:
    digest = read_certificate(model).digest
    assert check_certificate(model, digest.upper()).digest == digest
    certify(model, images=25)
    check_certificate(model)  # a new pair is consistent; only the pinned digest reveals it
    with pytest.raises(CertificateError):
        check_certificate(model, digest)


def test_what_runs_is_what_was_checked(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crops = [np.full((HEIGHT, WIDTH, 3), 90, np.uint8)]
    expected = pmm_edge.load(model, "cpu").embed(crops)

    def then_removed(path: Path, required: bool | None) -> ModelFile:
        file = open_model(path, required)
        path.unlink()
        return file

    monkeypatch.setattr(runtime, "open_model", then_removed)
    np.testing.assert_array_equal(pmm_edge.load(model, "cpu", require_certificate=True).embed(crops), expected)


def test_a_certificate_next_to_a_model_is_checked_at_every_load(model: Path, tiny_checkpoint: Path) -> None:
    checkpoint = Path(shutil.copy(tiny_checkpoint, model.with_name("best.pt")))
    certify(checkpoint)
    for path in (model, checkpoint):
        assert pmm_edge.load(path, "cpu").path == path
        with path.open("ab") as file:
            file.write(b"\0")
        for attempt in (check_certificate, pmm_edge.load):
            with pytest.raises(CertificateError) as caught:
                attempt(path)
            assert "changed" in caught.value.problem and "is that of" not in caught.value.problem
            assert str(certificate_path(path)) in caught.value.remedy
    certificate_path(checkpoint).unlink()
    assert pmm_edge.load(checkpoint, "cpu").backend == "torch"
    shutil.copy(color_network(model.with_name("other.onnx"), dataset="another"), model)
    assert pmm_edge.load(model, "cpu", require_certificate=None).spec.dataset == "another"
