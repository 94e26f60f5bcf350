"""Models that pass are certified, models that fail lose an older certificate, incomplete benches change nothing."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from report_sample import passing_report

import pmm_edge
from pmm_edge.bench.certification import verify, write_certificates
from pmm_edge.bench.report import BenchReport, BenchWarning, Failure, FailureKind, WarningKind
from pmm_edge.data.dataset import data_sha256, scan
from pmm_edge.errors import PmmError
from pmm_edge.files import sha256
from pmm_edge.images import BadImage, try_crop
from pmm_edge.runtime.certificate import certificate_path, check_certificate

FAILED = [Failure(FailureKind.COSINE)]


@pytest.fixture
def report(tiny_onnx: Path, tiny_checkpoint: Path, tiny_dataset: Path, tmp_path: Path) -> BenchReport:
    """A report of two equal models that passed."""
    sample, dataset = passing_report(tmp_path / "images"), scan(tiny_dataset)
    paths = [*dataset.query.paths, *dataset.gallery.paths]
    copies = [shutil.copy(tiny_onnx, tmp_path / name) for name in ("a.onnx", "b.onnx")]
    reference = replace(sample.reference, path=str(tiny_checkpoint), sha256=sha256(tiny_checkpoint))
    models = [replace(sample.models[0], path=str(path), sha256=sha256(path)) for path in copies]
    data = {"data": str(tiny_dataset), "data_sha256": data_sha256(paths, dataset.root), "images": len(paths)}
    return replace(sample, reference=reference, models=models, **data)


def paths_of(report: BenchReport) -> list[Path]:
    return [Path(model.path) for model in report.models]


def test_models_that_passed(report: BenchReport, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "0001_c1.jpg").write_text("not an image")
    image = try_crop(tmp_path / "0001_c1.jpg", 8, 8)
    assert isinstance(image, BadImage)
    report.warnings.append(BenchWarning(WarningKind.UNREADABLE, str(image.path), detail=image.reason))
    engine, onnx = f"{tmp_path}/of Jane/model.engine", paths_of(report)[0]
    text = f"{engine} cannot run here; {onnx} can"
    report.warnings.append(BenchWarning(WarningKind.NOT_MEASURED, engine, detail=text))
    report.warnings.append(BenchWarning(WarningKind.NOT_MEASURED, detail=text))
    found = write_certificates(report)
    assert found.written == [certificate_path(path) for path in paths_of(report)]
    assert (found.removed, found.refused) == ([], {})
    certificate = check_certificate(paths_of(report)[0])
    benched = json.loads(report.to_json())
    for entry in ("gates", "retrieval", "latency", "cmc", "embedding_size"):
        assert certificate.report[entry] == benched["models"][0][entry]
    assert certificate.environment == benched["environment"]
    assert certificate.reference_sha256 == sha256(tiny_checkpoint)
    assert (certificate.images, certificate.data, certificate.data_sha256) == (24, "tiny", report.data_sha256)
    assert certificate.pmm_edge == pmm_edge.__version__
    assert pmm_edge.load(paths_of(report)[0], "cpu", require_certificate=True).spec == certificate.spec
    assert not re.search(rf"{tmp_path}|Jane|\.jpg", found.written[0].read_text())
    assert image.reason in certificate.warnings[0]
    named = f"model.engine cannot run here; {onnx.name} can"
    assert certificate.warnings[1:] == [f"model.engine: {named}", named]


@pytest.mark.parametrize("complete", [True, False])
def test_a_model_that_fails_loses_its_certificate(complete: bool, report: BenchReport) -> None:
    write_certificates(report)
    first, second = report.models
    found = write_certificates(replace(report, complete=complete, models=[replace(first, failures=FAILED), second]))
    assert found.removed == [certificate_path(Path(first.path))]
    assert not certificate_path(Path(first.path)).exists()
    assert set(found.refused) == (set() if complete else {second.path})
    check_certificate(Path(second.path))  # an interrupted bench does not refute it


def test_a_certificate_stays_unless_the_same_comparison_has_another_result(report: BenchReport) -> None:
    write_certificates(report)
    models = [replace(model, failures=FAILED) for model in report.models]
    other = replace(report.reference, sha256="2" * 64)
    for changes in ({"data_sha256": "2" * 64}, {"reference": other}, {"reference": replace(other, failures=FAILED)}):
        assert write_certificates(replace(report, models=models, **changes)).removed == []
        assert set(write_certificates(replace(report, **changes)).refused) == set(map(str, paths_of(report)))
    cannot = [replace(model, failures=[Failure(FailureKind.CANNOT_RUN)]) for model in models]
    assert write_certificates(replace(report, models=cannot)).removed == []
    for path in paths_of(report):
        assert check_certificate(path).data_sha256 == report.data_sha256
    path = Path(shutil.copy(paths_of(report)[1], paths_of(report)[0]))
    replace(check_certificate(path), sha256="2" * 64).save(certificate_path(path))  # of another file
    write_certificates(replace(report, data_sha256="2" * 64))
    assert check_certificate(path).data_sha256 == "2" * 64


def test_a_bench_that_shows_too_little_certifies_nothing(report: BenchReport) -> None:
    first, second = report.models
    limited = replace(first, retrieval=None, retrieval_change=None)
    same = replace(second, sha256=report.reference.sha256)
    assert set(write_certificates(replace(report, models=[limited, same])).refused) == {first.path, second.path}
    failed = replace(report, reference=replace(report.reference, failures=FAILED))
    assert set(write_certificates(failed).refused) == {first.path, second.path}
    assert not any(certificate_path(path).exists() for path in paths_of(report))


def test_a_changed_file_and_one_that_cannot_be_written_do_not_affect_others(report: BenchReport) -> None:
    first, second = paths_of(report)
    first.write_bytes(b"exported again")
    found = write_certificates(report)
    assert (set(found.refused), found.written) == ({str(first)}, [certificate_path(second)])
    first.write_bytes(second.read_bytes())
    certificate_path(first).mkdir()
    assert set(write_certificates(report).refused) == {str(first)}


def test_verify(report: BenchReport, tiny_dataset: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    write_certificates(report)
    first, second = paths_of(report)
    moved = Path(shutil.copytree(tiny_dataset, tmp_path / "moved"))
    assert not any(item.failures for item in verify([first, second], moved, reference=tiny_checkpoint))
    image = next((moved / "query").iterdir())
    image.write_bytes(image.read_bytes() + b"\x00")
    second.write_bytes(second.read_bytes() + b"\x00")
    found = verify([first, second], moved, reference=first)
    assert [len(item.failures) for item in found] == [2, 1]  # other images and another reference; another model
    assert found[1].certificate is None
    with pytest.raises(PmmError):
        verify([first, second], digest="0" * 64)
