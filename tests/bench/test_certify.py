"""What passed is certified, what failed loses an older certificate, what proves too little does neither."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import pmm_edge
from pmm_edge.bench.certification import report_of, verify, write_certificates
from pmm_edge.bench.report import (
    BenchReport,
    Change,
    Closeness,
    FirstHit,
    Gates,
    Invariant,
    Latency,
    ModelReport,
    Parity,
    RetrievalChange,
)
from pmm_edge.data.dataset import data_sha256, scan
from pmm_edge.errors import DataError, ModelError, PmmError
from pmm_edge.files import sha256
from pmm_edge.runtime.certificate import certificate_path, check_certificate
from pmm_edge.spec import RetrievalFigures

FIGURES = RetrievalFigures(rank1=0.62, mAP=0.46, mINP=0.2, mAP_at_50=0.4)


def model_report(path: Path) -> ModelReport:
    closeness = Closeness(0.99995, 0.99996, 0.99999, 1e-4, 1e-5, str(path.parent / "a person.jpg"))
    change = Change(-0.0002, -0.001, 0.0005)
    hit = FirstHit("/home/somebody/q.jpg", "a.jpg", True, "b.jpg", False)
    return ModelReport(
        path=str(path),
        sha256=sha256(path),
        file_bytes=path.stat().st_size,
        precision="fp32",
        embedding_size=1536,
        backend="onnxruntime",
        device="cpu",
        gates=Gates(),
        invariants=[Invariant("finite", True, "all of 24")],
        parity=Parity(24, closeness, {"I": closeness}, [1.0] * 101),
        retrieval=FIGURES,
        cmc=[0.62],
        retrieval_change=RetrievalChange(change, change, change, 12, [hit]),
        latency=[Latency(1, "model", False, 50, 7.9, 8.5, 9.0, 0.03, 126.6, 0.3, 0.29, 0.31)],
        failures=[],
    )


@pytest.fixture
def report(tiny_onnx: Path, tiny_checkpoint: Path, tiny_dataset: Path, tmp_path: Path) -> BenchReport:
    """Two equal models that passed."""
    models = [model_report(Path(shutil.copy(tiny_onnx, tmp_path / name))) for name in ("a.onnx", "b.onnx")]
    dataset = scan(tiny_dataset)
    paths = [*dataset.query.paths, *dataset.gallery.paths]
    return BenchReport(
        reference=replace(model_report(tiny_checkpoint), parity=None, retrieval_change=None),
        models=models,
        data=str(tiny_dataset),
        data_sha256=data_sha256(paths, dataset.root),
        images=len(paths),
        environment={"processor": "AMD EPYC", "cores": "2"},
        created="2026-11-22T20:00:00+00:00",
        warnings=["few queries"],
    )


def paths_of(report: BenchReport) -> list[Path]:
    return [Path(model.path) for model in report.models]


def test_models_that_passed(report: BenchReport, tiny_checkpoint: Path) -> None:
    written = write_certificates(report)
    assert written.certificates == [certificate_path(path) for path in paths_of(report)]
    assert (written.removed, written.none) == ([], {})
    certificate = check_certificate(paths_of(report)[0])
    found = report_of(certificate)
    assert found.parity.whole.cosine_min == 0.99995
    assert found.retrieval == FIGURES
    assert found.retrieval_change.mAP.difference == -0.0002
    assert found.latency[0].median_ms == 7.9
    assert certificate.reference_sha256 == sha256(tiny_checkpoint)
    assert (certificate.images, certificate.data, certificate.data_sha256) == (24, "tiny", report.data_sha256)
    assert (certificate.pmm_edge, certificate.warnings) == (pmm_edge.__version__, ["few queries"])
    assert pmm_edge.load(paths_of(report)[0], "cpu", require_certificate=True).spec == certificate.spec


def test_a_certificate_names_no_folders(report: BenchReport, tmp_path: Path) -> None:
    write_certificates(report)
    text = certificate_path(paths_of(report)[0]).read_text()
    assert str(tmp_path) not in text
    assert "somebody" not in text
    assert "a person" not in text


def test_a_model_that_fails_loses_its_certificate(report: BenchReport) -> None:
    write_certificates(report)
    first, second = report.models
    written = write_certificates(replace(report, models=[replace(first, failures=["gives NaN"]), second]))
    assert written.removed == [certificate_path(Path(first.path))]
    assert written.certificates == [certificate_path(Path(second.path))]
    assert not certificate_path(Path(first.path)).exists()
    check_certificate(Path(second.path))


def test_a_failure_counts_even_where_the_bench_was_interrupted(report: BenchReport) -> None:
    write_certificates(report)
    first, second = report.models
    failed = replace(first, failures=["gives NaN"])
    written = write_certificates(replace(report, complete=False, models=[failed, second]))
    assert written.removed == [certificate_path(Path(first.path))]
    assert written.none == {second.path: "the bench was interrupted"}
    check_certificate(Path(second.path))  # what was proven before is not refuted


def test_what_proves_too_little(report: BenchReport) -> None:
    first, second = report.models
    limited = replace(first, retrieval=None, retrieval_change=None)
    broken = replace(second, invariants=[Invariant("repeatable", False, "0.3")])
    written = write_certificates(replace(report, models=[limited, broken]))
    assert "retrieval was not judged" in written.none[first.path]
    assert "an invariant does not hold" in written.none[second.path]
    failed = replace(report, reference=replace(report.reference, failures=["gives NaN"]))
    assert set(write_certificates(failed).none.values()) == {"its reference failed"}
    assert not any(certificate_path(path).exists() for path in paths_of(report))


def test_a_file_that_changed_while_it_was_measured(report: BenchReport) -> None:
    first, second = paths_of(report)
    first.write_bytes(b"exported again")
    written = write_certificates(report)
    assert written.none == {str(first): "the file has changed since it was measured"}
    assert written.certificates == [certificate_path(second)]


def test_a_certificate_that_cannot_be_written_costs_no_other(report: BenchReport) -> None:
    first, second = paths_of(report)
    certificate_path(first).mkdir()
    written = write_certificates(report)
    assert "cannot write" in written.none[str(first)]
    assert written.certificates == [certificate_path(second)]


def test_verification(report: BenchReport, tiny_dataset: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    write_certificates(report)
    first, second = paths_of(report)
    moved = Path(shutil.copytree(tiny_dataset, tmp_path / "moved"))
    found = verify([first, second], moved, reference=tiny_checkpoint)
    assert [item.passed for item in found] == [True, True]
    image = next((moved / "query").iterdir())
    image.write_bytes(image.read_bytes() + b"\x00")
    second.write_bytes(second.read_bytes() + b"\x00")
    found = verify([first, second], moved, reference=first)
    assert [item.passed for item in found] == [False, False]
    assert found[0].failures == [
        f"{first} was certified on tiny; the images of {moved} are other ones",
        f"{first} was certified against best.pt; {first} is another file",
    ]
    assert "has changed since it was certified" in found[1].failures[0]


def test_verification_used_wrongly(report: BenchReport, tmp_path: Path) -> None:
    write_certificates(report)
    with pytest.raises(PmmError, match="one digest cannot be that of 2"):
        verify(paths_of(report), digest="0" * 64)
    with pytest.raises(ModelError, match=r"none\.onnx does not exist"):
        verify([*paths_of(report), tmp_path / "none.onnx"])
    with pytest.raises(DataError):
        verify(paths_of(report), tmp_path / "none")


def test_the_hash_of_data_depends_on_names_and_contents_and_their_order(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jpg", tmp_path / "b.jpg"
    first.write_bytes(b"1")
    second.write_bytes(b"2")
    hashes = {data_sha256([first, second], tmp_path), data_sha256([second, first], tmp_path)}
    hashes.add(data_sha256([first], tmp_path))
    second.write_bytes(b"3")
    hashes.add(data_sha256([first, second], tmp_path))
    second.rename(tmp_path / "c.jpg")
    hashes.add(data_sha256([first, tmp_path / "c.jpg"], tmp_path))
    assert len(hashes) == 5
    with pytest.raises(DataError, match=r"cannot hash .*b\.jpg"):
        data_sha256([second], tmp_path)


def test_json_and_certificate_agree(report: BenchReport) -> None:
    write_certificates(report)
    written = json.loads(certificate_path(paths_of(report)[0]).read_text())
    benched = report.to_json()["models"][0]
    assert written["sha256"] == benched["sha256"]
    assert written["report"]["gates"] == benched["gates"]
    assert written["report"]["retrieval"] == benched["retrieval"]
