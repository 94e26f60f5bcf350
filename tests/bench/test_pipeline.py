"""A bench measures what it can, reports what it cannot, and keeps what it has when it is interrupted."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import broken
import onnx
import pytest
from certify import certify

from pmm_edge.bench import BenchReport, bench, parity, pipeline
from pmm_edge.bench.pipeline import bench_images
from pmm_edge.bench.report import BenchWarning, ColdStart, FailureKind, InvariantName, ModelReport, WarningKind
from pmm_edge.errors import DataError, ModelError, PmmError
from pmm_edge.files import sha256
from pmm_edge.model import load_checkpoint, save_checkpoint
from pmm_edge.runs import AboutRun, new_run_folder
from pmm_edge.runtime.certificate import certificate_path, check_certificate


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files go to a temporary folder, timings are short, no process is started and no page is drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parity, "PROBES", 2)
    monkeypatch.setattr(parity, "_ODD_SIZES", (2,))
    monkeypatch.setattr("pmm_edge.bench.timing.MAX_WARM_UP_SECONDS", 0.1)
    monkeypatch.setattr(pipeline, "write_html", lambda *args: None)
    monkeypatch.setattr(pipeline, "measure_cold_start", lambda path, device, batch: ColdStart(1.0, 1.0, batch))
    monkeypatch.setattr(pipeline, "measure_latency", partial(pipeline.measure_latency, min_runs=2, min_seconds=0))


def run(models: list[Path], reference: Path, data: Path, **options: object) -> BenchReport:
    defaults = {"batch_sizes": (1, 2), "device": "cpu", "parity_only": True, "out": "bench.json"}
    return bench(models, reference=reference, data=data, **{**defaults, **options}).report


def kinds(model: ModelReport) -> list[FailureKind]:
    return [failure.kind for failure in model.failures]


def test_everything_is_in_the_report(tiny_onnx: Path, tiny_checkpoint: Path, tiny_dataset: Path) -> None:
    options = {"batch_sizes": (2, 1, 2), "device": "cpu", "out": "bench.json"}
    result = bench(tiny_onnx, reference=tiny_checkpoint, data=tiny_dataset, **options)
    report = result.report
    assert report.passed
    assert [path.name for path in result.files] == ["bench.json", "bench.md", "report.html"]
    assert all(path.is_file() for path in result.files[:2])
    model, base = report.models[0], report.reference
    assert model.parity.whole.cosine_min > 0.999999
    assert set(model.parity.stages) == {"I", "II", "III"}
    assert (model.backend, model.device, model.embedding_size) == ("onnxruntime", "cpu", 1536)
    assert model.file_bytes == tiny_onnx.stat().st_size
    assert base.parity is None
    assert model.retrieval_cosine is not None and model.retrieval_cosine.mAP > 0
    assert (len(model.cmc), model.cmc[0]) == (50, model.retrieval.rank1)
    assert model.retrieval_change.queries == 12
    assert {one.name for one in model.invariants} == set(InvariantName) - {InvariantName.UNIT_LENGTH}
    assert all(one.held for one in (*model.invariants, *base.invariants))
    timed = [("model", 1), ("model", 2), ("end to end", 1), ("end to end", 2)]
    assert [(one.scope, one.batch) for one in model.latency] == timed
    assert model.cold_start == ColdStart(1.0, 1.0, 2)
    assert report.images == 24
    saved = json.loads(Path("bench.json").read_text())
    assert (saved["passed"], saved["data_sha256"]) == (True, report.data_sha256)
    assert result.certificates.refused == {}
    assert result.certificates.written
    result.certificates.written[0].unlink()


def test_by_default_all_exports_of_the_newest_run_are_compared(
    tiny_onnx: Path, tiny_checkpoint: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = new_run_folder(AboutRun("one", str(tiny_dataset), "0"), Path("runs/one"))
    (folder / "export").mkdir()
    shutil.copy(tiny_checkpoint, folder / "best.pt")
    with pytest.raises(ModelError, match="export"):
        bench()
    shutil.copy(tiny_onnx, folder / "export" / "model.onnx")
    monkeypatch.setattr(parity, "check_batches", lambda *args: [])
    for arguments in ({}, {"models": folder / "export/model.onnx"}, {"reference": folder}):
        result = bench(**arguments, limit=2, device="cpu", parity_only=True)
        assert result.report.reference.path.endswith("runs/one/best.pt")
        assert [Path(model.path).name for model in result.report.models] == ["model.onnx"]
        assert result.files[0].parent.name == "one"
    named = folder / "export" / "second.onnx"
    shutil.copy(tiny_onnx, named)
    for models, reference, expected in (
        ([named.resolve(), folder], folder, [named.resolve(), folder / "export/model.onnx"]),
        ([folder], named.resolve(), [folder / "export/model.onnx"]),  # not compared with itself
    ):
        result = bench(models, reference=reference, limit=2, device="cpu", parity_only=True)
        assert [model.path for model in result.report.models] == list(map(str, expected))


def test_nothing_is_compared_with_a_broken_reference(tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    nan = broken.altered(tiny_onnx, tmp_path / "nan.onnx", broken.gives_nan_for(1000))
    report = run([tiny_onnx], nan, tiny_dataset, limit=4)
    ((model, failure),) = report.failures
    assert (model.path, failure.kind, failure.invariant.images) == (str(nan), FailureKind.INVARIANT, 4)
    assert (report.models[0].parity, report.models[0].failures) == (None, [])
    assert WarningKind.REFERENCE_BROKEN in {one.kind for one in report.warnings}


def test_each_model_fails_alone(tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    half = broken.cut_in_half(tiny_onnx, tmp_path / "half.onnx")
    labeled = broken.saved(onnx.load(tiny_onnx), tiny_onnx, tmp_path / "int8.onnx", precision="int8")
    baked = broken.altered(tiny_onnx, tmp_path / "baked.onnx", broken.bakes_its_batch)
    copy = Path(shutil.copy(tiny_onnx, tmp_path / "copy.onnx"))
    gates = {"min_cosine": -1}
    report = run([half, labeled, baked, copy], tiny_onnx, tiny_dataset, gates=gates)
    smaller, wrong, stuck, good = report.models
    (failure,) = smaller.failures
    assert (failure.kind, failure.value, failure.limit) == (FailureKind.EMBEDDING_SIZE, 768, 1536)
    assert kinds(wrong) == [FailureKind.PRECISION]
    assert FailureKind.CANNOT_RUN in kinds(stuck)
    assert (smaller.parity, stuck.parity) == (None, None)
    assert (good.failures, report.complete, report.passed) == ([], True, False)
    assert (good.gates.min_cosine, good.gates.max_map_drop) == (-1, 0.1)
    assert WarningKind.SAME_FILE in {one.kind for one in report.warnings}
    assert not certificate_path(copy).exists()
    report = run([tiny_onnx], baked, tiny_dataset, parity_only=False)
    assert FailureKind.CANNOT_RUN in kinds(report.reference)
    assert (report.models[0].parity, report.models[0].latency) == (None, [])


def test_the_reference_is_the_checkpoint_that_the_model_was_exported_from(
    tiny_onnx: Path, tiny_checkpoint: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "check_batches", lambda *args: [])
    check = partial(bench, data=tiny_dataset, limit=2, device="cpu", parity_only=True)
    older, newest = (new_run_folder(AboutRun("", str(tiny_dataset), "0"), Path("runs", n)) for n in ("older", "newest"))
    save_checkpoint(newest / "best.pt", replace(load_checkpoint(tiny_checkpoint), training={"epochs": 1}))
    (newest / "bench.json").write_text("mine")
    Path("box").mkdir()
    model = Path(shutil.copy(tiny_onnx, "box/model.onnx"))
    certify(model)
    for arguments in ({}, {"reference": newest}):
        with pytest.raises(ModelError, match="--reference"):
            check(model, **arguments)
    for right in (Path("box/any.pt"), older / "best.pt"):
        shutil.copy(tiny_checkpoint, right)
        result = check(model)
        assert (result.report.reference.path, result.files[0]) == (str(right), Path("box/bench.json"))
        with pytest.raises(ModelError, match=f"--reference {right}"):
            check([model], reference=newest)
        right.unlink()
    trained = load_checkpoint(tiny_checkpoint)
    calibrated = replace(trained, spec=replace(trained.spec, checkpoint_sha256=sha256(tiny_checkpoint)))
    save_checkpoint(older / "best.pt", calibrated)
    assert check(model).report.reference.path == str(older / "best.pt")
    with pytest.raises(ModelError, match=f"--reference {older / 'best.pt'}"):
        check([model], reference=newest)
    (older / "best.pt").unlink()
    with pytest.raises(ModelError, match="--reference"):  # a checkpoint in no run
        check(shutil.copy(tiny_checkpoint, "box/any.pt"))
    assert (newest / "bench.json").read_text() == "mine"
    check_certificate(model)


def test_unit_length_embeddings_are_compared_by_direction(tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    unit = broken.unit_length(tiny_onnx, tmp_path / "unit.onnx")
    report = run([unit], tiny_onnx, tiny_dataset)
    (model,) = report.models
    assert model.failures == []
    assert InvariantName.UNIT_LENGTH in {one.name for one in model.invariants}
    assert report.reference.retrieval != model.retrieval  # cosine, not distance
    assert model.retrieval_change.mAP.difference == 0
    assert FailureKind.LENGTH in kinds(run([tiny_onnx], unit, tiny_dataset, limit=4).models[0])


@pytest.mark.parametrize("step", ["embed_files", "check_batches", "retrieval_change", "measure_latency"])
def test_an_interrupt_keeps_what_was_measured(
    step: str, tiny_onnx: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = parity if step in ("check_batches", "retrieval_change") else pipeline
    real, calls = getattr(home, step), []

    def once_then_interrupted(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(home, step, once_then_interrupted)
    models = [tiny_onnx, shutil.copy(tiny_onnx, "copy.onnx")][: 2 if step == "retrieval_change" else 1]
    report = run(models, tiny_onnx, tiny_dataset, parity_only=step != "measure_latency")
    assert (report.complete, report.passed) == (False, False)
    assert (report.models[0].retrieval is None) == (step == "embed_files")
    assert report.reference.invariants
    assert (report.models[0].retrieval_change is None) == (step in ("embed_files", "check_batches"))
    timed = [one.batch for one in report.reference.latency if one.scope == "model"]
    assert timed == ([1] if step == "measure_latency" else [])
    assert json.loads(Path("bench.json").read_text())["complete"] is False


def test_images_of_data_sets_folders_and_lists(tiny_dataset: Path, tmp_path: Path) -> None:
    images = bench_images(tiny_dataset)
    assert images.paths == [*images.dataset.query.paths, *images.dataset.gallery.paths]
    assert bench_images(tiny_dataset, limit=24).warnings == images.warnings == []
    limited = bench_images(tiny_dataset, limit=6)
    assert (limited.paths, limited.dataset) == (images.paths[::4], None)
    assert limited.warnings == [BenchWarning(WarningKind.LIMITED, count=6, total=24)]
    lines = tmp_path / "list.txt"
    lines.write_text("\n".join(str(path) for path in (tiny_dataset / "query").iterdir()))
    for source in (tiny_dataset / "query", lines):
        images = bench_images(source)
        assert (len(images.paths), images.dataset) == (12, None)
        assert images.warnings == [BenchWarning(WarningKind.NO_IDENTITIES)]


def test_unreadable_images_are_left_out_and_named(tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(tiny_dataset, tmp_path / "data"))
    images = bench_images(root)
    bad = [images.paths[3], images.paths[20]]  # a query and a gallery image
    for path in bad:
        path.write_bytes(path.read_bytes()[:99])
    for data, skipped, count in ((root, bad, 22), (root / "query", bad[:1], 11)):
        report = run([tiny_onnx], tiny_onnx, data)
        found = [one.model for one in report.warnings if one.kind is WarningKind.UNREADABLE]
        assert (report.images, found, report.models[0].parity is not None) == (
            count,
            [str(one) for one in skipped],
            True,
        )
    for path in (root / "query").iterdir():
        path.write_bytes(b"")
    for data in (root, root / "query"):
        with pytest.raises(DataError):
            bench_images(data)


def test_sources_that_show_nothing_are_refused(tmp_path: Path, tiny_dataset: Path) -> None:
    root = Path(shutil.copytree(tiny_dataset, tmp_path / "one camera"))
    for path in [*(root / "bounding_box_test").iterdir(), *(root / "query").iterdir()]:
        if "_c1" not in path.name:
            path.unlink()
    (tmp_path / "empty").mkdir()
    for source in (root, tmp_path / "none", tmp_path / "empty"):
        with pytest.raises(DataError):
            bench_images(source)
    with pytest.raises(PmmError):
        bench_images(tiny_dataset, limit=0)
    for sizes in ((), (0,), (1, -1)):
        with pytest.raises(PmmError):
            bench(batch_sizes=sizes)
    (tmp_path / "list.txt").write_text(str(next((tiny_dataset / "query").iterdir())))
    with pytest.raises(DataError):
        bench_images(tmp_path / "list.txt", layout="market1501")
